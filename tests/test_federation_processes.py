"""A federation of real processes and sockets on the loopback: what it comes to, and what it survives."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from cutting_line import ENDED, KINDS, WAYS, cutting_line
from thin_line import thin_line
from villages import PATIENT, RECIPE, Operator, answered, go, in_the_middle_of, lost, peak_of, rounds, slowed

pytest.importorskip("flwr", reason="the federation extra is not installed")

import hostile_parties
from dying_runs import KILLED, Point, nursery
from hostile_parties import Robbed, rob
from mycel.data.parties import PartyData, load_parties
from mycel.engines import children
from mycel.federation.demo import Village, village
from mycel.federation.keyring import Keyring
from mycel.recipe import load_recipe
from mycel.run.execute import run_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def operator(made: Village, tmp_path_factory: pytest.TempPathFactory) -> Operator:
    folder = tmp_path_factory.mktemp("elsewhere")
    Keyring(made.folder / "keys").add_operator("anna").rename(folder / "anna.pem")
    return Operator(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Village]:
    recipe = load_recipe("quickstart", RECIPE)
    parties: list[PartyData] = load_parties(recipe.data, recipe.seed)
    with village(tmp_path_factory.mktemp("v"), parties) as started:
        yield started


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    recipe = load_recipe("quickstart", [*RECIPE, "engine.workers=0"])
    return run_recipe(recipe, tmp_path_factory.mktemp("reference") / "run")


def test_three_nodes_come_to_the_state_of_one_process_for_an_operator_elsewhere(
    made: Village, operator: Operator, reference: dict[str, Any]
) -> None:
    arms = "compare=['local', 'centralised']"  # what a federation cannot do, and says
    there = ("--on", made.address, "--out", "run", "--key", "anna.pem", "--json")
    status, said = operator.ask("run", "quickstart", *RECIPE, PATIENT, arms, *there)
    assert status == 0, said
    result = json.loads(said)
    assert result["state_sha256"] == reference["state_sha256"]
    assert result["bytes"]["by_purpose"] == reference["bytes"]["by_purpose"]
    assert [entry["loss"] for entry in result["rounds"]] == [entry["loss"] for entry in reference["rounds"]]
    assert result["dropped"] == {"late": 0, "invalid": 0, "lost": 0}
    assert "Not compared with local, centralised" in result["left_out"]
    assert "Not compared with local, centralised" in (operator.folder / "run" / "report.html").read_text()
    time.sleep(1.5)  # the gate writes its ledger once a second
    status, said = operator.ask("status", made.address, "--key", "anna.pem", "--json")
    assert status == 0, said
    found = json.loads(said)
    assert found["secure"]
    assert found["parties"] == ["party-0", "party-1", "party-2"]
    assert found["run"]["round"] == found["run"]["rounds"] == 3
    for name, counted in result["bytes"]["per_party"].items():
        gate = found["gate"]["traffic"][name]
        for way, side in (("up", "received"), ("down", "sent")):
            assert counted[way] <= gate[side]["parcels"] <= 1.05 * counted[way], (name, way)


def test_masked_sums_over_sockets_come_to_the_state_of_one_process(made: Village, tmp_path: Path) -> None:
    """The guard's messages are ordinary requests here too: keys, shares and opened shares of three parties."""
    masked = ['wire.codec="fixed(8,0.05)"', 'guard.sums="masked"', "rounds.count=2", "trainable.rank=4"]
    here = run_recipe(load_recipe("quickstart", [*RECIPE, *masked, "engine.workers=0"]), tmp_path / "here")
    there = go(made, tmp_path / "there", PATIENT, *masked).finish()
    assert there["state_sha256"] == here["state_sha256"]
    assert there["bytes"]["by_purpose"]["guard"]["up"] == here["bytes"]["by_purpose"]["guard"]["up"] > 0
    assert there["audit"] == here["audit"]
    assert "sealed/sum" in there["audit"]["tensors"]


def test_an_operator_elsewhere_needs_a_key_of_its_own(made: Village, operator: Operator) -> None:
    keys = made.folder / "keys"
    stranger = Keyring.make(operator.folder / "other", ["127.0.0.1"], []).add_operator("anna")
    expected = {
        (): "reach one on another machine with an operator's key",
        ("--key", str(keys / "parties" / "party-0.pem")): "not, or no longer, an operator's",
        ("--key", str(stranger)): "do not know each other",
    }
    for options, words in expected.items():
        status, said = operator.ask("status", made.address, *options)
        assert (status, words in said) == (1, True), said
    Keyring(keys).add_operator("bert").rename(operator.folder / "bert.pem")
    Keyring(keys).revoke("bert")
    status, said = operator.ask("status", made.address, "--key", "bert.pem")
    assert (status, "no longer, an operator's" in said) == (1, True), said


@pytest.fixture(scope="module")
def robbed(made: Village, tmp_path_factory: pytest.TempPathFactory) -> Robbed:
    return rob(made, tmp_path_factory.mktemp("robbed") / "run")


def test_a_party_cannot_touch_anothers_messages(made: Village, robbed: Robbed, reference: dict[str, Any]) -> None:
    assert robbed.past_the_gate[0] == 200, "what follows is the gate's doing: Flower gives a message to whoever asks"
    assert robbed.through_the_gate.pop("its next message")[0] == 401  # this one Flower refuses
    assert {status for status, _ in robbed.through_the_gate.values()} == {403}
    said = {what: words.decode() for what, (_, words) in robbed.through_the_gate.items()}
    assert said["a part of it"] == said["the message"] == "the object is another's"
    assert said["to answer it"] == "the answer is to no message of this party's"
    assert robbed.result["state_sha256"] == reference["state_sha256"]
    assert robbed.result["dropped"]["invalid"] == 0


def test_a_party_whose_answers_are_poison_is_counted_and_memory_stays_bounded(
    made: Village, robbed: Robbed, tmp_path: Path
) -> None:
    assert made.coordinator is not None
    hub = psutil.Process(made.coordinator.pid)
    servers = [hub.pid, *(child.pid for child in hub.children())]
    before = {pid: peak_of(pid) for pid in servers}
    made.leave("party-2")
    program = [sys.executable, str(Path(hostile_parties.__file__)), made.address]
    key = made.folder / "keys" / "parties" / "party-2.pem"
    made.parties["party-2"] = children.start([*program, str(key)], made.environment, tmp_path / "log", signal.SIGTERM)
    try:
        going = go(made, tmp_path / "run", PATIENT)
        result = going.finish()
    finally:
        made.leave("party-2")
        made.join("party-2")
    assert result["dropped"]["invalid"] == len(hostile_parties.ANSWERS) == 4
    assert [entry["answers"] for entry in result["rounds"]] == [2] * 3
    details = [event["detail"] for event in going.events() if event["event"] == "drop"]
    assert any("claims 1099511627776 bytes" in detail for detail in details), details
    assert going.peak < robbed.peak + 100e6
    for pid in servers:
        assert peak_of(pid) < before[pid] + 100e6


def test_a_run_whose_coordinator_dies_ends_as_if_it_had_not(
    made: Village, reference: dict[str, Any], tmp_path: Path
) -> None:
    going = go(made, tmp_path / "run")
    going.until(in_the_middle_of(2))
    going.process.kill()
    going.process.wait()
    assert rounds(going.events()) == 1
    going = go(made, tmp_path / "run", "--resume")
    going.until(in_the_middle_of(3))
    assert made.coordinator is not None
    (link,) = [
        child for child in psutil.Process(made.coordinator.pid).children() if "flower-superlink" in child.cmdline()[1]
    ]
    os.kill(link.pid, signal.SIGKILL)
    assert going.process.wait() == 1
    assert "--resume" in going.words()
    result = go(made, tmp_path / "run", "--resume").finish()
    assert result["state_sha256"] == reference["state_sha256"]
    assert [entry["loss"] for entry in result["rounds"]] == [entry["loss"] for entry in reference["rounds"]]
    assert [event["round"] for event in going.events() if event["event"] == "round"] == [1, 2, 3]


def test_a_coordinator_killed_before_a_checkpoint_and_in_delivery_loses_nothing(
    made: Village, reference: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with nursery(made.environment, tmp_path / "words") as place:
        for number, point in enumerate((Point("round", 1), Point("answer", 3))):
            assert place.piece(RECIPE, out, point, resume=number > 0, on=made.address) == KILLED, point
        ended = place.piece(RECIPE, out, None, resume=True, on=made.address)
    assert ended == 0, (tmp_path / "words").read_text()
    result = json.loads((out / "result.json").read_text())
    assert result["state_sha256"] == reference["state_sha256"]
    assert [entry["loss"] for entry in result["rounds"]] == [entry["loss"] for entry in reference["rounds"]]
    assert result["dropped"]["invalid"] == 0  # a brief that a killed run took along is lost, and sent again


def test_over_a_bad_network_that_cuts_every_kind_of_message_the_state_is_the_same(
    made: Village, reference: dict[str, Any], tmp_path: Path
) -> None:
    # A line of our own making: namespaces with netem need a kernel module that few containers have.
    host, _, port = made.address.rpartition(":")
    due = {(kind, way) for kind in KINDS for way in WAYS}
    keys = made.folder / "keys"
    with ExitStack() as lines:
        line = lines.enter_context(thin_line((host, int(port)), delay=0.1, rate=10e6 / 8, loss=0.01))
        for name in list(made.parties):
            made.leave(name)
            own = lines.enter_context(cutting_line((host, line.port), keys, name, due))
            made.join(name, through=f"{host}:{own}")
            lines.callback(made.join, name)
            lines.callback(made.leave, name)
        going = go(made, tmp_path / "run")
        result = going.finish()
        assert line.stalls > 0
        assert line.passed > result["bytes"]["up"] + result["bytes"]["down"]
    assert not due
    assert result["state_sha256"] == reference["state_sha256"]
    assert result["dropped"]["invalid"] == 0
    answers = answered(going.events())
    assert len(answers) == len(set(answers)) == 4 * len(result["parties"])  # three rounds, and the delivery


def test_a_node_that_is_an_answer_behind_is_started_again(made: Village, tmp_path: Path) -> None:
    host, _, port = made.address.rpartition(":")
    made.leave("party-1")
    with cutting_line((host, int(port)), made.folder / "keys", "party-1", {ENDED}) as own:
        made.join("party-1", through=f"{host}:{own}")
        going = go(made, tmp_path / "run", "rounds.count=1")
        going.finish()
        made.leave("party-1")
    made.join("party-1")
    delivered = [event["node"] for event in going.events() if event["event"] == "answer" and event["round"] == 1]
    assert sorted(delivered) == [0, 1, 2]
    (log,) = (made.folder / "state" / "parties").glob(f"*{own}-party-1/party.log")
    assert "the node is an answer behind: it is started again" in log.read_text()


def test_a_party_that_declines_is_counted_and_says_why(made: Village, tmp_path: Path) -> None:
    made.leave("party-2")
    consent = tmp_path / "consent.toml"
    consent.write_text("rows = 10\n")
    made.join("party-2", "--consent", str(consent))
    going = go(made, tmp_path / "run")
    status = going.process.wait()
    made.leave("party-2")
    made.join("party-2")
    assert status == 1
    assert "uses up to 24 rows (data.examples), and this party's rows allows 10" in going.words()
    (drop,) = [event for event in going.events() if event.get("reason") == "declined"]
    assert drop["node"] == 2
    logs = (made.folder / "state" / "parties").glob("*party-2/party.log")  # one for each address it joined at
    assert any("rows allows 10" in log.read_text() for log in logs)


def test_the_run_goes_on_when_parties_are_killed_paused_or_slow(made: Village, tmp_path: Path) -> None:
    going = go(made, tmp_path / "run", "rounds.count=6", "rounds.quorum=0.6", "rounds.patience=1")
    going.until(in_the_middle_of(2))
    made.parties["party-2"].kill()
    made.parties["party-2"].wait()
    going.until(lost(2))  # back before its deadline it would answer in time, and nothing would be lost
    made.join("party-2")
    going.until(lambda events: any(node == 2 and number >= 2 for number, node in answered(events)))
    os.killpg(made.parties["party-1"].pid, signal.SIGSTOP)
    going.until(lost(1))
    os.killpg(made.parties["party-1"].pid, signal.SIGCONT)
    before = rounds(going.events())
    with slowed(made.parties["party-0"], 0.1):
        going.until(lambda events: rounds(events) >= before + 2)
    result = going.finish()
    events = going.events()
    assert [event["round"] for event in events if event["event"] == "round"] == list(range(1, 7))
    answers = answered(events)
    assert len(answers) == len(set(answers))
    assert result["dropped"]["lost"] >= 2
    assert result["dropped"]["late"] >= 1
    assert all(event["answers"] >= 2 for event in events if event["event"] == "round")
    assert any(node == 1 and number >= 3 for number, node in answers)
    assert any(node == 2 and number >= 3 for number, node in answers)  # who died is back
