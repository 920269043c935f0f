"""FedKSeed, FedMeZO, Ferret and FedCyBGD: what little travels, and what both ends make of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mycel.catalog import load_system
from mycel.errors import ParcelError, RecipeError
from mycel.finetune.fedcybgd import FedCyBGD, cut_blocks
from mycel.finetune.fedkseed import PLAIN, FedKSeed, rebuilt_alike, round_bytes
from mycel.finetune.fedkseed_pro import odds_of
from mycel.finetune.fedmezo import deviations, differences, step_bytes
from mycel.finetune.ferret import Ferret
from mycel.models.base import open_base
from mycel.recipe.schema import Recipe
from mycel.rounds.algebra import cosine, norm
from mycel.rounds.footprint import peak_bytes
from mycel.rounds.gradients import two_point
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.projection import allot, flatten, partition, project, reconstruct, unflatten
from mycel.rounds.replay import draws, pool_of
from mycel.rounds.site import Job, Site
from mycel.rounds.system import Answer, State, System, group
from mycel.rounds.world import World
from mycel.wire.parcel import Parcel, Tensors
from mycel.wire.randomness import direction

SMALL: dict[str, Any] = {
    "data.parties": "iid",
    "data.count": 2,
    "data.examples": 16,
    "data.held_out": 4,
    "data.max_length": 32,
    "rounds.count": 2,
    "rounds.local_steps": 3,
    "training.batch_size": 2,
    "trainable.rank": 4,
}
FORWARD = {key: value for key, value in PLAIN.items() if key != "trainable.kind"}
FULL = {"trainable.kind": "full"}


class Play:
    """The rounds of a system, played by hand, with frames between the two ends."""

    def __init__(self, lab: Laboratory, recipe: Recipe) -> None:
        self.world: World = lab.world(recipe)
        self.system: System = load_system(recipe)
        self.state: State = self.system.begin(self.world)
        self.homes: dict[int, Tensors] = {}
        self.version = 0

    def brief(self, node: int) -> Parcel:
        """What the node receives."""
        told = self.system.abridge(self.system.brief(self.state, node), self.state, node)
        return Parcel.from_bytes(Parcel(told.kind, {**told.header, "version": self.version}, told.tensors).to_bytes())

    def work(self, node: int) -> Parcel:
        """What the node answers."""
        party = self.world.site.party(node, self.version, self.homes.get(node))
        answer = self.system.work(self.brief(node), party)
        self.homes[node] = dict(Parcel.from_bytes(Parcel("home", {}, party.personal).to_bytes()).tensors)
        return Parcel.from_bytes(answer.to_bytes())

    def round(self, nodes: Sequence[int]) -> None:
        """Ask the nodes, and move."""
        answers = [Answer(node, self.work(node), 10 + node, 0, 10.0 + node) for node in nodes]
        self.state = self.system.step(self.state, self.system.combine(self.state, answers))
        self.version += 1


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


# The estimator


def test_estimates_turn_towards_the_gradient_as_directions_are_added() -> None:
    size = 300
    gradient = direction(5, (size,))
    weights = {"w": nn.Parameter(torch.zeros(size), requires_grad=False)}
    total, cosines = torch.zeros(size), {}
    for sample in range(1, 3001):
        slope, _ = two_point(lambda: gradient @ weights["w"], weights, 1000 * sample, 1e-2)
        total += slope * direction(1000 * sample, (size,))
        if sample in (30, 300, 3000):
            cosines[sample] = cosine({"w": total}, {"w": gradient})
    for count, found in cosines.items():
        assert found == pytest.approx(math.sqrt(count / (count + size + 1)), rel=0.1)
    # Without bias: the mean estimate has the gradient's length, not only its direction.
    assert float(total @ gradient) / 3000 == pytest.approx(float(gradient @ gradient), rel=0.1)


def test_a_slope_is_exact_on_a_parabola_and_wrong_by_the_square_of_the_step_on_a_cubic() -> None:
    weights = {"w": nn.Parameter(torch.full((1,), 0.5, dtype=torch.float64), requires_grad=False)}
    z = float(direction(3, (1,)))
    parabola, _ = two_point(lambda: weights["w"].square().sum(), weights, 3, 0.1)
    assert parabola == pytest.approx(2 * 0.5 * z)
    errors = [two_point(lambda: weights["w"].pow(3).sum(), weights, 3, step)[0] - 0.75 * z for step in (0.1, 0.2)]
    assert errors[1] == pytest.approx(4 * errors[0], rel=1e-3)


def test_a_two_point_estimate_keeps_no_copy_of_the_model() -> None:
    shapes = [(40, 50)] * 12
    weights = {str(i): nn.Parameter(torch.ones(shape), requires_grad=False) for i, shape in enumerate(shapes)}
    before = {name: weight.clone() for name, weight in weights.items()}
    peak = peak_bytes(lambda: two_point(lambda: weights["0"].sum(), weights, 7, 1e-3))
    assert peak <= 2 * 40 * 50 * 4
    for name, weight in weights.items():
        torch.testing.assert_close(weight.data, before[name], rtol=1e-6, atol=1e-6)


def test_a_forward_step_takes_the_memory_of_inference(lab: Laboratory) -> None:
    recipe = lab.recipe("fedmezo", {**SMALL, **FORWARD, "data.max_length": 96, "training.batch_size": 8})
    estimated, exact, inference = step_bytes(lab, recipe)
    assert estimated <= 1.1 * inference < exact


# FedKSeed


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


# FedMeZO


def test_without_a_signal_or_with_one_party_fedmezo_is_fedavg_to_the_bit(lab: Laboratory) -> None:
    start = {**SMALL, **FORWARD}
    plain = lab.run(lab.recipe("fedavg", start)).state.shared
    assert same(plain, lab.run(lab.recipe("fedmezo", {**start, "knobs": {"signal": "none"}})).state.shared)
    assert not same(plain, lab.run(lab.recipe("fedmezo", start)).state.shared)
    one = {**start, "data.count": 1}
    assert same(lab.run(lab.recipe("fedavg", one)).state.shared, lab.run(lab.recipe("fedmezo", one)).state.shared)


def test_the_party_farthest_from_the_mean_change_has_the_longest_steps() -> None:
    changes = {node: {"a": torch.full((4,), float(size)), "b": torch.zeros(2)} for node, size in enumerate([0, 1, 5])}
    found = differences(changes)
    assert found == pytest.approx({0: 4.0, 1: 2.0, 2: 6.0})
    assert deviations(found) == pytest.approx({"0": 0.0, "1": -1.0, "2": 1.0})
    assert deviations({0: 2.0, 1: 2.0}) == {"0": 0.0, "1": 0.0}


def test_losses_set_rates_only_once_a_window_of_rounds_is_known() -> None:
    knobs = {"signal": "loss", "window": 2}
    system = load_system(Recipe(system="fedmezo").replace({**FORWARD, "knobs": knobs}))
    state = State(shared={"w": torch.zeros(3)})
    for losses, phi in (((1.0, 3.0), {}), ((2.0, 2.0), {"0": -1.0, "1": 1.0}), ((9.0, 1.0), {"0": 1.0, "1": -1.0})):
        answers = [
            Answer(node, Parcel("answer", {"loss": loss}, {"update/w": torch.ones(3)}), 1, 0, 1.0)
            for node, loss in enumerate(losses)
        ]
        state = system.step(state, system.combine(state, answers))
        assert state.facts["phi"] == phi
    assert system.brief(state, 0).header["phi"] == 1.0


def test_fedmezo_refuses_back_propagation() -> None:
    with pytest.raises(RecipeError, match=r"training\.gradient"):
        load_system(Recipe(system="fedmezo"))


# Ferret


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


# FedCyBGD


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


def test_pools_of_one_recipe_begin_alike() -> None:
    assert pool_of(Recipe(), 64)[:16] == pool_of(Recipe(), 16)
    assert pool_of(Recipe(seed=2), 16) != pool_of(Recipe(), 16)
