"""OpenFedLLM's seven rules against closed forms, FedBuff's staleness, and MIRA's Laplacian step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mycel.data.tokens import TokenTable
from mycel.errors import ParcelError, RecipeError
from mycel.finetune.mira import Mira, neighbours
from mycel.models.base import Base
from mycel.models.trainable import Trainable
from mycel.recipe.schema import Recipe
from mycel.rounds.checking import check_answer
from mycel.rounds.drift import Drift, agreement
from mycel.rounds.laboratory import Laboratory, Trail
from mycel.rounds.party import Party
from mycel.rounds.registry import load_system
from mycel.rounds.system import Answer, State
from mycel.testing import check_combine
from mycel.wire.algebra import add, group, norm, subtract, weighted_mean
from mycel.wire.parcel import Parcel, Tensors

Vector = NDArray[np.float64]

# A federation whose every round has a closed form: parties descend parabolas |w - target|^2 / 2 by plain gradient.
TARGETS = np.array([[1.0, -2.0, 0.5], [3.0, 0.25, -1.0], [-0.5, 1.0, 2.0]])
SAMPLES = np.array([2, 3, 7])
START = np.array([0.3, -0.7, 0.1])
RATE, STEPS, ROUNDS = 0.1, 4, 3


class Point(Trainable):
    """Three numbers in double precision."""

    kind = "point"

    def __init__(self) -> None:
        super().__init__(cast(Base, None))
        self.where = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def parameters(self) -> dict[str, nn.Parameter]:
        return {"w": self.where}

    def initial(self, seed: int) -> Tensors:
        return {"w": torch.tensor(START)}

    def delta_weight(self, state: Mapping[str, Tensor]) -> Tensors:
        return dict(state)

    def merge(self, state: Mapping[str, Tensor]) -> None:
        raise NotImplementedError

    @contextmanager
    def active(self) -> Iterator[None]:
        yield

    def save(self, folder: Path) -> None:
        raise NotImplementedError


def parabola_party(recipe: Recipe, node: int, version: int, personal: Tensors) -> Party:
    point, target = Point(), torch.tensor(TARGETS[node])

    def model(**batch: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(point.where - target).square().sum() / 2)

    base = Base(cast(Any, model), cast(Any, SimpleNamespace(pad_token_id=0)), Path(), "parabola")
    count = int(SAMPLES[node])
    tokens = torch.ones(2 * count, dtype=torch.int32)
    table = TokenTable(tokens, torch.arange(0, 2 * count + 1, 2), torch.ones(count, dtype=torch.int32), 0)
    return Party(node, version, recipe, base, table, lambda rank: point, personal)


def recipe_for(system: str, knobs: dict[str, Any] | None = None, changes: dict[str, Any] | None = None) -> Recipe:
    plain = {"training.optimizer": "sgd", "training.learning_rate": RATE, "training.clip_norm": 0.0}
    return Recipe(system=system, knobs=knobs or {}).replace({**plain, "rounds.local_steps": STEPS, **(changes or {})})


def trajectory(system: str, knobs: dict[str, Any] | None = None, nodes: Sequence[int] = (0, 1, 2)) -> list[State]:
    """Run a system's own five functions over the parabolas, all parties in every round."""
    recipe = recipe_for(system, knobs)
    rule = load_system(recipe)
    shared = {"w": torch.tensor(START)}
    zeros = {"w": torch.zeros(3, dtype=torch.float64)}
    state = State(shared, server=zeros, facts={"parties": len(nodes)}) if system == "scaffold" else State(shared)
    homes: dict[int, Tensors] = {node: {} for node in nodes}
    states = [state]
    for version in range(ROUNDS):
        answers = []
        for node in nodes:
            party = parabola_party(recipe, node, version, homes[node])
            parcel = rule.work(rule.brief(state, node), party)
            check_answer(rule, parcel)
            rule.inspect(state, node, parcel)
            homes[node] = party.personal
            answers.append(Answer(node, parcel, party.samples, 0, float(party.samples)))
        state = rule.step(state, rule.combine(state, answers))
        states.append(state)
    return states


def descend(start: Vector, target: Vector, mu: float = 0.0, correction: Vector | float = 0.0) -> Vector:
    where = start.copy()
    for _ in range(STEPS):
        where = where - RATE * ((where - target) + mu * (where - start) + correction)
    return where


def averaged(mu: float = 0.0, rate: float = 1.0) -> list[Vector]:
    states = [START]
    for _ in range(ROUNDS):
        now = states[-1]
        change = sum(n * (descend(now, t, mu) - now) for n, t in zip(SAMPLES, TARGETS, strict=True)) / SAMPLES.sum()
        states.append(now + rate * change)
    return states


def scaffolded() -> list[Vector]:
    states, common, own = [START], np.zeros(3), np.zeros((3, 3))
    for _ in range(ROUNDS):
        now, ends, renewed = states[-1], [], []
        for k, target in enumerate(TARGETS):
            ends.append(descend(now, target, correction=common - own[k]))
            renewed.append(own[k] - common + (now - ends[-1]) / (STEPS * RATE))
        states.append(now + sum(n * (end - now) for n, end in zip(SAMPLES, ends, strict=True)) / SAMPLES.sum())
        common = common + sum(new - old for new, old in zip(renewed, own, strict=True)) / 3
        own = np.array(renewed)
    return states


def momentum(beta: float) -> list[Vector]:
    states, velocity = [START], np.zeros(3)
    for index in range(ROUNDS):
        now = states[-1]
        change = sum(n * (descend(now, t) - now) for n, t in zip(SAMPLES, TARGETS, strict=True)) / SAMPLES.sum()
        velocity = change if index == 0 else beta * velocity + (1 - beta) * change
        states.append(now + velocity)
    return states


def adaptive(rule: str, eta: float, tau: float, beta1: float = 0.9, beta2: float = 0.99) -> list[Vector]:
    states, mean, square = [START], np.zeros(3), np.full(3, tau**2)
    for index in range(ROUNDS):
        now = states[-1]
        change = sum(descend(now, target) - now for target in TARGETS) / len(TARGETS)
        mean = change if index == 0 or rule == "fedadagrad" else beta1 * mean + (1 - beta1) * change
        if rule == "fedadagrad":
            square = square + mean**2
        elif rule == "fedyogi":
            square = square - (1 - beta2) * mean**2 * np.sign(square - mean**2)
        else:
            square = beta2 * square + (1 - beta2) * mean**2
        states.append(now + eta * mean / (np.sqrt(square) + tau))
    return states


ORACLES: list[tuple[str, dict[str, Any], Callable[[], list[Vector]]]] = [
    ("fedavg", {"server_rate": 0.7}, lambda: averaged(rate=0.7)),
    ("fedprox", {"mu": 0.4}, lambda: averaged(mu=0.4)),
    ("scaffold", {}, scaffolded),
    ("fedavgm", {"momentum": 0.6}, lambda: momentum(0.6)),
    ("fedadagrad", {"server_rate": 0.02}, lambda: adaptive("fedadagrad", 0.02, 1e-3)),
    ("fedyogi", {"tau": 0.3, "beta2": 0.5}, lambda: adaptive("fedyogi", 1e-3, 0.3, beta2=0.5)),
    ("fedadam", {"beta1": 0.5}, lambda: adaptive("fedadam", 1e-3, 1e-3, beta1=0.5)),
]


@pytest.mark.parametrize(("system", "knobs", "oracle"), ORACLES, ids=[row[0] for row in ORACLES])
def test_three_rounds_follow_the_closed_form(
    system: str, knobs: dict[str, Any], oracle: Callable[[], list[Vector]]
) -> None:
    found, wanted = trajectory(system, knobs), oracle()
    for state, expected in zip(found, wanted, strict=True):
        np.testing.assert_allclose(state.shared["w"].numpy(), expected, rtol=1e-9, atol=1e-12)
    assert not np.allclose(wanted[-1], averaged()[-1], rtol=1e-4), "the rule must differ from plain averaging"


@pytest.mark.parametrize(("system", "knobs"), [("fedprox", {"mu": 0.0}), ("fedavgm", {"momentum": 0.0})])
def test_special_settings_are_federated_averaging_to_the_bit(system: str, knobs: dict[str, Any]) -> None:
    for found, wanted in zip(trajectory(system, knobs), trajectory("fedavg"), strict=True):
        assert torch.equal(found.shared["w"], wanted.shared["w"])


def test_a_lonely_party_is_never_corrected() -> None:
    for found, wanted in zip(trajectory("scaffold", nodes=[1]), trajectory("fedavg", nodes=[1]), strict=True):
        torch.testing.assert_close(found.shared["w"], wanted.shared["w"], rtol=1e-12, atol=1e-14)


def random_answers(count: int, staleness: Sequence[int] = (), roles: Sequence[str] = ("update",)) -> list[Answer]:
    random = torch.Generator().manual_seed(5)
    answers = []
    for node in range(count):
        tensors = {f"{role}/{name}": torch.randn(4, generator=random) for role in roles for name in ("a", "b")}
        stale, samples = (staleness[node] if staleness else 0), 10 * (node + 1)
        weight = samples * (1 + stale) ** -0.5
        answers.append(Answer(node, Parcel("answer", {"samples": samples}, tensors), samples, stale, weight))
    return answers


def state_of_two(**others: Any) -> State:
    return State(shared={"a": torch.ones(4), "b": torch.zeros(4)}, **others)


@pytest.mark.parametrize("name", ["fedprox", "scaffold", "fedavgm", "fedadagrad", "fedyogi", "fedadam", "fedbuff"])
def test_the_laws_of_combining(name: str) -> None:
    system = load_system(recipe_for(name))
    zeros = {"a": torch.zeros(4), "b": torch.zeros(4)}
    scaffold = name == "scaffold"
    state = state_of_two(server=zeros, facts={"parties": 5}) if scaffold else state_of_two()
    answers = random_answers(3, roles=("update", "control") if scaffold else ("update",))
    # Rules that count parties alike ignore weights by design.
    check_combine(system, state, answers, shares=name in {"fedprox", "scaffold", "fedavgm"})


@pytest.mark.parametrize("name", ["fedadagrad", "fedyogi", "fedadam", "fedbuff"])
def test_rules_that_count_parties_alike_ignore_sample_counts(name: str) -> None:
    system, state, answers = load_system(recipe_for(name)), state_of_two(), random_answers(3)
    found = system.combine(state, answers).shared
    plain = weighted_mean([answer.tensors() for answer in answers], [1, 1, 1])
    assert norm(subtract(found, plain)) < 1e-6


@pytest.mark.parametrize(("name", "bound"), [("fedadagrad", 1.0), ("fedyogi", 10.0), ("fedadam", 10.0)])
def test_an_adaptive_step_is_bounded_and_blind_to_the_scale_of_changes(name: str, bound: float) -> None:
    rate = 1e-3
    system = load_system(recipe_for(name, {"server_rate": rate, "tau": 1e-9}))
    large, small = state_of_two(), state_of_two()
    for round_ in range(5):
        answers = random_answers(3)[round_ % 3 :]
        shrunk = [replace(answer, sent=_scaled(answer.parcel, 1e-3)) for answer in answers]
        before, large = large, system.step(large, system.combine(large, answers))
        small = system.step(small, system.combine(small, shrunk))
        moved_by = subtract(large.shared, before.shared)
        assert 0.1 * rate < max(float(tensor.abs().max()) for tensor in moved_by.values()) <= 1.001 * bound * rate
    assert norm(subtract(large.shared, small.shared)) < 1e-3 * norm(subtract(large.shared, state_of_two().shared))


def _scaled(parcel: Parcel, factor: float) -> Parcel:
    return Parcel(parcel.kind, parcel.header, {name: factor * tensor for name, tensor in parcel.tensors.items()})


def test_stale_changes_are_shortened_and_not_merely_outweighed() -> None:
    stale = random_answers(1, staleness=[3])
    system, plain = load_system(recipe_for("fedbuff")), load_system(recipe_for("fedavg"))
    change = stale[0].tensors()
    assert norm(system.combine(state_of_two(), stale).shared) == pytest.approx(norm(change) / 2, rel=1e-6)
    assert norm(plain.combine(state_of_two(), stale).shared) == pytest.approx(norm(change), rel=1e-6)


def test_fedbuff_needs_no_turn_taking() -> None:
    with pytest.raises(RecipeError, match="unsound for the system 'fedbuff'"):
        load_system(recipe_for("fedbuff", changes={"rounds.pace": "sequential"}))


# SCAFFOLD on a real model: what stays, what leaves, and what it weighs.

SMALL: dict[str, Any] = {
    "data.parties": "iid",
    "data.count": 3,
    "data.examples": 16,
    "data.held_out": 4,
    "data.max_length": 32,
    "rounds.count": 2,
    "rounds.local_steps": 2,
    "rounds.evaluate_every": 9,
    "trainable.rank": 2,
}


def test_the_common_control_variate_is_the_mean_of_what_parties_keep(lab: Laboratory) -> None:
    finished = lab.run(lab.recipe("scaffold", SMALL))
    kept = [group(Parcel.from_bytes(home).tensors, "personal/control") for home in finished.homes.values()]
    assert len(kept) == len(finished.world.nodes) == 3
    mean = weighted_mean(kept, [1] * len(kept))
    assert norm(mean) > 0.1
    assert norm(subtract(finished.state.server, mean)) < 1e-5 * norm(mean)


def test_the_first_round_is_federated_averaging_at_twice_the_traffic(lab: Laboratory) -> None:
    once = SMALL | {"rounds.count": 1, "trainable.rank": [2, 4]}
    plain, steered = lab.run(lab.recipe("fedavg", once)), lab.run(lab.recipe("scaffold", once))
    assert all(torch.equal(tensor, steered.state.shared[name]) for name, tensor in plain.state.shared.items())
    for node in (0, 1):
        size = 4 * plain.world.sizes[plain.world.nodes[node].rank]
        extra = steered.meter.total("up", node, "work") - plain.meter.total("up", node, "work")
        # Besides the values, a frame names every tensor and says where it lies.
        assert 0 < extra - size < 200 * len(plain.state.shared)


def test_a_control_variate_that_does_not_fit_is_refused() -> None:
    system = load_system(recipe_for("scaffold"))
    state = state_of_two(server={"a": torch.zeros(4), "b": torch.zeros(4)}, facts={"parties": 2})
    fitting = random_answers(1, roles=("update", "control"))[0].parcel
    system.inspect(state, 0, fitting)
    for change in ({"control/a": torch.zeros(5)}, {"control/c": torch.zeros(4)}):
        with pytest.raises(ParcelError, match=r"tensor '[ac]'"):
            system.inspect(state, 0, Parcel("answer", {}, fitting.tensors | change))
    with pytest.raises(ParcelError, match="role 'own'"):
        check_answer(system, Parcel("answer", {}, {"own/a": torch.zeros(4)}))


# MIRA


def mira(strength: float, graph: str = "complete") -> Mira:
    return cast(Mira, load_system(recipe_for("mira", {"strength": strength, "graph": graph})))


def apart(parties: int) -> State:
    random = torch.Generator().manual_seed(2)
    own = {node: {name: torch.randn(4, generator=random) for name in ("a", "b")} for node in range(parties)}
    return state_of_two(parties=own)


def moved(state: State, answers: Sequence[Answer]) -> list[Tensors]:
    return [add(state.parties[answer.node], answer.tensors()) for answer in answers]


def test_without_a_pull_mira_is_each_party_alone(lab: Laboratory) -> None:
    changes = SMALL
    tied = lab.run(lab.recipe("mira", {**changes, "knobs": {"strength": 0.0}}))
    alone = lab.run(lab.recipe("local", changes))
    assert set(tied.state.parties) == set(alone.state.parties) == {0, 1, 2}
    for node, own in alone.state.parties.items():
        assert all(torch.equal(tensor, tied.state.parties[node][name]) for name, tensor in own.items())


def test_the_full_pull_of_a_complete_graph_makes_every_state_the_mean() -> None:
    state, answers = apart(5), random_answers(5)
    system = mira(1 / 5)
    after = system.step(state, system.combine(state, answers))
    mean = weighted_mean(moved(state, answers), [1] * 5)
    for own in after.parties.values():
        assert norm(subtract(own, mean)) < 1e-6 * norm(mean)


@pytest.mark.parametrize("graph", ["complete", "ring", "blocks(2)"])
def test_the_step_is_that_of_the_laplacian(graph: str) -> None:
    state, answers, strength = apart(5), random_answers(5), 0.2
    system = mira(strength, graph)
    after = system.step(state, system.combine(state, answers))
    adjacency = np.array([[float(other in near) for other in range(5)] for near in neighbours(graph, 5)])
    assert np.array_equal(adjacency, adjacency.T)
    laplacian = np.diag(adjacency.sum(1)) - adjacency
    for name in ("a", "b"):
        before = np.stack([own[name].numpy() for own in moved(state, answers)])
        found = np.stack([after.parties[node][name].numpy() for node in range(5)])
        np.testing.assert_allclose(found, before - strength * laplacian @ before, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.mean(0), before.mean(0), atol=1e-6)


def test_who_does_not_answer_keeps_its_state() -> None:
    state, answers = apart(4), random_answers(4)[:3]
    system = mira(0.25)
    after = system.step(state, system.combine(state, answers))
    assert all(torch.equal(after.parties[3][name], tensor) for name, tensor in state.parties[3].items())
    mean = weighted_mean([*moved(state, answers), state.parties[3]], [1] * 4)
    assert norm(subtract(after.parties[0], mean)) < 1e-6 * norm(mean)


def test_mira_combines_lawfully() -> None:
    check_combine(mira(0.1), apart(3), random_answers(3), shares=False)


def test_graphs_have_the_neighbours_that_their_names_say() -> None:
    assert neighbours("complete", 3) == [[1, 2], [0, 2], [0, 1]]
    assert neighbours("ring", 4) == [[1, 3], [0, 2], [1, 3], [0, 2]]
    assert neighbours("ring", 2) == [[1], [0]]
    assert neighbours("blocks(2)", 5) == [[1, 2], [0, 2], [0, 1], [4], [3]]
    assert neighbours("blocks(3)", 3) == [[], [], []]
    assert neighbours("complete", 1) == neighbours("ring", 1) == [[]]
    for graph in ("blocks(0)", "blocks(4)", "star", "blocks(-1)", ""):
        with pytest.raises(RecipeError, match="'complete', 'ring' or 'blocks"):
            neighbours(graph, 3)


def test_an_unstable_pull_is_refused_before_work_starts(lab: Laboratory) -> None:
    world = lab.world(lab.recipe("mira", SMALL))
    with pytest.raises(RecipeError, match=r"knobs\.strength is 0\.51 and a party has 2 neighbours .* at most 0\.5"):
        mira(0.51).begin(world)
    assert len(mira(0.5).begin(world).parties) == 3
    assert len(mira(1.0, "blocks(2)").begin(world).parties) == 3


def test_mira_refuses_unlike_ranks() -> None:
    with pytest.raises(RecipeError, match="give all one rank"):
        load_system(recipe_for("mira", changes={"trainable.rank": [2, 4]}))


# What watches a run.


def test_watchers_see_every_round_once(lab: Laboratory) -> None:
    drift, trail = Drift(), Trail()

    def watch(coordinator: Any) -> None:
        drift(coordinator)
        trail(coordinator)

    finished = lab.run(lab.recipe("fedavg", SMALL), watch=watch)
    assert len(drift.agreements) == len(drift.lengths) == len(trail.steps()) == 2
    assert trail.moments[0] == 0.0 < trail.moments[1] < trail.moments[2] < finished.virtual_seconds
    assert all(torch.equal(tensor, finished.state.shared[name]) for name, tensor in trail.states[-1].shared.items())
    assert lab.mixture(finished, trail.states[-1]) == lab.mixture(finished)
    assert lab.mixture(finished, trail.states[0]) != lab.mixture(finished)


def test_agreement_is_the_mean_cosine_over_pairs() -> None:
    east, north = {"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}
    assert agreement([east]) == 1.0
    assert agreement([east, north, {"w": -east["w"]}]) == pytest.approx(-1 / 3)
