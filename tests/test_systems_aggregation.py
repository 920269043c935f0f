"""How adapters become one: exact averages, stacks, best approximations, sparse messages, chosen slices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mycel.catalog import load_system
from mycel.errors import ParcelError, RecipeError
from mycel.finetune.flasc import flatten, pack, unflatten, unpack
from mycel.finetune.flexlora import product_svd
from mycel.finetune.lora_a2 import choose, masks, scatter
from mycel.models.lora import Lora
from mycel.recipe.schema import Recipe
from mycel.rounds.algebra import resize_rank, weighted_mean
from mycel.rounds.effective import aggregation_error, aggregation_errors, play_round
from mycel.rounds.laboratory import Laboratory, laboratory
from mycel.rounds.party import Party
from mycel.rounds.simulation import Finished
from mycel.rounds.system import Answer, Outcome, State, System, group
from mycel.run.execute import check_recipe
from mycel.testing.bases import random_base
from mycel.wire.parcel import Parcel, Tensors

RANKS = [2, 4, 8]
LAYERS = {"m.one": (12, 9), "m.two": (10, 16)}  # inputs, outputs
SMALL: dict[str, Any] = {
    "data.parties": "iid",
    "data.count": 3,
    "data.examples": 16,
    "data.held_out": 4,
    "data.max_length": 64,
    "rounds.count": 2,
    "rounds.local_steps": 2,
    "trainable.rank": 4,
}
SYSTEMS = ("ffa_lora", "flexlora", "flora_stacking", "flasc", "lora_a2")
Build = Callable[..., System]


def random_lora(rank: int, seed: int) -> Tensors:
    source = torch.Generator().manual_seed(seed)
    state: Tensors = {}
    for path, (inputs, outputs) in LAYERS.items():
        state[f"{path}.lora_A"] = torch.randn(rank, inputs, generator=source)
        state[f"{path}.lora_B"] = torch.randn(outputs, rank, generator=source)
    return state


def answer(node: int, update: Tensors, samples: int = 10, **header: Any) -> Answer:
    tensors = {f"update/{name}": value for name, value in update.items()}
    return Answer(node, Parcel("answer", {"samples": samples, **header}, tensors), samples, 0, float(samples))


def build(name: str, rank: int | list[int] = 4, **knobs: Any) -> System:
    return load_system(Recipe().replace({"system": name, "trainable.rank": rank, "knobs": knobs}))


def dense_mean(states: list[Tensors], weights: list[float], path: str) -> np.ndarray[Any, Any]:
    total: np.ndarray[Any, Any] = sum(
        weight * state[f"{path}.lora_B"].double().numpy() @ state[f"{path}.lora_A"].double().numpy()
        for weight, state in zip(weights, states, strict=True)
    )
    return total / sum(weights)


@pytest.fixture(scope="module")
def runs(lab: Laboratory) -> Callable[..., Finished]:
    found: dict[str, Finished] = {}

    def run(name: str, **changes: Any) -> Finished:
        key = f"{name}{sorted(changes.items())}"
        if key not in found:
            found[key] = lab.run(lab.recipe(name, {**SMALL, **changes}))
        return found[key]

    return run


# The measure itself


def test_aggregation_error_is_the_relative_gap_of_products(tmp_path: Path) -> None:
    trainable = Lora(random_base(tmp_path), 4, 2.0, ["q_proj"])
    states = [{name: torch.randn_like(value) for name, value in trainable.initial(0).items()} for _ in range(3)]
    weights = [1.0, 2.0, 5.0]
    mean = weighted_mean(states, weights)
    paths = sorted({name[: -len(".lora_A")] for name in mean})
    wanted = np.stack([dense_mean(states, weights, path) for path in paths])
    gap = np.stack([dense_mean([mean], [1.0], path) for path in paths]) - wanted
    expected = np.linalg.norm(gap) / np.linalg.norm(wanted)
    assert aggregation_error(trainable, states, weights, mean) == pytest.approx(expected, rel=1e-5)
    assert aggregation_error(trainable, states[:1], [3.0], states[0]) == 0


def test_errors_of_real_rounds(lab: Laboratory) -> None:
    errors = {
        name: aggregation_errors(lab.world(lab.recipe(name, SMALL)), 2)
        for name in ("fedavg", "ffa_lora", "lora_a2", "flora_stacking", "flexlora")
    }
    assert min(errors["fedavg"]) > 1e-3
    for name in ("ffa_lora", "lora_a2", "flora_stacking"):
        assert max(errors[name]) < 1e-5, name
    assert errors["flexlora"][0] < errors["fedavg"][0], "of equal answers no approximation of that rank is nearer"


@pytest.mark.parametrize("name", SYSTEMS)
def test_combining_does_not_depend_on_order(lab: Laboratory, name: str) -> None:
    world = lab.world(lab.recipe(name, {**SMALL, "trainable.rank": RANKS}))
    system = load_system(world.recipe)
    state = system.begin(world)
    answers, _ = play_round(world, system, state, 0, {})
    forward = system.combine(state, answers)
    for order in itertools.permutations(answers):
        other = system.combine(state, order)
        assert other.shared.keys() == forward.shared.keys()
        for key, value in forward.shared.items():
            assert torch.allclose(value, other.shared[key], atol=1e-7), key


@pytest.mark.parametrize("name", SYSTEMS)
def test_needs_lora(name: str) -> None:
    with pytest.raises(RecipeError, match=r"trainable\.kind"):
        load_system(Recipe().replace({"system": name, "trainable.kind": "full"}))


# FFA-LoRA


def test_ffa_moves_b_alone_and_every_party_draws_the_same_a(lab: Laboratory, runs: Callable[..., Finished]) -> None:
    finished = runs("ffa_lora", **{"trainable.rank": RANKS})
    start = finished.world.starting_state()
    system, state = finished.system, finished.state
    assert all(name.endswith("lora_B") for name in state.shared)
    assert any(bool(value.any()) for value in state.shared.values())
    for node, rank in enumerate(RANKS):
        party = finished.world.site.party(node, 0)
        told = system.abridge(system.brief(state, node), state, node)
        assert not any(name.endswith("lora_A") for name in told.tensors)
        for name, value in system.adopt(told, party).state().items():
            if name.endswith("lora_A"):
                assert torch.equal(value, start[name][:rank])


def test_ffa_sends_a_given_start_along(lab: Laboratory) -> None:
    world = lab.world(lab.recipe("ffa_lora", SMALL))
    world.start = {name: value + 0.01 for name, value in world.starting_state().items()}
    system = load_system(world.recipe)
    state = system.begin(world)
    told = system.abridge(system.brief(state, 0), state, 0)
    held = system.adopt(told, world.site.party(0, 0)).state()
    assert all(torch.equal(held[name], value) for name, value in world.start.items())
    assert all(name.endswith("lora_B") for name in system.expects(told) or {})


# FlexLoRA


def test_product_svd_is_that_of_the_product() -> None:
    source = torch.Generator().manual_seed(0)
    for outputs, rank, inputs in ((9, 4, 12), (9, 30, 12), (3, 5, 20)):
        up, down = torch.randn(outputs, rank, generator=source), torch.randn(rank, inputs, generator=source)
        left, values, right = product_svd(up, down)
        product = (up.double() @ down.double()).numpy()
        assert np.abs(((left * values) @ right).numpy() - product).max() < 1e-10
        assert np.abs(values.numpy() - np.linalg.svd(product, compute_uv=False)[: len(values)]).max() < 1e-10


@pytest.mark.parametrize("split", ["up", "even"])
def test_flexlora_loses_only_the_tail_singular_values(split: str) -> None:
    system = build("flexlora", RANKS, split=split)
    states = [random_lora(rank, rank) for rank in RANKS]
    weights = [10.0, 20.0, 30.0]
    answers = [answer(node, state, int(weights[node])) for node, state in enumerate(states)]
    shared = system.combine(State(shared=random_lora(8, 99)), answers).shared
    for path in LAYERS:
        product = dense_mean(states, weights, path)
        values = np.linalg.svd(product, compute_uv=False)
        for rank in range(1, 9):
            kept = resize_rank(shared, rank)
            found = kept[f"{path}.lora_B"].double().numpy() @ kept[f"{path}.lora_A"].double().numpy()
            tail = np.sqrt(np.sum(values[rank:] ** 2))
            assert np.linalg.norm(found - product) == pytest.approx(tail, rel=1e-4, abs=1e-4)


def test_flexlora_is_exact_when_ranks_suffice_and_keeps_idle_directions_alive() -> None:
    system = build("flexlora", 8)
    low = resize_rank(random_lora(3, 1), 8)
    shared = system.combine(State(shared=random_lora(8, 2)), [answer(0, low)]).shared
    for path in LAYERS:
        assert np.abs(dense_mean([shared], [1.0], path) - dense_mean([low], [1.0], path)).max() < 1e-5
        assert bool((shared[f"{path}.lora_A"].norm(dim=1) > 0.1).all()), "a row of zeros could never learn again"


# FLoRA


def flora_state(start_seed: int | None = None) -> State:
    shapes = {path: [inputs, outputs, 0] for path, (inputs, outputs) in LAYERS.items()}
    base = {f"{path}.weight": torch.zeros(outputs, inputs) for path, (inputs, outputs) in LAYERS.items()}
    return State(base=base, facts={"merged": 0, "seen": [0] * len(RANKS), "shapes": shapes})


def test_stacks_are_the_exact_mean_of_unlike_ranks() -> None:
    system = build("flora_stacking", RANKS)
    states = [random_lora(rank, rank) for rank in RANKS]
    weights = [10.0, 20.0, 30.0]
    answers = [answer(node, own, int(weights[node]), merged=0) for node, own in enumerate(states)]
    outcome = system.combine(flora_state(), answers)
    for path in LAYERS:
        assert outcome.shared[f"{path}.lora_A"].shape[0] == sum(RANKS)
        wanted = dense_mean(states, weights, path)
        found = dense_mean([outcome.shared], [1.0], path)
        assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_party_that_missed_rounds_ends_with_the_same_base(tmp_path: Path, family: str) -> None:
    with laboratory(workers=0, base=str(random_base(tmp_path, family).folder)) as lab:
        world = lab.world(lab.recipe("flora_stacking", {**SMALL, "trainable.rank": 1}))
        system = load_system(world.recipe)
        state = system.begin(world)
        homes: list[Tensors] = [{}, {}, {}]
        for version, present in enumerate([(0, 1, 2), (0, 2), (0,), (0, 1)]):
            for node in present:
                homes[node] = told(system, state, world.site.party(node, version, homes[node]))
            answers = [
                answer(node, moved(world.trainable().initial(7 * version + node), version), merged=version)
                for node in present
            ]
            state = system.step(state, system.combine(state, answers))
        for node in range(3):
            homes[node] = told(system, state, world.site.party(node, 4, homes[node]))
            assert int(homes[node]["merged"]) == 4
            for name, change in state.base.items():
                assert bool(change.any())
                assert torch.equal(homes[node][f"moved/{name}"], change), (node, name)
        again = told(system, state, world.site.party(0, 4, homes[0]))
        assert all(torch.equal(again[name], value) for name, value in homes[0].items()), "told twice, merged once"


def told(system: System, state: State, party: Party) -> Tensors:
    system.adopt(system.abridge(system.brief(state, party.node), state, party.node), party)
    return party.personal


def moved(state: Tensors, seed: int) -> Tensors:
    source = torch.Generator().manual_seed(seed)
    return {name: value + torch.randn(value.shape, generator=source) for name, value in state.items()}


def test_flora_sends_the_change_itself_where_stacks_would_be_more() -> None:
    system = build("flora_stacking", RANKS)
    state = flora_state()
    for version in range(4):
        answers = [answer(0, random_lora(2, version), merged=version)]
        state = system.step(state, system.combine(state, answers))
    sizes = []
    for node in (0, 1):
        parcel = system.abridge(system.brief(state, node), state, node)
        sizes.append(sum(tensor.numel() for tensor in parcel.tensors.values()))
    one_stack = sum(2 * (inputs + outputs) for inputs, outputs in LAYERS.values())
    assert sizes == [one_stack, sum(inputs * outputs for inputs, outputs in LAYERS.values())]
    kept = sum(tensor.numel() for tensor in state.server.values())
    assert kept <= sizes[1], "what is kept for latecomers is bounded by the change itself"


@pytest.mark.parametrize("fault", ["rank", "merged", "name"])
def test_flora_refuses_unsound_answers(fault: str) -> None:
    system, state = build("flora_stacking", RANKS), flora_state()
    good = answer(1, random_lora(4, 0), merged=0).parcel
    system.inspect(state, 1, good)
    wrong = {
        "rank": answer(1, random_lora(8, 0), merged=0),
        "merged": answer(1, random_lora(4, 0), merged=1),
        "name": answer(1, {**random_lora(4, 0), "other": torch.ones(1)}, merged=0),
    }[fault]
    with pytest.raises(ParcelError):
        system.inspect(state, 1, wrong.parcel)


def test_a_lost_home_is_noticed(runs: Callable[..., Finished]) -> None:
    finished = runs("flora_stacking", **{"trainable.rank": RANKS})
    system, state = finished.system, finished.state
    part = system.abridge(system.brief(state, 0), state, 0)
    with pytest.raises(ParcelError, match="home was lost"):
        system.adopt(part, finished.world.site.party(0, 2))


def test_the_personal_arm_is_refused_where_nothing_is_left_to_train_on() -> None:
    with pytest.raises(RecipeError, match="leave 'personal' out"):
        check_recipe(Recipe().replace({"system": "flora_stacking", "compare": ["personal"]}))


# FLASC


def test_flasc_at_density_one_is_dense_averaging_to_the_bit(runs: Callable[..., Finished]) -> None:
    knobs = {"download": 1.0, "upload": 1.0, "server": "sgd", "server_rate": 1.0}
    ours, plain = runs("flasc", knobs=knobs).state.shared, runs("fedavg").state.shared
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in ours)


def test_flasc_steps_as_adam_does() -> None:
    system = build("flasc", server_rate=0.01)
    state = State(shared=random_lora(4, 0), facts={"rounds": 0})
    live = {name: value.clone().requires_grad_() for name, value in state.shared.items()}
    optimizer = torch.optim.Adam(live.values(), lr=0.01)
    for seed in range(1, 5):
        change = random_lora(4, seed)
        for name, value in live.items():
            value.grad = -change[name]
        optimizer.step()
        state = system.step(state, Outcome(shared=change))
    for name, value in live.items():
        assert torch.allclose(state.shared[name], value, atol=1e-6)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_flasc_keeps_the_largest_over_all_factors(density: float) -> None:
    state = random_lora(4, 3)
    flat = flatten(state)
    back = unflatten(unpack(pack(flat, density), density, flat.numel()), state)
    kept = flatten(back)
    count = math.ceil(density * flat.numel())
    assert int((kept != 0).sum()) == count
    assert torch.equal(kept[kept != 0], flat[kept != 0])
    assert float(flat[kept == 0].abs().max() if count < flat.numel() else 0) <= float(kept[kept != 0].abs().min())


def test_flasc_party_trains_what_it_was_not_sent(lab: Laboratory) -> None:
    world = lab.world(lab.recipe("flasc", {**SMALL, "knobs": {"download": 0.1, "upload": 1.0}}))
    system = load_system(world.recipe)
    state = system.begin(world)
    party = world.site.party(0, 0)
    brief = system.abridge(system.brief(state, 0), state, 0)
    sent = flatten(system.adopt(brief, party).state())
    change = group(system.work(brief, party).tensors, "update")["values"]
    assert int((sent != 0).sum()) == math.ceil(0.1 * len(sent))
    assert float((change[sent == 0] != 0).double().mean()) > 0.3


def test_flasc_refuses_places_outside_the_state() -> None:
    system = build("flasc", upload=0.1)
    state = State(shared=random_lora(4, 0), facts={"rounds": 0})
    parts = pack(flatten(state.shared), 0.1)
    system.inspect(state, 0, answer(0, parts).parcel)
    gaps = parts["gaps"].clone()
    gaps[:] = gaps.long().sum().to(gaps.dtype)
    with pytest.raises(ParcelError):
        system.inspect(state, 0, answer(0, {**parts, "gaps": gaps}).parcel)


@pytest.mark.parametrize("name", ["flasc", "lora_a2"])
def test_error_feedback_is_refused_where_places_change(name: str) -> None:
    with pytest.raises(RecipeError, match="error_feedback"):
        load_system(Recipe().replace({"system": name, "wire.codec": "int8", "wire.error_feedback": True}))


# LoRA-A2


def test_a2_chooses_by_the_change_a_slice_makes() -> None:
    start, change = random_lora(4, 0), random_lora(4, 1)
    only_b = {name: value for name, value in change.items() if name.endswith("B")}
    scores = [
        np.linalg.norm(np.outer(only_b[f"{path}.lora_B"][:, slot], start[f"{path}.lora_A"][slot]))
        for path in sorted(LAYERS)
        for slot in range(4)
    ]
    assert choose(start, only_b, 1).tolist() == sorted(np.argsort(scores)[::-1][:2].tolist())
    assert choose(start, only_b, 4).tolist() == list(range(8))


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a2_slices_land_where_they_came_from(letter: str) -> None:
    factor = {name: value for name, value in random_lora(4, 5).items() if name.endswith(letter)}
    numbers = torch.tensor([0, 3, 6])
    mask = masks(factor, numbers)
    kept = {name: value * mask[name] for name, value in factor.items()}
    rows = [
        kept[name].movedim(0 if letter == "A" else 1, 0)[slot]
        for name, slot in (("m.one", 0), ("m.one", 3), ("m.two", 2))
        for name in [f"{name}.lora_{letter}"]
    ]
    back = scatter(factor, numbers, torch.cat(rows))
    assert all(torch.equal(back[name], kept[name]) for name in factor)
    assert sum(int(value.sum()) for value in mask.values()) == sum(len(row) for row in rows)


def test_a2_counts_what_was_not_sent_as_no_change() -> None:
    system = build("lora_a2", 4)
    state = State(shared=random_lora(4, 0), facts={"turn": 0, "seen": [-1, -1]})
    outputs = LAYERS["m.one"][1]
    sent = Parcel(
        "answer",
        {"samples": 10},
        {"places/slices": torch.tensor([1], dtype=torch.uint8), "update/values": torch.ones(outputs)},
    )
    nothing = Parcel(
        "answer",
        {"samples": 30},
        {"places/slices": torch.tensor([], dtype=torch.uint8), "update/values": torch.ones(0)},
    )
    answers = [Answer(0, sent, 10, 0, 10.0), Answer(1, nothing, 30, 0, 30.0)]
    mean = system.combine(state, answers).shared
    wanted = torch.zeros(outputs, 4)
    wanted[:, 1] = 0.25
    assert torch.equal(mean["m.one.lora_B"], wanted)
    assert not mean["m.two.lora_B"].any()


def test_a2_trains_b_then_a_and_only_the_budget(lab: Laboratory) -> None:
    world = lab.world(lab.recipe("lora_a2", {**SMALL, "trainable.rank": [1, 2, 4]}))
    system = load_system(world.recipe)
    state = system.begin(world)
    homes: dict[int, Tensors] = {}
    count = len(state.shared) // 2
    for version in range(2):
        answers, _ = play_round(world, system, state, version, homes)
        lengths = [len(given.tensors("places")["slices"]) for given in answers]
        assert lengths == [count, 2 * count, 4 * count]
        before, state = state, system.step(state, system.combine(state, answers))
        still, moves = ("lora_A", "lora_B") if version == 0 else ("lora_B", "lora_A")
        for name, value in state.shared.items():
            same = torch.equal(value, before.shared[name])
            assert same if name.endswith(still) else name.endswith(moves)
        assert any(not torch.equal(value, before.shared[name]) for name, value in state.shared.items())
    part = system.abridge(system.brief(state, 0), state, 0)
    assert all(name.endswith("lora_A") for name in part.tensors), "only the factor that moved last travels"
    held = system.adopt(part, world.site.party(0, 2, homes[0])).state()
    assert all(torch.equal(held[name], value) for name, value in state.shared.items())
    missed = state.but(facts={**state.facts, "seen": [0, 1, 1]})
    assert system.abridge(system.brief(missed, 0), missed, 0).tensors.keys() == system.brief(missed, 0).tensors.keys()


@pytest.mark.parametrize(("slices", "values"), [([0, 0], 18), ([99], 9), ([-1], 9), ([0], 8), ([0, 1, 2, 3, 4], 52)])
def test_a2_refuses_unsound_slices(slices: list[int], values: int) -> None:
    system = build("lora_a2", 4, budget=2)
    state = State(shared=random_lora(4, 0), facts={"turn": 0, "seen": [-1]})
    tensors = {"places/slices": torch.tensor(slices), "update/values": torch.zeros(values)}
    with pytest.raises(ParcelError):
        system.inspect(state, 0, Parcel("answer", {}, tensors))


# What travels


def sizes_of(finished: Finished) -> dict[str, int]:
    shared = finished.world.starting_state()
    down = sum(value.shape[1] for name, value in shared.items() if name.endswith("A"))
    up = sum(value.shape[0] for name, value in shared.items() if name.endswith("B"))
    return {"inputs": down, "outputs": up, "layers": len(shared) // 2}


def close(found: int, formula: int, tensors: int) -> None:
    """What the meter counted is the formula and headers: at most 160 bytes for a tensor, 400 for a frame."""
    assert formula < found < formula + 160 * tensors + 400


def test_bytes_follow_the_formulas(runs: Callable[..., Finished]) -> None:
    ranks = {"trainable.rank": RANKS}
    for node, rank in enumerate(RANKS):
        ffa = runs("ffa_lora", **ranks)
        size = sizes_of(ffa)
        both = size["inputs"] + size["outputs"]
        for way in ("up", "down"):
            close(ffa.meter.total(way, node, "work") // 2, 4 * rank * size["outputs"], size["layers"])
            close(runs("flexlora", **ranks).meter.total(way, node, "work") // 2, 4 * rank * both, 2 * size["layers"])
        flora = runs("flora_stacking", **ranks).meter
        close(flora.total("up", node, "work") // 2, 4 * rank * both, 2 * size["layers"])
        close(flora.total("down", node, "work"), 4 * sum(RANKS) * both, 2 * size["layers"] + 3)
        close(flora.total("down", node, "deliver"), 4 * sum(RANKS) * both, 2 * size["layers"])


def test_sparse_bytes_follow_the_formulas(runs: Callable[..., Finished]) -> None:
    flasc = runs("flasc", knobs={"download": 0.5, "upload": 0.125})
    size = sizes_of(flasc)
    entries = 4 * (size["inputs"] + size["outputs"])
    width = 2 if entries <= 1 << 16 else 4
    for node in range(3):
        close(flasc.meter.total("down", node, "work") // 2, int(entries * 0.5 * (4 + width)), 2)
        close(flasc.meter.total("up", node, "work") // 2, int(entries * 0.125 * (4 + width)), 2)
        close(flasc.meter.total("down", node, "deliver"), int(entries * 0.5 * (4 + width)), 2)
    thrifty, lavish = (runs("lora_a2", knobs={"budget": budget}) for budget in (1, 4))
    for node in range(3):
        # All four slices of every layer: B in the first round, A in the second.
        every = 4 * 4 * (size["inputs"] + size["outputs"]) + 2 * 4 * size["layers"]
        close(lavish.meter.total("up", node, "work"), every, 8)
        assert thrifty.meter.total("up", node, "work") < 0.4 * every
