"""Clouds of unlike speed, price and worth: the cheapest meeting, steps by speed, weights by quality."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from mycel.decisions.clouds import Cheapest, Cloud, Market, Meeting, egress, meetings, rounds, seconds, shared_steps
from mycel.errors import RecipeError
from mycel.pretrain.cross_cloud import worths
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.system import Answer
from mycel.testing import check_combine, check_decision
from rounds_by_hand import Play
from small_islands import recipe
from test_systems_islands import distance


def market(chance: random.Random) -> Market:
    held = tuple(
        Cloud(
            str(i),
            chance.uniform(1, 4),
            chance.uniform(1, 4),
            chance.choice([0.0, 0.02, 0.12]),
            chance.uniform(1e8, 1e9),
        )
        for i in range(chance.randint(1, 4))
    )
    steps = chance.randint(1_000, 90_000)
    slack = chance.uniform(1.3, 3)
    return Market(held, steps, 1e9, 2e9, (8, 64, 512), slack * steps / max(cloud.speed for cloud in held))


def test_the_cheapest_meeting_keeps_the_deadline_and_nothing_timely_costs_less() -> None:
    chance, plan = random.Random(8), Cheapest()

    def best(seen: Market) -> float:
        return min(plan.cost(seen, each) for each in meetings(seen) if not plan.fault(seen, each))

    seen = [market(chance) for _ in range(40)]
    check_decision(plan, seen, best)
    with pytest.raises(RecipeError, match="the fastest plan takes"):
        plan.decide(replace(seen[0], deadline=1.0))


def test_egress_is_paid_by_who_sends() -> None:
    clouds = (Cloud("a", 1, 1, 0.1, 1e9), Cloud("b", 1, 1, 0.0, 1e9))
    seen = Market(clouds, 100, float(1 << 30), float(2 << 30), (10,), 1e9)
    assert egress(seen, Meeting((0, 1), 0, 10)) == pytest.approx(0.2)  # a sends the weights
    assert egress(seen, Meeting((0, 1), 1, 10)) == pytest.approx(0.1)  # a sends its change
    assert rounds(seen, Meeting((0, 1), 1, 10)) == 5
    assert rounds(seen, Meeting((0,), 0, 10)) == 0
    assert seconds(seen, Meeting((0,), 0, 10)) == 100


def test_equal_quality_is_federated_averaging_and_steps_follow_speed() -> None:
    assert worths([2.0, 2.0, 2.0], 0.05) == [1.0, 1.0, 1.0]
    found = worths([2.0, 2.1, 5.0], 0.05)
    assert found[0] == 1.0 > found[1] > 0.8 > 0.2 > found[2]
    assert shared_steps([1.0, 2.0, 4.0], 7) == [3, 6, 12]
    assert min(shared_steps([1e-9, 1.0], 1)) == 1


@pytest.mark.parametrize("aggregation", ["fedavg", "gradient"])
def test_equal_clouds_are_islands_that_average(lab: Laboratory, aggregation: str) -> None:
    same = {"fleet.devices": "equal", "rounds.count": 2}
    plain = lab.run(recipe(lab, "diloco", {**same, "knobs": {"outer_rate": 1.0, "outer_momentum": 0.0}}))
    clouds = lab.run(recipe(lab, "cross_cloud", {**same, "knobs": {"aggregation": aggregation}}))
    assert distance(clouds.state.shared, plain.state.shared) < 1e-6
    assert sum(clouds.state.facts["shares"].values()) == pytest.approx(1)


def test_clouds_combine_in_any_order_and_work_by_their_speed(lab: Laboratory) -> None:
    play = Play(lab, recipe(lab, "cross_cloud", {"rounds.local_steps": 6}))
    steps = play.state.facts["steps"]
    assert sum(steps) == pytest.approx(18, abs=1)
    assert steps == sorted(steps, reverse=True)
    answers = [Answer(node, play.work(node), 10 + node, 0, 10.0 + node) for node in range(3)]
    check_combine(play.system, play.state, answers, shares=False)
