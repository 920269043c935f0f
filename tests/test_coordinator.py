"""The one loop: who is asked and when, when answers combine, and what is counted - on a model of three numbers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import pytest
import torch

from mycel.engines.engine import Request
from mycel.errors import EngineError
from mycel.fleet import Device, Fleet, Link, run_virtual
from mycel.rounds.deadline import Deadlines
from mycel.rounds.laboratory import Laboratory
from mycel.testing.engines import request
from mycel.wire.parcel import Parcel
from pulling import Bulky, Rig, closed_form, rig_over


@pytest.fixture
def rig(lab: Laboratory) -> Callable[..., Rig]:
    return rig_over(lab)


def test_synchronous_rounds_come_to_their_closed_form(rig: Callable[..., Rig]) -> None:
    federation = rig({})
    state = federation.run()
    assert torch.allclose(state.shared["w"], closed_form([range(6)] * 3))
    assert [event["round"] for event in federation.of("round")] == [1, 2, 3]
    assert federation.coordinator.progress.drops == {}
    assert federation.parties.briefs == dict.fromkeys(range(6), 4)  # three rounds and the delivery


def test_every_byte_of_the_log_is_on_the_meter_and_the_other_way_round(rig: Callable[..., Rig]) -> None:
    def spoil(node: int, answer: Parcel) -> Parcel:
        return Parcel("answer", answer.header, {"update/w": torch.full((3,), math.nan)}) if node == 2 else answer

    federation = rig({"fleet.devices": "flaky", "rounds.quorum": 0.5}, change=spoil)
    federation.run()
    meter = federation.coordinator.leases.meter
    sent_back = [*federation.of("answer"), *federation.of("drop")]
    assert meter.total("down") == sum(event["bytes"] for event in federation.of("ask")) > 0
    assert meter.total("up") == sum(event["bytes"] for event in sent_back) > 0
    assert {event["bytes"] for event in federation.of("drop", reason="lost")} <= {0}
    in_rounds = [entry["bytes_up"] for entry in federation.coordinator.progress.rounds]
    assert meter.total("up", purpose="deliver") <= meter.total("up") - sum(in_rounds)


@pytest.mark.parametrize("pace", ["synchronous", "buffered(2)", "sequential"])
def test_a_round_that_nobody_can_answer_ends_in_a_sentence(rig: Callable[..., Rig], pace: str) -> None:
    federation = rig({"rounds.pace": pace}, change=lambda node, answer: b"")
    with pytest.raises(EngineError, match=r"round 1 cannot go on: 6 of 6 answers were refused.*drop events say why"):
        federation.run()


def test_unreliable_devices_are_asked_again_and_every_round_reaches_its_quorum(rig: Callable[..., Rig]) -> None:
    federation = rig({"fleet.devices": "flaky", "rounds.quorum": 0.8, "rounds.count": 12})
    federation.run()
    progress = federation.coordinator.progress
    assert progress.version == 12
    assert progress.drops["lost"] > 0
    assert all(entry["answers"] >= 5 for entry in progress.rounds)  # 0.8 of six
    assert any(entry["answers"] == 5 for entry in progress.rounds)
    assert all(event["node"] in (1, 4) for event in federation.of("drop"))  # the sleepy ones


def test_with_a_full_quorum_everyone_is_waited_for(rig: Callable[..., Rig]) -> None:
    federation = rig({"fleet.devices": "flaky", "rounds.count": 8})
    state = federation.run()
    assert torch.allclose(state.shared["w"], closed_form([range(6)] * 8))
    assert federation.coordinator.progress.drops["lost"] > 0


def test_whoever_stays_silent_as_the_result_is_handed_over_is_asked_once_more(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = rig({"rounds.count": 1})
    handed: list[int] = []
    ask = federation.coordinator.engine.ask

    def lossy(request: Request) -> None:
        delivery = federation.coordinator.progress.version > 0
        handed.extend([request.node] * delivery)
        if not delivery or (request.node != 4 and (request.node != 1 or handed.count(1) == 2)):
            ask(request)

    monkeypatch.setattr(federation.coordinator.engine, "ask", lossy)
    federation.run()
    assert sorted(handed) == [0, 1, 1, 2, 3, 4, 4, 5]
    assert sorted(federation.coordinator.progress.scores[1]) == [0, 1, 2, 3, 5]
    assert [event["node"] for event in federation.of("drop", round=1)] == [1, 4, 4]


def test_whoever_is_past_a_deadline_is_not_waited_for_though_nobody_noticed_as_it_passed(
    rig: Callable[..., Rig],
) -> None:
    federation = rig({})
    leases = federation.coordinator.leases

    async def program() -> None:
        federation.coordinator.progress.state = federation.system.begin(federation.coordinator.world)
        for node in (0, 1):
            leases.grant(node, Parcel("work", {"version": 0}, {"shared/w": torch.zeros(3)}))
            leases.held[node].deadline = float(node)
        assert leases.next_deadline(each=False) == 1.0  # of those that are ahead
        await asyncio.sleep(2)
        assert leases.overdue
        assert leases.next_deadline() == leases.next_deadline(each=False) == leases.engine.now() == 2.0
        leases.held[1].deadline = None
        assert leases.next_deadline(each=False) is None  # nothing is known of how long it takes
        assert leases.next_deadline() == 2.0
        await leases.engine.close()

    run_virtual(program())


def thin_link(node: int, answer: Parcel) -> Parcel:
    """Send a hundred thousand numbers more over the last node's link than anyone could foresee."""
    extra = {"update/padding": torch.zeros(100_000)} if node == 5 else {}
    return Parcel("answer", answer.header, {**answer.tensors, **extra})


THIN = Fleet("thin", (*(Device(f"d{n}") for n in range(5)), Device("thin", link=Link(up_mbps=0.5))))


def test_answers_after_the_quorum_are_late_dropped_and_counted(rig: Callable[..., Rig]) -> None:
    federation = rig({"rounds.quorum": 0.5, "rounds.count": 40}, Bulky, THIN, thin_link)
    state = federation.run()
    late = federation.of("drop", reason="late")
    meter = federation.coordinator.leases.meter
    assert {event["node"] for event in late} == {5}
    assert meter.total("up", purpose="late") == sum(event["bytes"] for event in late) > 400_000
    assert federation.coordinator.progress.drops["late"] == len(late)
    answered = [[answer.node for answer in answers] for answers in federation.system.seen]
    assert [0, 1, 2, 3, 4] in answered
    assert torch.allclose(state.shared["w"], closed_form(answered), atol=1e-5)


def test_an_answer_of_an_older_generation_does_not_end_the_newer_lease(rig: Callable[..., Rig]) -> None:
    federation = rig({"rounds.count": 2}, Bulky, THIN, thin_link)
    state = federation.run()
    assert torch.allclose(state.shared["w"], closed_form([range(6)] * 2), atol=1e-6)
    asked = [event for event in federation.of("ask", round=0) if event["node"] == 5]
    late, lost = federation.of("drop", reason="late"), federation.of("drop", reason="lost")
    assert len(asked) > 1
    assert len(lost) >= len(asked) - 1 > 0
    assert late
    assert len(federation.of("answer", round=0, node=5)) == 1


def test_buffered_answers_are_discounted_by_the_versions_they_missed(rig: Callable[..., Rig]) -> None:
    federation = rig({"fleet.devices": "unequal", "rounds.pace": "buffered(1)", "rounds.count": 150})
    federation.run()
    answers = [answer for group_ in federation.system.seen for answer in group_]
    stale = {answer.node: answer.staleness for answer in answers}
    assert all(len(group_) == 1 for group_ in federation.system.seen)
    assert stale[3] > stale[0]  # the phone and the workstation
    for answer in answers:
        assert answer.weight == pytest.approx((answer.node + 1) * (1 + answer.staleness) ** -0.5)
    for version, (answer,) in enumerate(federation.system.seen):
        asked_at = federation.of("answer", node=answer.node)[0]["round"]
        assert asked_at <= version


def test_buffered_nodes_go_on_working_while_others_are_combined(rig: Callable[..., Rig]) -> None:
    federation = rig({"fleet.devices": "unequal", "rounds.pace": "buffered(2)", "rounds.count": 10})
    federation.run()
    assert {event["round"] for event in federation.of("drop")} <= {10}  # what was still out at the delivery
    versions = {(event["node"], event["round"]) for event in federation.of("answer")}
    asked = [(event["node"], event["round"]) for event in federation.of("ask")]
    assert len(asked) == len(set(asked))  # nobody is asked twice for one version
    assert len({version for node, version in versions if node == 3}) < len({v for node, v in versions if node == 0})


def test_sequential_visits_the_nodes_in_order_each_on_the_last_ones_result(rig: Callable[..., Rig]) -> None:
    federation = rig({"rounds.pace": "sequential", "rounds.count": 8, "fleet.devices": "flaky"})
    state = federation.run()
    order = [[answer.node for answer in answers] for answers in federation.system.seen]
    assert order == [[0], [1], [2], [3], [4], [5], [0], [1]]
    assert torch.allclose(state.shared["w"], closed_form(order))


def test_a_cohort_is_a_sample_of_its_size_that_the_seed_decides(rig: Callable[..., Rig]) -> None:
    def cohorts(seed: int) -> list[set[int]]:
        federation = rig({"rounds.cohort": 0.5, "rounds.count": 6, "seed": seed})
        federation.run()
        return [{answer.node for answer in answers} for answers in federation.system.seen]

    first = cohorts(1)
    assert [len(cohort) for cohort in first] == [3] * 6
    assert len({frozenset(cohort) for cohort in first}) > 1
    assert cohorts(1) == first != cohorts(2)


def test_evaluations_come_as_often_as_the_recipe_says(rig: Callable[..., Rig]) -> None:
    federation = rig({"rounds.evaluate_every": 2, "rounds.count": 4})
    federation.run()
    assert federation.coordinator.progress.loss(0) == pytest.approx(2.0)  # every party reports two nats per token
    assert federation.coordinator.progress.loss(1) is None
    assert federation.coordinator.progress.loss(2) == pytest.approx(2.0)
    assert federation.coordinator.progress.loss(3) is None
    assert federation.coordinator.progress.loss(4) == pytest.approx(2.0)


def test_a_deadline_is_what_was_predicted_until_a_node_has_shown_its_pace(rig: Callable[..., Rig]) -> None:
    engine = rig({}).coordinator.engine

    async def program() -> None:
        deadlines, patience = Deadlines(), 3.0
        asked = request(engine, 0, 1, b"x" * 1000, seconds=2.0)
        expected = engine.expected_seconds(asked)
        assert expected is not None
        assert deadlines.of(asked, engine, patience) == pytest.approx(expected * (1 + patience / 4))
        deadlines.lost(0)
        deadlines.lost(0)
        assert deadlines.of(asked, engine, patience) == pytest.approx(4 * expected * (1 + patience / 4))

    run_virtual(program())
