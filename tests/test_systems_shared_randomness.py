"""FedKSeed and its Pro form: a few scalars travel, and both ends make one model of them."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch

from mycel.errors import RecipeError
from mycel.finetune.fedkseed import PLAIN, FedKSeed, rebuilt_alike, round_bytes
from mycel.finetune.fedkseed_pro import odds_of
from mycel.models.base import open_base
from mycel.recipe.schema import Recipe
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.registry import load_system
from mycel.rounds.replay import draws, pool_of
from mycel.rounds.site import Job, Site
from mycel.rounds.system import Answer, State
from mycel.wire.algebra import norm
from mycel.wire.parcel import Parcel
from mycel.wire.randomness import direction
from rounds_by_hand import FORWARD, FULL, SMALL, Play, same, threads


def test_draws_follow_the_odds_and_can_be_repeated() -> None:
    recipe = Recipe(seed=4)
    odds = torch.tensor([1, 3, 1, 5], dtype=torch.int16)
    drawn = draws(recipe, 2, 3, 20_000, odds)
    assert torch.equal(drawn, draws(recipe, 2, 3, 20_000, odds))
    assert not torch.equal(drawn, draws(recipe, 2, 4, 20_000, odds))
    shares = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(shares, odds / 10.0, atol=0.015, rtol=0)


def test_both_ends_rebuild_one_model_to_the_bit_after_ten_rounds(lab: Laboratory) -> None:
    recipe = lab.recipe("fedkseed", {**SMALL, **PLAIN, "rounds.count": 10, "knobs": {"seeds": 64}})
    finished = lab.run(recipe)
    assert rebuilt_alike(finished)
    brief = finished.system.brief(finished.state, 0)
    there = finished.system.adopt(brief, finished.world.observer()).state()
    apart = Site(Job(recipe, str(finished.world.base.folder), ""), {})
    told = Parcel.from_bytes(brief.to_bytes())
    with threads(2):
        base = open_base(finished.world.base.folder)
        apart.bases[str(base.folder)] = base
        party = finished.world.observer()
        party.base, party.bind = base, apart.bind
        here = load_system(recipe).adopt(told, party).state()
    assert same(there, here)
    assert finished.loss() != finished.loss(0)


def test_the_model_is_the_start_less_the_sum_of_scaled_directions(lab: Laboratory) -> None:
    play = Play(lab, lab.recipe("fedkseed", {**SMALL, **PLAIN, "training.learning_rate": 1e-2, "knobs": {"seeds": 16}}))
    play.round([0, 1])
    system, scalars = play.system, play.state.shared["scalars"].double()
    assert isinstance(system, FedKSeed)
    found = system.adopt(play.brief(0), play.world.observer()).parameters()
    start = play.world.starting_state()
    for index, (name, weight) in enumerate(found.items()):
        noise = torch.stack([direction(seed + index, tuple(weight.shape)).double() for seed in system.pool])
        wanted = start[name].double() - 1e-2 * torch.tensordot(scalars, noise, dims=1)
        torch.testing.assert_close(weight.data.double(), wanted, rtol=1e-5, atol=1e-6)


def test_with_one_party_the_federation_is_that_party_s_own_walk(lab: Laboratory) -> None:
    play = Play(lab, lab.recipe("fedkseed", {**SMALL, **PLAIN, "training.learning_rate": 1e-4}))
    answer = play.work(0)
    walked = play.world.trainable().state()
    play.state = play.system.step(play.state, play.system.combine(play.state, [Answer(0, answer, 5, 0, 5.0)]))
    rebuilt = play.system.adopt(play.brief(0), play.world.observer()).state()
    start = play.world.starting_state()
    assert norm({name: walked[name] - start[name] for name in start}) > 1e-3
    for name, tensor in rebuilt.items():
        torch.testing.assert_close(tensor, walked[name], rtol=1e-5, atol=1e-6)


def test_slopes_are_credited_to_drawn_seeds_whatever_the_order_or_the_delay() -> None:
    recipe = Recipe(system="fedkseed").replace({**FORWARD, "knobs": {"seeds": 8}})
    system = load_system(recipe)
    state = State(shared={"scalars": torch.zeros(8)}, facts={"round": 3})
    slopes = {node: direction(node, (5,)) for node in range(3)}
    answers = [
        Answer(node, Parcel("answer", {}, {"update/scalars": sent}), 1, node, 1.0 + node)
        for node, sent in slopes.items()
    ]
    wanted = torch.zeros(8)
    for node, sent in slopes.items():
        for index, slope in zip(draws(recipe, node, 3 - node, 5, torch.ones(8)).tolist(), sent, strict=True):
            wanted[index] += slope * (1 + node) / 6
    results = [system.combine(state, order).shared["scalars"] for order in permutations(answers)]
    assert all(torch.equal(result, results[0]) for result in results)
    torch.testing.assert_close(results[0], wanted)


def test_a_round_costs_less_than_18_kilobytes_whatever_the_model(lab: Laboratory) -> None:
    rounds = {"rounds.local_steps": 200, "rounds.evaluate_every": 2, "training.batch_size": 1, "data.count": 1}
    lora = {"trainable.kind": "lora", "trainable.rank": 2, "trainable.targets": ["q_proj"]}
    runs = [
        lab.run(lab.recipe("fedkseed", {**SMALL, **PLAIN, **rounds, "training.learning_rate": 1e-4, **kind}))
        for kind in (FULL, lora)
    ]
    assert runs[0].world.sizes[None] > 50 * next(iter(runs[1].world.sizes.values()))
    traffic = [round_bytes(run) for run in runs]
    assert max(map(max, traffic)) < 18_000
    assert traffic[0][1] == traffic[1][1]
    assert int(runs[0].state.shared["scalars"].count_nonzero()) > 300


def test_what_leaves_is_one_scalar_a_step(lab: Laboratory) -> None:
    answer = Play(lab, lab.recipe("fedkseed", {**SMALL, **PLAIN})).work(1)
    assert {name: tuple(tensor.shape) for name, tensor in answer.tensors.items()} == {"update/scalars": (3,)}
    assert set(answer.header) == {"samples"}


@pytest.mark.parametrize("setting", [{"training.optimizer": "adamw"}, {"training.gradient": "backpropagation"}])
def test_a_recipe_that_scalars_cannot_replay_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(setting))):
        load_system(Recipe(system="fedkseed").replace({**PLAIN, **setting}))


def test_parties_of_unlike_ranks_are_refused() -> None:
    with pytest.raises(RecipeError, match="one rank"):
        load_system(Recipe(system="fedkseed").replace({**FORWARD, "trainable.rank": [4, 8]}))


def test_steeper_seeds_have_better_odds_in_the_ratio_of_the_softmax() -> None:
    steepness, times = torch.tensor([2.0, 12.0, 0.0, 9.0]).double(), torch.tensor([2.0, 4.0, 0.0, 1.0]).double()
    odds = odds_of(steepness, times, 1.0).double()
    means = torch.tensor([1.0, 3.0, 13 / 3, 9.0]).double()
    wanted = torch.exp((means - means.max()) / 8)
    torch.testing.assert_close(odds / odds.max(), wanted, rtol=1e-3, atol=0)


def test_without_sharpness_pro_is_fedkseed_to_the_bit(lab: Laboratory) -> None:
    start = {**SMALL, **FORWARD}
    plain = lab.run(lab.recipe("fedkseed", {**start, "knobs": {"seeds": 32}}))
    pro = lab.run(lab.recipe("fedkseed_pro", {**start, "knobs": {"seeds": 32, "sharpness": 0.0}}))
    sharp = lab.run(lab.recipe("fedkseed_pro", {**start, "knobs": {"seeds": 32, "sharpness": 3.0}}))
    assert torch.equal(plain.state.shared["scalars"], pro.state.shared["scalars"])
    assert not torch.equal(plain.state.shared["scalars"], sharp.state.shared["scalars"])


def test_pools_of_one_recipe_begin_alike() -> None:
    assert pool_of(Recipe(), 64)[:16] == pool_of(Recipe(), 16)
    assert pool_of(Recipe(seed=2), 16) != pool_of(Recipe(), 16)


@pytest.mark.parametrize("system", ["fedkseed", "ferret"])
def test_error_feedback_is_refused_where_scalars_belong_to_one_round(system: str) -> None:
    with pytest.raises(RecipeError, match="error_feedback"):
        load_system(Recipe(system=system).replace({**FORWARD, "wire.error_feedback": True}))
