"""How adapters become one through sparse messages: the largest entries, and chosen slices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lora_states import LAYERS, SMALL, Runs, answer, build, close, random_lora, runner, sizes_of
from mycel.errors import ParcelError, RecipeError
from mycel.finetune.flasc import flatten, pack, unflatten, unpack
from mycel.finetune.lora_a2 import choose, masks, scatter
from mycel.recipe.schema import Recipe
from mycel.rounds.effective import play_round
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.registry import load_system
from mycel.rounds.system import Answer, Outcome, State
from mycel.wire.algebra import group
from mycel.wire.parcel import Parcel, Tensors


@pytest.fixture(scope="module")
def runs(lab: Laboratory) -> Runs:
    return runner(lab)


# FLASC


def test_flasc_at_density_one_is_dense_averaging_to_the_bit(runs: Runs) -> None:
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


def test_sparse_bytes_follow_the_formulas(runs: Runs) -> None:
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
