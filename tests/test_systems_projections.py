"""Ferret: changes told as coordinates along shared random directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations

import pytest
import torch

from mycel.errors import ParcelError, RecipeError
from mycel.finetune.fedkseed import rebuilt_alike
from mycel.finetune.ferret import Ferret
from mycel.recipe.schema import Recipe
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.projection import allot, flatten, partition, project, reconstruct, unflatten
from mycel.rounds.registry import load_system
from mycel.rounds.system import Answer, State
from mycel.wire.algebra import cosine, norm
from mycel.wire.parcel import Parcel
from mycel.wire.randomness import direction
from rounds_by_hand import SMALL, Play, same


@pytest.mark.parametrize(("size", "count"), [(4000, 256), (4000, 1024), (1500, 1500)])
def test_reconstruction_has_the_cosine_and_the_scale_that_theory_says(size: int, count: int) -> None:
    original, cosines, scales = direction(9, (size,)), [], []
    for trial in range(6):
        rebuilt = reconstruct(project(original, count, trial), size, trial)
        cosines.append(cosine({"x": original}, {"x": rebuilt}))
        scales.append(float(rebuilt @ original / (original @ original)))
    assert sum(cosines) / 6 == pytest.approx(math.sqrt(count / (count + size)), rel=0.05)
    assert sum(scales) / 6 == pytest.approx(1 / 3, rel=0.05)


def test_directions_in_proportion_to_norms_lose_less_than_equal_ones() -> None:
    size, lengths = 400, [10.0, 3.0, 1.0, 0.3]
    blocks = [direction(index, (size,)) * length for index, length in enumerate(lengths)]
    norms = [float(block.norm()) for block in blocks]

    def lost(counts: Sequence[int]) -> float:
        rebuilt = [
            3 * reconstruct(project(block, count, index), size, index)
            for index, (block, count) in enumerate(zip(blocks, counts, strict=True))
        ]
        return float(sum((block - other).square().sum() for block, other in zip(blocks, rebuilt, strict=True)))

    assert lost(allot(200, norms)) < 0.8 * lost([50] * 4)


@pytest.mark.parametrize("norms", [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [1e-9, 5.0, 1e9]])
def test_allotment_spends_everything_and_starves_no_block(norms: list[float]) -> None:
    counts = allot(101, norms)
    assert sum(counts) == 101
    assert min(counts) >= 2
    assert counts == sorted(counts) or norms[0] == norms[-1]


def test_blocks_hold_every_tensor_once_and_come_apart_again() -> None:
    tensors = {str(i): direction(i, shape) for i, shape in enumerate([(3,), (8, 8), (3,), (4, 16), (2, 30), (500,)])}
    blocks = partition({name: tuple(tensor.shape) for name, tensor in tensors.items()}, 0.9)
    assert [name for block in blocks for name in block] == list(tensors)
    assert len(blocks) == 4
    assert same(unflatten([flatten(tensors, block) for block in blocks], blocks, tensors), tensors)


def test_parties_that_missed_rounds_catch_up_to_the_coordinator_s_bits(lab: Laboratory) -> None:
    settings = {**SMALL, "data.count": 3, "knobs": {"coordinates": 256, "clip": 0.05}}
    play = Play(lab, lab.recipe("ferret", settings))
    start = play.state.shared
    for nodes in ([0, 1, 2], [0], [0, 1], [1]):
        play.round(nodes)
    assert {name.rpartition(".")[2] for name in play.state.server} == {"0", "1", "2", "3"}
    for node in range(3):
        party = play.world.site.party(node, play.version, play.homes[node])
        assert same(play.system.adopt(play.brief(node), party).state(), play.state.shared)
    moved = norm({name: tensor - start[name] for name, tensor in play.state.shared.items()})
    # Four rounds of a clipped change, each times a server rate of 3.
    assert 0.05 < moved <= 4 * 3 * 0.05


def test_ferret_s_bytes_follow_neither_the_model_nor_the_round(lab: Laboratory) -> None:
    settings = {**SMALL, "rounds.count": 3, "knobs": {"coordinates": 512}}
    finished = lab.run(lab.recipe("ferret", settings))
    larger = lab.run(lab.recipe("ferret", {**settings, "trainable.rank": 16}))
    assert rebuilt_alike(finished)
    size = finished.world.trainable().size()
    assert larger.world.trainable().size() == 4 * size
    up = [entry["bytes_up"] / 2 for run in (finished, larger) for entry in run.progress.rounds]
    assert max(up) < 1.02 * min(up)
    assert max(up) < 4 * 512 + 600 < 4 * size / 5
    down = [entry["bytes_down"] / 2 for entry in finished.progress.rounds]
    assert down[0] < 400
    assert down[1] == pytest.approx(down[2], rel=0.02)
    assert down[1] < 1.2 * max(up)


def test_ferret_refuses_counts_that_do_not_add_up() -> None:
    system = load_system(Recipe(system="ferret").replace({"knobs": {"coordinates": 10}}))
    assert isinstance(system, Ferret)
    state = State(shared={"a": torch.ones(4), "b": torch.ones(4)})
    for counts in ([5, 6], [12, -2], [10, 0], [10], [4, 3, 3]):
        tensors = {"update/coordinates": torch.ones(10), "counts/counts": torch.tensor(counts, dtype=torch.int16)}
        with pytest.raises(ParcelError, match="counts"):
            system.inspect(state, 0, Parcel("answer", {}, tensors))
    sound = {"update/coordinates": torch.ones(10), "counts/counts": torch.tensor([3, 7], dtype=torch.int16)}
    system.inspect(state, 0, Parcel("answer", {}, sound))


def test_ferret_s_mean_change_does_not_depend_on_the_order_of_answers(lab: Laboratory) -> None:
    play = Play(lab, lab.recipe("ferret", {**SMALL, "data.count": 3, "knobs": {"coordinates": 256}}))
    answers = [Answer(node, play.work(node), 1, 0, 1.0 + node) for node in range(3)]
    tables = [play.system.combine(play.state, order).server for order in permutations(answers)]
    assert all(same(table, tables[0]) for table in tables)


def test_too_few_coordinates_for_the_blocks_are_refused(lab: Laboratory) -> None:
    with pytest.raises(RecipeError, match=r"knobs\.coordinates"):
        Play(lab, lab.recipe("ferret", {**SMALL, "knobs": {"coordinates": 4}}))
