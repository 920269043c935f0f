"""Guards around whole rounds: hidden sums are plain sums, noise is what it says, and unsound pairings are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mycel.engines.leaving import Leaving
from mycel.errors import EngineError, RecipeError
from mycel.guard.accounting import Releases, epsilon
from mycel.recipe import load_recipe
from mycel.recipe.schema import Recipe
from mycel.rounds.coordinator import Coordinator
from mycel.rounds.hidden_sums import beside_plain_sums, plain_sums
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.registry import load_system
from mycel.rounds.simulation import Finished, Simulation
from rounds_by_hand import SMALL, same

FIVE: dict[str, Any] = {**SMALL, "data.count": 5, "rounds.local_steps": 1, "rounds.quorum": 0.6, "guard.staying": 0.6}
MASKED: dict[str, Any] = {**FIVE, "wire.codec": "fixed(8,0.05)", "guard.sums": "masked"}
USER: dict[str, Any] = {**FIVE, "guard.private": "user", "guard.clip_norm": 0.5, "guard.replayable": True}


def run_leaving(lab: Laboratory, recipe: Recipe, leaves: Callable[[int, str, int], bool]) -> Finished:
    world = lab.world(recipe)
    return Simulation(lab.arm(), world, Leaving(lab.place.labour, leaves)).run()


def run(lab: Laboratory, recipe: Recipe, gone: set[tuple[int, str]], seen: list[set[int]] | None = None) -> Finished:
    world = lab.world(recipe)
    labour = Leaving(lab.place.labour, lambda node, kind, version: (node, kind) in gone)

    def watch(coordinator: Coordinator) -> None:
        if seen is not None and coordinator.latest:
            seen.append({answer.node for answer in coordinator.latest})

    return Simulation(f"claim-{lab._count}", world, labour, checkpoint=watch).run()


@pytest.mark.parametrize("system", ["fedavg", "ffa_lora"])
@pytest.mark.parametrize("sums", ["masked", "sparsely-masked"])
@pytest.mark.parametrize("gone", [set(), {(1, "work"), (3, "guard.reveal")}, {(0, "guard.keys"), (4, "guard.shares")}])
def test_a_masked_run_ends_where_plain_fixed_point_sums_do(
    lab: Laboratory, system: str, sums: str, gone: set[tuple[int, str]]
) -> None:
    recipe = Recipe(system=system).replace({"model.base": "micro", **MASKED, "guard.sums": sums})
    answered: list[set[int]] = []
    finished = run(lab, recipe, gone, answered)
    plain = plain_sums(lab.world(recipe), answered)
    assert same(finished.state.shared, plain.shared)
    assert len(answered) == 2
    assert all(nodes == set(range(5)) - {node for node, kind in gone if kind != "guard.reveal"} for nodes in answered)
    assert finished.meter.total("up", purpose="guard") > 0


def test_products_of_unlike_ranks_add_up_under_masks(lab: Laboratory) -> None:
    """What FLoRA's stack comes to is a sum: to the bit, at ranks 1 to 4, with a party leaving at either end."""
    changes = {"model.base": "micro", **MASKED, "trainable.rank": [1, 2, 4], "guard.sums": "sparsely-masked"}
    gone = {(1, "work"), (3, "guard.reveal")}
    finished, answered, equal = beside_plain_sums(
        lab, Recipe(system="masked_flora").replace(changes), lambda node, kind, version: (node, kind) in gone
    )
    assert equal
    assert answered == [{0, 2, 3, 4}] * 2
    assert any(bool(delta.any()) for delta in finished.state.base.values())


def test_a_round_that_cannot_be_opened_is_repeated_and_at_last_given_up(lab: Laboratory) -> None:
    recipe = Recipe().replace({"model.base": "micro", **MASKED})
    tries: list[int] = []

    def leaves(node: int, kind: str, version: int) -> bool:
        if kind == "guard.reveal" and node == 0:
            tries.append(node)
        return kind == "guard.reveal" and node < 3 and len(tries) <= 1

    finished = Simulation("claim-x", _open(lab, recipe), Leaving(lab.place.labour, leaves)).run()
    assert finished.progress.drops["abandoned"] == 1
    assert finished.progress.version == 2
    with pytest.raises(EngineError, match="abandoned 8 times"):
        Simulation(
            "claim-x", _open(lab, recipe), Leaving(lab.place.labour, lambda node, kind, version: kind == "guard.keys")
        ).run()


def test_the_privacy_of_a_round_that_had_to_be_repeated_is_spent(lab: Laboratory) -> None:
    """Work that was asked for and thrown away has left a party all the same: it counts."""
    changes = {"model.base": "micro", **MASKED, "guard.private": "local", "guard.noise": 5.0, "guard.clip_norm": 0.5}
    tries: list[int] = []

    def leaves(node: int, kind: str, version: int) -> bool:
        tries.extend([node] if kind == "guard.reveal" and node == 0 else [])
        return kind == "guard.reveal" and node < 3 and len(tries) <= 1

    finished = run_leaving(lab, Recipe().replace(changes), leaves)
    assert finished.progress.drops["abandoned"] == 1
    assert set(finished.guard["epsilon_per_party"].values()) == {epsilon([Releases(5.0, 1.0, 3)], 1e-5)}


def test_a_clock_that_is_wrong_changes_nothing(lab: Laboratory) -> None:
    """Leases are lengths of time: with a node that falls silent they end alike on a clock that is decades ahead."""
    recipe = Recipe().replace({"model.base": "micro", **MASKED})
    ends = []
    for clock in (0.0, 1e9):
        world = lab.world(recipe)
        labour = Leaving(lab.place.labour, lambda node, kind, version: (node, kind) == (4, "work"))
        ends.append(Simulation(lab.arm(), world, labour).run(clock=clock))
    right, wrong = ends
    assert wrong.state.sha256() == right.state.sha256()
    assert wrong.progress.drops == right.progress.drops
    assert wrong.virtual_seconds - 1e9 == pytest.approx(right.virtual_seconds, abs=1e-3)


def test_a_share_of_parties_beyond_all_of_them_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"guard\.staying"):
        load_recipe("quickstart", ["guard.staying=1.2"])


def _open(lab: Laboratory, recipe: Recipe) -> Any:
    world = lab.world(recipe)
    lab.place.open("claim-x", recipe, world.base.folder, lab._tokens(recipe, world.base.folder))
    return world


def test_what_arrives_under_masks_is_not_the_update(lab: Laboratory) -> None:
    recipe = Recipe().replace({"model.base": "micro", **MASKED})
    found: list[torch.Tensor] = []

    def watch(coordinator: Coordinator) -> None:
        found.extend(answer.parcel.tensors["sealed/sum"].clone() for answer in coordinator.latest)

    lab.run(recipe, watch=watch)
    assert len(found) == 10
    for vector in found:  # levels of an 8-bit codec would all be small
        assert float((vector.double().abs() > 2**12).double().mean()) > 0.8


@pytest.mark.parametrize("sums", ["plain", "masked"])
def test_noise_of_user_privacy_is_what_is_stated(lab: Laboratory, sums: str) -> None:
    """Two runs differ only in their noise: their difference has its deviation, clipping bound over cohort times z."""
    hidden = {"wire.codec": "fixed(16,0.5)", "guard.sums": "masked"} if sums == "masked" else {}
    changes = {"model.base": "micro", **USER, **hidden, "rounds.count": 1, "guard.noise": 2.0}
    quiet = lab.run(Recipe().replace({**changes, "guard.noise": 1e-9}))
    noisy = lab.run(Recipe().replace(changes))
    gaps = torch.cat([(noisy.state.shared[name] - value).flatten() for name, value in quiet.state.shared.items()])
    assert float(gaps.double().std()) == pytest.approx(2.0 * 0.5 / 5, rel=0.05)
    again = lab.run(Recipe().replace(changes))
    assert same(noisy.state.shared, again.state.shared)
    secret = lab.run(Recipe().replace({**changes, "guard.replayable": False}))
    assert not same(noisy.state.shared, secret.state.shared)


def test_the_receipt_states_what_was_spent(lab: Laboratory) -> None:
    for private in ("user", "local", "example"):
        changes = {**USER, "guard.private": private, "guard.epsilon": 8.0, "rounds.evaluate_every": 9}
        finished = lab.run(Recipe().replace({"model.base": "micro", **changes}))
        receipt = finished.guard
        assert receipt["delta"] == 1e-5
        assert 7.5 < receipt["epsilon"] <= 8.0
    assert set(receipt["epsilon_per_party"]) == {node.name for node in finished.world.nodes}


def test_parties_asked_less_often_spend_less(lab: Laboratory) -> None:
    changes = {**USER, "guard.private": "local", "guard.noise": 5.0, "rounds.pace": "buffered(1)", "rounds.count": 4}
    spent = lab.run(Recipe().replace({"model.base": "micro", **changes})).guard["epsilon_per_party"]
    assert len(set(spent.values())) > 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guard.sums": "masked"}, ["guard.sums", "fixed(8,0.1)"]),
        ({"guard.sums": "masked", "wire.codec": "int8"}, ["int8", "do not add up"]),
        ({"guard.sums": "masked", "wire.codec": "fixed(8,0.1)", "rounds.pace": "buffered(2)"}, ["synchronous"]),
        ({"guard.sums": "masked", "wire.codec": "fixed(8,0.1)", "guard.filter": "median"}, ["hidden"]),
        ({"guard.sums": "masked", "wire.codec": "fixed(8,0.1)", "rounds.quorum": 0.5}, ["rounds.quorum"]),
        ({"guard.sums": "masked", "wire.codec": "fixed(8,0.1)", "trainable.rank": [2, 4]}, ["ranks"]),
        ({"system": "flora_stacking", "guard.sums": "masked", "wire.codec": "fixed(8,0.1)"}, ["masked_flora"]),
        ({"system": "masked_flora"}, ["guard.sums", "flora_stacking"]),
        ({"system": "flora_stacking", "guard.filter": "median"}, ["multi_krum"]),
        ({"guard.filter": "fltrust"}, ["guard.root"]),
        ({"guard.private": "user", "guard.epsilon": 0.0, "guard.clip_norm": 1.0}, ["guard.epsilon is 0.0"]),
        ({"guard.private": "user", "guard.epsilon": -2.0, "guard.clip_norm": 1.0}, ["guard.epsilon is -2.0"]),
        ({"guard.private": "local", "guard.noise": 1.0}, ["clip_norm"]),
        ({"guard.epsilon": 4.0}, ["guard.private"]),
        ({"system": "flasc", "wire.codec": "int8", "wire.error_feedback": True}, ["error_feedback"]),
        ({"threat.attack": "sign_flop"}, ["sign_flip"]),
    ],
)
def test_unsound_pairings_are_refused_with_a_sound_one(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_system(Recipe().replace(changes))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("spec", ["median", "multi_krum(0.3)", "geometric_median", "fltrust", "norm_bound(1.5)"])
def test_a_filter_keeps_a_loud_liar_from_the_model(lab: Laboratory, spec: str) -> None:
    base: dict[str, Any] = {"model.base": "micro", **FIVE, "rounds.count": 1}
    clean = lab.run(Recipe().replace(base))
    lie = {**base, "threat.attack": "scale(-30)", "threat.share": 0.2}
    open_, guarded = (
        lab.run(Recipe().replace({**lie, "guard.filter": chosen, "guard.root": root}))
        for chosen, root in (("", ""), (spec, "python-library"))
    )
    assert guarded.loss() < open_.loss()
    assert abs(guarded.loss() - clean.loss()) < abs(open_.loss() - clean.loss())
