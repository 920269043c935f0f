"""How adapters become one: exact averages, stacks and best approximations."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_states import LAYERS, RANKS, SMALL, Runs, answer, build, close, dense_mean, random_lora, runner, sizes_of
from mycel.errors import ParcelError, RecipeError
from mycel.finetune.flexlora import product_svd
from mycel.models.lora import Lora
from mycel.recipe.schema import Recipe
from mycel.rounds.effective import aggregation_error, aggregation_errors, play_round
from mycel.rounds.laboratory import Laboratory, laboratory
from mycel.rounds.party import Party
from mycel.rounds.registry import load_system
from mycel.rounds.system import State, System
from mycel.run.execute import check_recipe
from mycel.testing.bases import random_base
from mycel.wire.algebra import resize_rank, weighted_mean
from mycel.wire.parcel import Tensors

SYSTEMS = ("ffa_lora", "flexlora", "flora_stacking", "flasc", "lora_a2")


@pytest.fixture(scope="module")
def runs(lab: Laboratory) -> Runs:
    return runner(lab)


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


def test_ffa_moves_b_alone_and_every_party_draws_the_same_a(lab: Laboratory, runs: Runs) -> None:
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


def flora_state() -> State:
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


def test_a_lost_home_is_noticed(runs: Runs) -> None:
    finished = runs("flora_stacking", **{"trainable.rank": RANKS})
    system, state = finished.system, finished.state
    part = system.abridge(system.brief(state, 0), state, 0)
    with pytest.raises(ParcelError, match="home was lost"):
        system.adopt(part, finished.world.site.party(0, 2))


def test_the_personal_arm_is_refused_where_nothing_is_left_to_train_on() -> None:
    with pytest.raises(RecipeError, match="leave 'personal' out"):
        check_recipe(Recipe().replace({"system": "flora_stacking", "compare": ["personal"]}))


def test_bytes_follow_the_formulas(runs: Runs) -> None:
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
