"""Encrypted and enclosed sums as guards: the contract, whole rounds, and what either half refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from mycel.engines.leaving import Leaving
from mycel.errors import ParcelError, RecipeError
from mycel.guard.contract import Guard, PartyGuard, Sealed, Shapes
from mycel.guard.enclosed import PROGRAM, EnclaveGuard, EnclaveParty, gather, release, simulated
from mycel.guard.encrypted import CkksGuard, CkksParty, _most
from mycel.recipe.schema import Recipe
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.registry import load_system
from mycel.rounds.simulation import Simulation
from mycel.testing import check_guard
from mycel.wire.parcel import Parcel, Tensors
from rounds_by_hand import SMALL

HIDING: dict[str, Callable[[Shapes, Mapping[int, int]], Guard]] = {"homomorphic": CkksGuard, "enclave": EnclaveGuard}
PARTIES: dict[str, type[PartyGuard]] = {"homomorphic": CkksParty, "enclave": EnclaveParty}


@pytest.fixture(params=HIDING)
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "homomorphic":
        pytest.importorskip("tenseal", reason="the homomorphic extra is not installed")
    return str(request.param)


def test_both_obey_the_contract_of_guards(kind: str) -> None:
    check_guard(HIDING[kind], PARTIES[kind](), 1e-5)


def test_a_run_ends_where_sums_in_the_open_do(lab: Laboratory, kind: str) -> None:
    changes = {"model.base": "micro", **SMALL, "data.count": 4, "rounds.local_steps": 1, "rounds.quorum": 0.5}
    # Encryption's noise is drawn anew each time, and AdamW's first step is of one length however small a gradient is.
    changes |= {"training.optimizer": "sgd", "training.learning_rate": 1.0}
    recipe = Recipe().replace({**changes, "guard.sums": kind})

    def leaves(node: int, message: str, version: int) -> bool:
        return node == 3 and message == "work"

    ends = []
    for chosen in (recipe, recipe.replace({"guard.sums": "plain"})):
        world = lab.world(chosen)
        seen: list[Tensors] = []
        labour = Leaving(lab.place.labour, leaves)
        ends.append(
            Simulation(lab.arm(), world, labour, checkpoint=lambda at, into=seen: into.extend(_arrived(at))).run()  # type: ignore[misc]
        )
        if chosen is recipe:
            assert all(all(not value.is_floating_point() for value in sent.values()) for sent in seen)
    hidden, plain = (end.state.shared for end in ends)
    assert all(torch.allclose(value, plain[name], atol=1e-5) for name, value in hidden.items())
    assert max(float(value.abs().max()) for name, value in plain.items() if "lora_B" in name) > 1e-3
    assert ends[0].meter.total("up", purpose="guard") > 0


def _arrived(coordinator: Any) -> list[Tensors]:
    return [answer.parcel.tensors for answer in coordinator.latest]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wire.codec": "int8"}, ["raw"]),
        ({"system": "scaffold"}, ["masked_flora"]),
        ({"rounds.pace": "buffered(2)"}, ["synchronous"]),
        ({"guard.filter": "median"}, ["hidden"]),
    ],
)
def test_unsound_pairings_are_refused(kind: str, changes: dict[str, Any], words: list[str]) -> None:
    if kind == "homomorphic":
        pytest.importorskip("tenseal")
    with pytest.raises(RecipeError) as caught:
        load_system(Recipe().replace({"guard.sums": kind, **changes}))
    assert all(word in str(caught.value) for word in words)


class Table:
    """Hands messages to parties in this process; ``change`` may tamper with one on its way."""

    def __init__(self, party: PartyGuard, change: Callable[[int, Parcel], Parcel] = lambda node, sent: sent) -> None:
        self.party, self.change, self.kept = party, change, dict[int, Tensors]()

    async def post(self, messages: Mapping[int, Parcel]) -> dict[int, Parcel]:
        answers = {}
        for node, message in messages.items():
            try:
                read = Parcel.from_bytes(self.change(node, message).to_bytes())
                answers[node], self.kept[node] = self.party.answer(node, read, self.kept.get(node, {}))
            except ParcelError:
                continue
        return answers


def sealed(guard: Guard, table: Table, nodes: list[int]) -> list[Sealed]:
    found = []
    for node in nodes:
        update = {"a": torch.full((3,), float(node + 1))}
        hidden, table.kept[node] = table.party.seal(node, update, 1, True, guard.terms(), table.kept[node])
        found.append(Sealed(node, Parcel("answer", {"samples": 1}, hidden), 1))
    return found


def test_one_input_is_not_opened_and_nothing_opens_twice(kind: str) -> None:
    for guard in (HIDING[kind]({"a": (3,)}, dict.fromkeys(range(3), 1)) for _ in range(2)):
        table = Table(PARTIES[kind]())
        try:
            present = asyncio.run(guard.prepare(table.post, range(3)))
            answers = sealed(guard, table, present)
            with pytest.raises(ParcelError):
                asyncio.run(guard.open(table.post, answers[:1]))
            if kind == "homomorphic":
                opened = asyncio.run(guard.open(table.post, answers))
                assert torch.allclose(opened.total["a"], torch.full((3,), 6.0), atol=1e-4)
                with pytest.raises(ParcelError, match="agree"):  # keys were thrown away
                    asyncio.run(guard.open(table.post, answers))
        finally:
            guard.close()


def test_an_enclave_hands_its_sum_out_once_and_refuses_replays() -> None:
    guard, table = EnclaveGuard({"a": (3,)}, dict.fromkeys(range(3), 1)), Table(EnclaveParty())
    try:
        present = asyncio.run(guard.prepare(table.post, range(3)))
        answers = sealed(guard, table, present)
        opened = asyncio.run(guard.open(table.post, [*answers[:2], answers[0]]))  # the third is a replay
        assert opened.total["a"].tolist() == [3.0] * 3
        assert opened.weight == 2
        with pytest.raises(ParcelError, match="handed out before"):
            asyncio.run(guard.open(table.post, answers[2:]))  # what it adds could be told by the difference
    finally:
        guard.close()


def test_an_update_that_is_refused_leaves_no_trace_in_the_enclave() -> None:
    """Neither its names nor its shapes bind those who come after it."""
    memory: dict[str, Any] = {"settings": {"least": 2}}
    with pytest.raises(ParcelError, match="NaN"):
        gather(memory, Parcel("call", {"weight": 1}, {"b": torch.tensor([float("nan")])}))
    for _ in range(2):
        gather(memory, Parcel("call", {"weight": 1, "within": True}, {"a": torch.ones(3)}))
    assert release(memory, Parcel("call")).tensors["a"].tolist() == [2.0] * 3


def test_parties_leave_when_the_attestation_is_not_what_they_asked_for() -> None:
    other = simulated().start(PROGRAM)

    def change(node: int, message: Parcel) -> Parcel:
        if message.kind == "guard.quote" and node == 0:
            quote = torch.frombuffer(bytearray(other.quote(bytes(32)).to_bytes()), dtype=torch.uint8)
            return Parcel(message.kind, message.header, {"letter/quote": quote})
        return message

    guard, table = EnclaveGuard({"a": (3,)}, dict.fromkeys(range(3), 1)), Table(EnclaveParty(), change)
    try:
        assert asyncio.run(guard.prepare(table.post, range(3))) == [1, 2]
        with pytest.raises(ParcelError, match="verified no enclave"):
            table.party.seal(0, {"a": torch.zeros(3)}, 1, True, guard.terms(), table.kept[0])
    finally:
        guard.close()
        other.close()


def test_keys_that_are_damaged_leave_a_party_out_and_liars_are_outvoted() -> None:
    pytest.importorskip("tenseal")

    def change(node: int, message: Parcel) -> Parcel:
        if message.kind != "guard.secret" or node != 2:
            return message
        return Parcel(
            message.kind, message.header, message.tensors | {"letter/lock": torch.zeros(60, dtype=torch.uint8)}
        )

    guard, table = CkksGuard({"a": (3,)}, dict.fromkeys(range(4), 1)), Table(CkksParty(), change)
    assert asyncio.run(guard.prepare(table.post, range(4))) == [0, 1, 3]
    answers = sealed(guard, table, [0, 1, 3])
    answers[0].parcel.tensors["sealed/sum"].zero_()  # no ciphertext
    opened = asyncio.run(guard.open(table.post, answers))
    assert (opened.weight, opened.within) == (2, 2)
    assert torch.allclose(opened.total["a"], torch.full((3,), 6.0), atol=1e-4)
    assert _most([b"true", b"lie", b"true"]) == b"true"
    with pytest.raises(ParcelError, match="agree"):
        _most([b"true", b"lie"])


@pytest.mark.parametrize("size", [0, 3, 12, 20])
def test_sums_of_the_wrong_length_are_refused(size: int) -> None:
    pytest.importorskip("tenseal")
    guard, table = CkksGuard({"a": (3,)}, dict.fromkeys(range(3), 1)), Table(CkksParty())
    answers = sealed(guard, table, asyncio.run(guard.prepare(table.post, range(3))))

    async def post(messages: Mapping[int, Parcel]) -> dict[int, Parcel]:
        opened = {"letter/opened": torch.zeros(size, dtype=torch.uint8)}
        return dict.fromkeys(messages, Parcel("answer", {}, opened))

    with pytest.raises(ParcelError, match=f"has {size} bytes where 16 belong"):
        asyncio.run(guard.open(post, answers))
