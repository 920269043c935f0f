"""Who computes what when ranks have died: every unit is held, by the best division there is, or it is said why not."""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.collectives.formation import Formation, Segment, even, restoration
from mycel.decisions.replicas import Machines, Mixed, every_placement, survival
from mycel.decisions.templates import Covering, Nodes, covers, divided, template, templates
from mycel.errors import EngineError, RecipeError
from mycel.pretrain.bamboo import Bamboo
from mycel.pretrain.oobleck import Oobleck, filled
from mycel.testing.decisions import check_decision


@given(st.data())
def test_the_newest_version_that_can_be_put_together_is_restored(data: st.DataObject) -> None:
    versions = st.sets(st.integers(0, 3))
    inventories = {
        member: {unit: data.draw(versions) for unit in range(3)} for member in range(data.draw(st.integers(1, 3)))
    }
    needs = {member: data.draw(st.sets(st.integers(0, 2))) for member in inventories}
    wanted = set().union(*needs.values())
    whole = [v for v in range(4) if all(any(v in held[u] for held in inventories.values()) for u in wanted)]
    if wanted and not whole:
        with pytest.raises(EngineError, match="is held by no rank that is left"):
            restoration(needs, inventories)
    elif wanted:
        version, transfers = restoration(needs, inventories)
        assert version == max(whole)
        arrived = {(transfer.target, transfer.unit) for transfer in transfers}
        assert len(arrived) == len(transfers)
        assert all(version in inventories[transfer.source][transfer.unit] for transfer in transfers)
        for member, units in needs.items():
            assert all((version in inventories[member][unit]) != ((member, unit) in arrived) for unit in units)


@given(st.integers(2, 5), st.lists(st.integers(0, 4), unique=True, max_size=4), st.integers(1, 2))
def test_formations_hold_every_unit_whoever_is_gone(size: int, gone: list[int], pipelines: int) -> None:
    epochs, units, pieces = [list(range(size))], 7, 6
    for member in gone:
        if member in epochs[-1] and len(epochs[-1]) > 1:
            epochs.append([other for other in epochs[-1] if other != member])
            for system in (Bamboo(units, pieces, pipelines), Oobleck((1.0,) * units, pieces, 1, min(1, size - 1))):
                formation = system.formation(epochs)
                formation.check(units, pieces)
                assert set(formation.needs()) <= set(epochs[-1])
    bamboo = Bamboo(units, pieces).formation(epochs)
    twice = [unit for shadow in bamboo.shadows for unit in shadow.units]
    assert sorted(twice) == (list(range(units)) if len(epochs[-1]) > 1 else [])


def test_a_pipeline_with_more_ranks_than_units_lets_the_last_ones_wait() -> None:
    oobleck = Oobleck((0.5, 1.0, 1.0, 1.0, 1.0, 0.5), 8, least=4, faults=1)
    epochs = [list(range(8)), [0, 2, 3, 4, 5, 6, 7]]
    formation = oobleck.formation(epochs)
    formation.check(6, 8)
    [waits] = set(epochs[-1]) - set(formation.needs())
    next_epoch = [member for member in epochs[-1] if member != formation.pipelines[0][0].member]
    assert waits in oobleck.formation([*epochs, next_epoch]).needs()


def test_a_formation_that_misses_something_is_refused() -> None:
    with pytest.raises(RecipeError, match="not every one of 3 units"):
        Formation(((Segment(0, 0, 2),),), ((0,),)).check(3, 1)
    with pytest.raises(RecipeError, match="not each of 2 once"):
        Formation(((Segment(0, 0, 3),),), ((0,),)).check(3, 2)
    with pytest.raises(RecipeError, match="at most one rank for each block"):
        even(4, range(3))
    with pytest.raises(EngineError, match="the model needs 3"):
        filled([[1], [2]], 3)


def test_templates_and_their_cover_are_the_best_of_all() -> None:
    chance = random.Random(4)
    for _ in range(40):
        costs = [chance.uniform(0.2, 2) for _ in range(chance.randint(2, 7))]
        nodes = chance.randint(1, len(costs))
        slowest = min(
            max(sum(costs[a:b]) for a, b in zip((0, *cuts), (*cuts, len(costs)), strict=True))
            for cuts in combinations(range(1, len(costs)), nodes - 1)
        )
        assert template(costs, nodes).slowest == pytest.approx(slowest)
    known = tuple(templates([1.0] * 8, 2, 6).items())
    cases = [Nodes(count, known, pieces, faults) for count in (4, 6, 9) for pieces in (4, 8) for faults in (0, 1)]

    def exact(nodes: Nodes) -> float:
        sound = [cover for cover in covers(nodes) if not Covering().fault(nodes, cover)]
        held = [[dict(nodes.known)[size] for size in cover] for cover in sound]
        return min(_best_division(each, nodes.pieces) for each in held)

    check_decision(Covering(), cases, exact)
    with pytest.raises(EngineError, match="cannot make 3 pipelines"):
        Covering().decide(Nodes(4, known, 8, 2))


def _best_division(held: list[Any], pieces: int) -> float:
    cuts = combinations(range(1, pieces), len(held) - 1)
    counts = [[b - a for a, b in zip((0, *cut), (*cut, pieces), strict=True)] for cut in cuts]
    best: float = min(max(each.seconds(count) for each, count in zip(held, way, strict=True)) for way in counts)
    assert max(each.seconds(count) for each, count in zip(held, divided(held, pieces), strict=True)) == best
    return best


@pytest.mark.parametrize("machines", [Machines(4, 2, 2), Machines(5, 2, 2), Machines(3, 2, 1), Machines(6, 2, 2)])
def test_no_placement_of_copies_survives_more_than_groups_do(machines: Machines) -> None:
    placements = every_placement(machines) if machines.count < 6 else []
    best = min((Mixed().cost(machines, placement) for placement in placements), default=0.2)
    found = Mixed().cost(machines, Mixed().decide(machines))
    assert not Mixed().fault(machines, Mixed().decide(machines))
    assert found == pytest.approx(best) if machines.count % machines.copies == 0 else found <= best + 0.1
    assert survival(Mixed().decide(machines), machines.copies - 1) == 1.0


def test_more_copies_than_machines_are_refused() -> None:
    with pytest.raises(RecipeError, match="3 copies are to lie on 2 machines"):
        Mixed().decide(Machines(2, 3))
