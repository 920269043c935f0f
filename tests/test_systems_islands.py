"""Pre-training across islands: reductions to simpler systems, closed forms, bytes, and resumption."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mycel.errors import DataError, RecipeError
from mycel.pretrain.acco import joined
from mycel.pretrain.async_diloco import delayed_nesterov
from mycel.pretrain.diloco import nesterov
from mycel.pretrain.proving import training_bytes
from mycel.pretrain.qsdp import SHRINKS
from mycel.pretrain.weights import advance, schedule
from mycel.recipe.schema import Training
from mycel.rounds.laboratory import Laboratory, Trail
from mycel.rounds.registry import load_system
from mycel.rounds.system import Answer, Outcome
from mycel.run.islands import ISLAND_ARMS, island_arm
from mycel.testing import check_combine
from mycel.testing.codecs import check_codec
from mycel.wire.algebra import norm, subtract
from mycel.wire.codecs import parse_codec
from rounds_by_hand import Play
from small_islands import recipe
from small_runs import mycel

ASYNC = {"rounds.pace": "buffered(1)", "rounds.staleness": 0.0}


def distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    return norm(subtract(dict(left), dict(right))) / norm(dict(right))


def test_with_one_local_step_and_plain_sgd_diloco_is_data_parallelism(lab: Laboratory) -> None:
    sgd = {
        "training.optimizer": "sgd",
        "training.learning_rate": 0.5,
        "training.clip_norm": 0.0,
        "training.weight_decay": 0.0,
        "rounds.local_steps": 1,
    }
    outer = {"knobs": {"outer_rate": 1.0, "outer_momentum": 0.0}}
    together = lab.run(recipe(lab, "synchronous", sgd))
    alone = lab.run(recipe(lab, "diloco", {**sgd, **outer}))
    start = lab.run(recipe(lab, "synchronous", {**sgd, "rounds.count": 1}))
    assert distance(alone.state.shared, together.state.shared) < 1e-6
    assert distance(start.state.shared, together.state.shared) > 1e-4


def test_the_outer_step_is_torchs_nesterov() -> None:
    source = torch.Generator().manual_seed(0)
    weights = {"w": torch.randn(5, 3, generator=source)}
    parameter = torch.nn.Parameter(weights["w"].clone())
    optimizer = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    velocity: dict[str, Tensor] = {}
    for _ in range(4):
        change = {"w": torch.randn(5, 3, generator=source)}
        weights, velocity = nesterov(weights, velocity, change, 0.7, 0.9)
        parameter.grad = -change["w"]
        optimizer.step()
        assert torch.allclose(weights["w"], parameter, atol=1e-6)


def test_delayed_nesterov_of_one_island_is_nesterov_and_of_many_moves_as_their_mean() -> None:
    source = torch.Generator().manual_seed(1)
    one = {"w": torch.zeros(4)}
    momentum: dict[str, Tensor] = {}
    plain, velocity, kept = torch.zeros(4), torch.zeros(4), dict(one)
    for _ in range(3):
        change = {"w": torch.randn(4, generator=source)}
        kept, momentum, _ = delayed_nesterov(kept, momentum, {}, change, True, 1, (0.5, 0.9, 0.0))
        velocity = 0.9 * velocity + change["w"]
        plain = plain + 0.5 * (change["w"] + 0.9 * velocity)
        assert torch.allclose(kept["w"], plain, atol=1e-6)
    changes = [{"w": torch.randn(4, generator=source)} for _ in range(3)]
    many, state, buffer = {"w": torch.zeros(4)}, dict[str, Tensor](), dict[str, Tensor]()
    for index, change in enumerate(changes):
        many, state, buffer = delayed_nesterov(many, state, buffer, change, index == 2, 3, (0.5, 0.9, 0.0))
    mean = torch.stack([change["w"] for change in changes]).mean(0)
    assert torch.allclose(many["w"], 0.5 * (mean + 0.9 * mean), atol=1e-6)
    assert torch.allclose(state["w"], mean, atol=1e-6)
    assert not buffer["w"].any()


def test_acco_follows_its_recursion(lab: Laboratory) -> None:
    own = recipe(lab, "acco", {"rounds.count": 7, "knobs": {"accumulate": 1}})
    finished = lab.run(own, watch=(trail := Trail()))
    system, world = finished.system, finished.world
    weights, memory = trail.states[0].shared, dict[str, Tensor]()
    estimate, taken = weights, 0

    def gradient(at: Mapping[str, Tensor], stage: int) -> tuple[dict[str, Tensor], int]:
        from mycel.pretrain.weights import gradient_on, island_batches

        total, tokens = dict[str, Tensor](), 0
        for node in range(3):
            party = world.site.party(node, stage)
            trainable = party.trainable()
            trainable.load(at)
            found, count, _ = gradient_on(party, trainable, island_batches(party, stage, 1))
            total = {name: total[name] + value if total else value for name, value in found.items()}
            tokens += count
        return {name: value / tokens for name, value in total.items()}, tokens

    half, half_tokens = gradient(weights, 0)
    for turn in range(3):
        rate = system.rate(turn)  # type: ignore[attr-defined]
        estimate, _ = advance(weights, half, memory, own.training, rate)
        full, tokens = gradient(weights, 2 * turn + 1)
        half_next, next_tokens = gradient(estimate, 2 * turn + 2)
        weights, memory = advance(weights, joined(half, half_tokens, full, tokens), memory, own.training, rate)
        half, half_tokens, taken = half_next, next_tokens, taken + 1
    assert finished.state.facts["updates"] == taken == 3
    assert distance(finished.state.shared, weights) < 1e-5


def test_a_stage_of_acco_in_which_every_island_is_new_changes_nothing(lab: Laboratory) -> None:
    play = Play(lab, recipe(lab, "acco", {"knobs": {"accumulate": 1}}))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in play.state.shared.items()}
    ones = {name: torch.ones_like(tensor) for name, tensor in zeros.items()}
    ends = []
    for tokens in ((0, 8, 8), (0, 0, 8, 0, 8)):
        state = play.state
        for count in tokens:
            state = play.system.step(state, Outcome(shared=ones if count else zeros, facts={"tokens": count}))
        ends.append(state)
    assert [state.facts["updates"] for state in ends] == [1, 1]
    assert distance(ends[0].shared, play.state.shared) > 0
    assert all(torch.equal(ends[1].shared[name], tensor) for name, tensor in ends[0].shared.items())


def test_a_stage_of_acco_lasts_as_the_longer_of_computing_and_sending(lab: Laboratory) -> None:
    changes = {"fleet.devices": "equal", "rounds.count": 6, "knobs": {"accumulate": 3}}
    finished = lab.run(recipe(lab, "acco", changes), watch=(trail := Trail()))
    compute = finished.world.compute_seconds(0, 3, 0)
    size, link = finished.meter.total("up", node=0) // 6, finished.world.device(0).link
    travel = link.up_seconds(size) + link.down_seconds(size)
    stages = [after - before for before, after in zip(trail.moments[2:5], trail.moments[3:6], strict=True)]
    assert max(stages) <= 1.1 * max(compute, travel)
    plain = lab.run(
        recipe(lab, "synchronous", {"fleet.devices": "equal", "rounds.local_steps": 3}), watch=(waits := Trail())
    )
    assert waits.moments[2] - waits.moments[1] >= 0.99 * (compute + travel)
    assert plain.progress.version == 4


def test_qsdp_at_full_precision_is_synchronous_and_sends_a_quarter_when_it_shrinks(lab: Laboratory) -> None:
    plain, same = (lab.run(recipe(lab, name)) for name in ("synchronous", "qsdp"))
    assert same.state.sha256() == plain.state.sha256()
    small = lab.run(recipe(lab, "qsdp", SHRINKS))
    assert training_bytes(small) < 0.28 * training_bytes(plain)
    with pytest.raises(RecipeError, match="error_feedback"):
        load_system(recipe(lab, "qsdp", {"wire.error_feedback": True}))


@pytest.mark.parametrize("spec", ["lattice(8)", "lattice(4)", "rounding(8)", "rounding(3)"])
def test_unbiased_codecs_keep_the_mean_and_the_contract(spec: str) -> None:
    check_codec(spec)
    codec, source = parse_codec(spec), torch.Generator().manual_seed(2)
    errors = []
    for _ in range(400):
        tensor = torch.randn(4, 64, generator=source)
        errors.append((codec.decode(codec.encode(tensor), (4, 64)) - tensor).mean())
    found = torch.stack(errors)
    assert abs(float(found.mean())) < 4 * float(found.std()) / 20


def test_all_arms_take_as_many_batches(lab: Laboratory) -> None:
    main = recipe(lab, "diloco", {"data.count": 4, "rounds.count": 8, "rounds.local_steps": 64})
    wanted = 8 * 64 * 4
    speeds = [100, 77, 38.5, 17.5]
    for name in ISLAND_ARMS:
        arm = island_arm(main, name, 4)
        load_system(arm)
        steps = arm.rounds.local_steps
        shares = [int(64 * speed / 100) for speed in speeds] if name == "async_diloco" else [steps] * 4
        made = arm.rounds.count * (sum(shares) / 4 if name == "async_diloco" else sum(shares))
        assert wanted <= made <= 1.05 * wanted
    with pytest.raises(RecipeError, match="follow from DiLoCo's rounds"):
        island_arm(recipe(lab, "synchronous"), "acco", 4)


def test_faster_islands_work_longer_and_arrive_as_often(lab: Laboratory) -> None:
    finished = lab.run(recipe(lab, "async_diloco", {**ASYNC, "rounds.count": 12, "rounds.local_steps": 20}))
    steps = finished.state.facts["steps"]
    assert steps == [20, 15, 7]
    assert finished.state.facts["arrivals"] == 12


def test_islands_that_stay_silent_leave_a_round_to_the_others(lab: Laboratory) -> None:
    changes = {"fleet.devices": "flaky", "rounds.quorum": 0.5, "rounds.count": 6}
    finished = lab.run(recipe(lab, "diloco", changes))
    assert finished.progress.version == 6
    assert sum(finished.progress.drops.values()) > 0
    assert finished.loss() < lab.run(recipe(lab, "diloco", {"rounds.count": 1})).loss() + 0.5


@pytest.mark.parametrize("system", ["synchronous", "diloco", "async_diloco", "acco"])
def test_combining_does_not_depend_on_the_order_of_answers(lab: Laboratory, system: str) -> None:
    play = Play(lab, recipe(lab, system, ASYNC if system == "async_diloco" else {}))
    answers = [Answer(node, play.work(node), 10 + node, 0, 10.0 + node) for node in range(3)]
    check_combine(play.system, play.state, answers, shares=False)  # islands count alike, whatever they hold


def test_rates_rise_and_fall() -> None:
    rates = [schedule(step, 100, 0.1, 0.2) for step in range(120)]
    assert rates[:10] == sorted(rates[:10])
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates[99] == pytest.approx(0.2, abs=0.01)
    assert rates[119] == pytest.approx(0.2)


def test_an_optimiser_whose_memory_travels_goes_on_as_if_nothing_happened() -> None:
    source = torch.Generator().manual_seed(3)
    weights, memory = {"w": torch.randn(6, generator=source)}, dict[str, Tensor]()
    parameter = torch.nn.Parameter(weights["w"].clone())
    training = Training(learning_rate=0.01, weight_decay=0.1, clip_norm=0.0)
    optimizer = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.1)
    for _ in range(4):
        gradient = {"w": torch.randn(6, generator=source)}
        weights, memory = advance(weights, gradient, memory, training, 0.01)
        parameter.grad = gradient["w"].clone()
        optimizer.step()
    assert torch.equal(weights["w"], parameter.detach())


@pytest.mark.slow
def test_the_recipe_compares_five_ways_and_resumes_to_the_same_end(tmp_path: Path) -> None:
    short = ("rounds.count=2", "rounds.local_steps=4", "data.examples=24", "data.held_out=3", "engine.workers=1")
    mycel("run", "islands", *short, "--out", "whole", "--json", folder=tmp_path)
    result = json.loads((tmp_path / "whole/result.json").read_text(encoding="utf-8"))
    assert set(result["arms"]) == set(ISLAND_ARMS)
    for arm in result["arms"].values():
        assert {"bytes", "loss", "virtual_seconds"} <= set(arm)
        assert arm["curve"][-1]["loss"] == arm["loss"]
    assert result["arms"]["synchronous"]["bytes"] == pytest.approx(4 * result["arms"]["diloco"]["bytes"], rel=0.01)
    page = (tmp_path / "whole/report.html").read_text(encoding="utf-8")
    assert "Ways to train these islands" in page
    assert "Loss by step" in page


def test_text_shorter_than_a_row_is_refused(lab: Laboratory, tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two words"}\n{"text": "three"}\n', encoding="utf-8")
    changes = {"data.parties": [str(path)], "data.held_out": 1, "data.max_length": 64}
    with pytest.raises(DataError, match="shorter than one row of 64 tokens"):
        lab.run(recipe(lab, "diloco", changes))
