"""Fragments that take turns, islands that come and go: reductions to DiLoCo, and what every island then knows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mycel.pretrain.photon import consensus
from mycel.pretrain.streaming_diloco import fragments
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.system import Answer
from mycel.testing import check_combine
from rounds_by_hand import Play
from small_islands import recipe

PLAIN = {"knobs": {"fragments": 1, "delay": 0}}


def knobs(**values: Any) -> dict[str, Any]:
    return {"knobs": values}


def test_one_fragment_without_delay_is_diloco_to_the_bit(lab: Laboratory) -> None:
    streamed = lab.run(recipe(lab, "streaming_diloco", PLAIN)).state.shared
    plain = lab.run(recipe(lab, "diloco")).state.shared
    assert all(torch.equal(streamed[name], tensor) for name, tensor in plain.items())


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8),
    st.integers(1, 5),
)
def test_fragments_hold_every_row_once_and_are_as_large(sizes: list[tuple[int, int]], count: int) -> None:
    shapes: dict[str, tuple[int, ...]] = {f"w{index}": size for index, size in enumerate(sizes)}
    weights = {name: torch.arange(float(shape[0])).repeat(shape[1], 1).T for name, shape in shapes.items()}
    parts = fragments(shapes, count)
    for name, tensor in weights.items():
        rows = [
            row for part in parts for piece in part if piece.name == name for row in piece.of(weights)[:, 0].tolist()
        ]
        assert rows == tensor[:, 0].tolist()
    numbers = [sum((piece.last - piece.first) * shapes[piece.name][1] for piece in part) for part in parts]
    largest = max(shape[1] for shape in shapes.values())
    assert max(numbers) <= sum(rows * row for rows, row in sizes) / count + 2 * largest


@pytest.mark.parametrize("delay", [0, 1])
def test_a_round_carries_one_fragment_and_every_island_knows_all_of_them(lab: Laboratory, delay: int) -> None:
    whole = lab.run(recipe(lab, "diloco", {"rounds.count": 7}))
    found = lab.run(recipe(lab, "streaming_diloco", {"rounds.count": 7, **knobs(fragments=3, delay=delay)}))
    parts = [each["bytes_up"] for each in found.progress.rounds[1 + delay :]]
    assert max(parts) < 0.36 * max(each["bytes_up"] for each in whole.progress.rounds)
    assert max(each["bytes_down"] for each in found.progress.rounds[1:]) < 0.36 * whole.progress.rounds[0]["bytes_down"]
    # Islands score the delivered model by the fragments they were sent; the coordinator by the state itself.
    assert found.loss() == pytest.approx(lab.mixture(found), rel=1e-6)
    assert not found.progress.drops


def test_an_island_that_missed_fragments_is_brought_up_to_date(lab: Laboratory) -> None:
    play = Play(lab, recipe(lab, "streaming_diloco", knobs(fragments=3, delay=0)))
    for nodes in ([0, 1], [0], [0], [0, 1]):
        play.round(nodes)
    party = play.world.site.party(1, play.version, play.homes[1])
    known = play.system._global(play.brief(1), party)  # type: ignore[attr-defined]
    assert all(torch.equal(known[name], tensor) for name, tensor in play.state.shared.items())


def test_what_travels_with_a_delay_was_made_the_round_before(lab: Laboratory) -> None:
    play = Play(lab, recipe(lab, "streaming_diloco", knobs(fragments=2, delay=1)))
    first = play.work(0)
    assert first.header["round"] == -1
    assert not first.tensors
    made = {name: tensor for name, tensor in play.homes[0].items() if name.startswith("made/")}
    play.state = play.system.step(play.state, play.system.combine(play.state, [Answer(0, first, 10, 0, 10.0)]))
    play.version = 1
    second = play.work(0)
    assert second.header["round"] == 0
    sent: dict[str, Tensor] = {name.removeprefix("update/"): tensor for name, tensor in second.tensors.items()}
    assert sent.keys() == {name.removeprefix("made/") for name in made}
    assert all(torch.equal(sent[name.removeprefix("made/")], tensor) for name, tensor in made.items())


def test_a_round_with_a_delay_takes_the_longer_of_computing_and_sending(lab: Laboratory) -> None:
    changes = {"rounds.count": 12, "rounds.local_steps": 1, "fleet.devices": "equal", "data.examples": 12}
    hidden = lab.run(recipe(lab, "streaming_diloco", {**changes, **knobs(fragments=2, delay=1)}))
    waiting = lab.run(recipe(lab, "streaming_diloco", {**changes, **knobs(fragments=2, delay=0)}))
    compute = hidden.world.compute_seconds(0, 1, 0)
    gaps = [
        [after["virtual_seconds"] - before["virtual_seconds"] for before, after in pairwise(rounds[3:])]
        for rounds in (hidden.progress.rounds, waiting.progress.rounds)
    ]
    travel = max(gaps[1]) - compute
    assert max(gaps[0]) < 1.02 * max(compute, travel) + 1e-4


def test_photon_with_all_islands_is_diloco(lab: Laboratory) -> None:
    own, plain = lab.run(recipe(lab, "photon")), lab.run(recipe(lab, "diloco"))
    assert all(torch.equal(own.state.shared[name], tensor) for name, tensor in plain.state.shared.items())
    assert -1 <= own.state.facts["consensus"] <= 1


def test_consensus_is_the_mean_cosine() -> None:
    east, north = {"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 3.0])}
    assert consensus([east, east]) == pytest.approx(1.0)
    assert consensus([east, north]) == pytest.approx(0.0)
    assert consensus([east, east, north]) == pytest.approx(1 / 3)


def test_local_steps_by_speed_are_fixed_ones_where_speeds_are_equal(lab: Laboratory) -> None:
    changes = {"fleet.devices": "equal", "rounds.pace": "buffered(1)", "rounds.staleness": 0.0, "rounds.count": 6}
    made = [lab.run(recipe(lab, "async_diloco", {**changes, **knobs(dynamic=dynamic)})) for dynamic in (True, False)]
    assert made[0].state.sha256() == made[1].state.sha256()
    unequal = [
        lab.run(recipe(lab, "async_diloco", {**changes, "fleet.devices": "islands", **knobs(dynamic=dynamic)}))
        for dynamic in (True, False)
    ]
    assert unequal[0].state.sha256() != unequal[1].state.sha256()


@pytest.mark.parametrize("system", ["streaming_diloco", "photon"])
def test_combining_does_not_depend_on_the_order_of_answers(lab: Laboratory, system: str) -> None:
    play = Play(lab, recipe(lab, system, knobs(delay=0) if system == "streaming_diloco" else {}))
    answers = [Answer(node, play.work(node), 10 + node, 0, 10.0 + node) for node in range(3)]
    check_combine(play.system, play.state, answers, shares=False)
