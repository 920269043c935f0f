"""FedCyBGD: one block of the model trained and sent at a time."""

from __future__ import annotations

import pytest
import torch

from mycel.errors import RecipeError
from mycel.finetune.fedcybgd import FedCyBGD, cut_blocks
from mycel.recipe.schema import Recipe
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.registry import load_system
from mycel.rounds.system import State
from mycel.wire.algebra import group
from rounds_by_hand import FULL, SMALL, Play, same


def test_only_the_active_block_moves_and_only_it_is_sent(lab: Laboratory) -> None:
    play = Play(lab, lab.recipe("fedcybgd", {**SMALL, **FULL, "rounds.pace": "sequential"}))
    blocks = play.state.facts["cut"]
    assert sorted(name for block in blocks for name in block) == sorted(play.state.shared)
    for turn, block in enumerate(blocks):
        before = play.state.shared
        answer = play.work(turn % 2)
        trainable = play.world.trainable()
        after = trainable.state()
        outside = set(before) - set(block)
        assert all(torch.equal(after[name], before[name]) for name in outside)
        assert all(trainable.parameters()[name].grad is None for name in outside)
        assert all(not torch.equal(after[name], before[name]) for name in block)
        assert set(group(answer.tensors, "update")) == set(block)
        weights = sum(before[name].numel() for name in block)
        assert len(answer.to_bytes()) == pytest.approx(4 * weights, abs=200 + 150 * len(block))
        play.round([turn % 2])
    start = play.world.starting_state()
    assert all(not torch.equal(tensor, start[name]) for name, tensor in play.state.shared.items())


def test_one_block_is_fedavg_to_the_bit(lab: Laboratory) -> None:
    start = {**SMALL, "rounds.pace": "sequential", "rounds.count": 3}
    plain = lab.run(lab.recipe("fedavg", start))
    assert same(plain.state.shared, lab.run(lab.recipe("fedcybgd", {**start, "knobs": {"blocks": 1}})).state.shared)
    together = {**start, "rounds.pace": "synchronous"}
    plain = lab.run(lab.recipe("fedavg", together))
    assert same(plain.state.shared, lab.run(lab.recipe("fedcybgd", {**together, "knobs": {"blocks": 1}})).state.shared)


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_every_cycle_visits_every_block_once(order: str) -> None:
    system = load_system(Recipe(system="fedcybgd").replace({"rounds.pace": "sequential", "knobs": {"order": order}}))
    assert isinstance(system, FedCyBGD)
    visits = [system.active(State(facts={"round": turn, "cut": [[]] * 5})) for turn in range(20)]
    cycles = [visits[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(cycle) == list(range(5)) for cycle in cycles)
    expected = {"ascending": [list(range(5))], "descending": [[4, 3, 2, 1, 0]]}
    assert [list(cycle) for cycle in {tuple(cycle) for cycle in cycles}] == expected.get(order, []) or order == "random"
    assert order != "random" or len({tuple(cycle) for cycle in cycles}) > 1


def test_a_compressed_download_brings_the_block_exactly_and_the_others_nearly(lab: Laboratory) -> None:
    settings = {**SMALL, **FULL, "rounds.pace": "sequential", "knobs": {"download": "int8(64)"}}
    play = Play(lab, lab.recipe("fedcybgd", settings))
    whole = sum(tensor.numel() for tensor in play.state.shared.values()) * 4
    assert not group(play.brief(0).tensors, "changes")
    play.round([0])
    changed, block = play.state.facts["cut"][0], play.state.facts["cut"][1]
    brief = play.brief(1)
    assert {name.rpartition(":")[0] for name in group(brief.tensors, "changes")} == set(changed)
    assert len(brief.to_bytes()) < 0.4 * whole
    told = play.system.adopt(brief, play.world.observer()).state()
    start = play.world.starting_state()
    assert all(torch.equal(told[name], play.state.shared[name]) for name in block)
    for name in changed:
        bound = float((play.state.shared[name] - start[name]).abs().max()) / 127
        assert float((told[name] - play.state.shared[name]).abs().max()) <= 0.51 * bound + 1e-7
    assert any(not torch.equal(told[name], play.state.shared[name]) for name in changed)


def test_more_blocks_than_the_model_has_are_refused(lab: Laboratory) -> None:
    recipe = lab.recipe("fedcybgd", {**SMALL, "rounds.pace": "sequential", "knobs": {"blocks": 9}})
    with pytest.raises(RecipeError, match="2 blocks"):
        Play(lab, recipe)


def test_runs_of_neighbours_differ_in_length_by_one_at_most(lab: Laboratory) -> None:
    world = lab.world(lab.recipe("fedcybgd", {**SMALL, **FULL, "rounds.pace": "sequential"}))
    state = world.starting_state()
    natural = cut_blocks(world.base, state)
    assert len(natural) == 3
    assert cut_blocks(world.base, state, 2) == [natural[0], natural[1] + natural[2]]
