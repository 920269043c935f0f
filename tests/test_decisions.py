"""Decisions keep their contract, and cost what the exact solver says is least, or nearly."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.decisions.collaboration import Devices, Lasting, Quickest, seconds_per_token, tokens_until_empty
from mycel.decisions.placement import Held, Neediest, Situation, served
from mycel.decisions.routing import Fastest, Offer, Wanted
from mycel.decisions.schedule import Cluster, ShortestCycle
from mycel.errors import EngineError
from mycel.serve.collm import exact as exact_shares
from mycel.serve.task_scheduling import cluster, exact
from mycel.testing import check_decision


def _wanted(source: random.Random) -> Wanted:
    depth = source.randint(1, 6)
    offers = []
    for index in range(source.randint(1, 5)):
        first = source.randrange(depth)
        last = source.randint(first + 1, depth)
        offers.append(Offer(f"peer-{index}", first, last, source.uniform(0.001, 0.01), source.uniform(0, 0.02)))
    offers.append(Offer("whole", 0, depth, source.uniform(0.001, 0.02), source.uniform(0, 0.05)))
    return Wanted(0, depth, tuple(offers))


def _least(wanted: Wanted, place: int = 0) -> float:
    if place == wanted.last:
        return 0.0
    return min(
        (
            offer.latency + (end - place) * offer.seconds + _least(wanted, end)
            for offer in wanted.offers
            if offer.first <= place < offer.last
            for end in range(place + 1, offer.last + 1)
        ),
        default=float("inf"),
    )


def test_routes_are_the_fastest_there_are() -> None:
    source = random.Random(1)
    check_decision(Fastest(), [_wanted(source) for _ in range(60)], _least)


def test_the_block_that_nobody_holds_is_named() -> None:
    offers = (Offer("a", 0, 3, 0.001, 0), Offer("b", 2, 4, 0.001, 0), Offer("c", 5, 8, 0.001, 0))
    with pytest.raises(EngineError, match="block 4"):
        Fastest().decide(Wanted(0, 8, offers))


def _situation(source: random.Random, now: bool) -> Situation:
    depth = source.randint(2, 8)
    others = tuple(
        Held(str(index), (first := source.randrange(depth)), source.randint(first + 1, depth), source.uniform(1, 9))
        for index in range(source.randint(0, 5))
    )
    room = source.randint(1, depth)
    return Situation(depth, room, source.uniform(1, 9), others, (0, room) if now else None)


def test_a_peer_that_joins_serves_the_scarcest_blocks_best() -> None:
    source = random.Random(2)

    def best(seen: Situation) -> float:
        return min(-served(seen, (first, first + seen.room))[0] for first in range(seen.depth - seen.room + 1))

    check_decision(Neediest(), [_situation(source, False) for _ in range(60)], best)


def test_a_peer_moves_for_a_fifth_more_and_not_for_less() -> None:
    source = random.Random(3)
    moved = 0
    for seen in [_situation(source, True) for _ in range(200)]:
        choice = Neediest().decide(seen)
        assert seen.now is not None
        if choice != seen.now:
            moved += 1
            assert served(seen, choice)[0] > 1.2 * served(seen, seen.now)[0]
        assert Neediest().decide(Situation(seen.depth, seen.room, seen.throughput, seen.others, choice)) == choice
    assert moved


def test_schedules_are_within_a_tenth_of_the_least() -> None:
    source = random.Random(4)
    check_decision(ShortestCycle(), [cluster(source, source.randint(2, 5), 6) for _ in range(20)], exact, slack=0.1)


def test_one_machine_that_holds_all_has_no_links() -> None:
    alone = Cluster(4, (4, 4), (0.001, 0.002), ((0, 9), (9, 0)))
    assert ShortestCycle().decide(alone) == ((0, 4),)
    with pytest.raises(EngineError, match="4 layers do not fit where 3 do"):
        ShortestCycle().decide(Cluster(4, (1, 2), (1, 1), ((0, 1), (1, 0))))


def _devices(source: random.Random, latency: float) -> Devices:
    count = source.randint(1, 3)
    speed = tuple(source.uniform(1e9, 4e9) for _ in range(count))
    return Devices(
        speed, (6,) * count, 6, 4, 1e8, 256, latency, 1e8, tuple(source.uniform(5, 9) for _ in speed), (0.01,) * count
    )


@pytest.mark.parametrize("latency", [0.0, 1e-4, 0.05])
def test_shares_of_devices_are_nearly_the_quickest(latency: float) -> None:
    source = random.Random(5)
    seen = [_devices(source, latency) for _ in range(30)]
    check_decision(Quickest(), seen, exact_shares, slack=0.35)
    check_decision(Lasting(), seen)
    if latency == 0.05:
        assert all(sum(map(bool, Quickest().decide(each))) == 1 for each in seen)


@given(st.integers(0, 10_000))
def test_lasting_shares_never_end_sooner(seed: int) -> None:
    seen = _devices(random.Random(seed), 1e-4)
    quick, lasting = Quickest().decide(seen), Lasting().decide(seen)
    assert seconds_per_token(seen, lasting) <= 1.2 * seconds_per_token(seen, quick) + 1e-12
    assert tokens_until_empty(seen, lasting) > 0
    assert list(itertools.accumulate(lasting))[-1] == seen.heads
