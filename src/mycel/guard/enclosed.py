"""Sums made inside an enclave as a guard; the enclave is simulated (`mycel.guard.enclave`) and protects nobody here.

    guard.hello    every party sends a public key and a nonce
    guard.quote    the coordinator relays the enclave's answer to that nonce; who finds it sound takes part
    work           a party seals its update for the program that it verified
    open           the coordinator carries them in and is handed the sum, once, of two parties or more

Parties trust one program, that of this file, on one platform. A real one's key comes from the maker of the processor;
the simulated one's is made from a public phrase, so that anybody can sign for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from mycel.errors import ParcelError
from mycel.guard.contract import KIND, Guard, Opened, PartyGuard, Post, Sealed, Shapes, check_weight
from mycel.guard.enclave import Enclave, Platform, Program, Quote, Visitor, sealed_call, verify
from mycel.guard.letters import read, write
from mycel.guard.secagg.keys import new_secret, public_key
from mycel.wire.parcel import Parcel, Tensors

SUM = "sealed/sum"
LEAST = 2  # updates below which a sum would hide nobody


def gather(memory: dict[str, Any], argument: Parcel) -> Parcel:
    """Inside: add an update up."""
    weight, within = argument.header.get("weight"), argument.header.get("within")
    if type(weight) is not int or weight < 1 or memory.get("released"):
        raise ParcelError("the sum was handed out before, or an update does not say what it counts for")
    update = {name: value.numpy().astype(np.float64) for name, value in sorted(argument.tensors.items())}
    if not all(np.isfinite(value).all() for value in update.values()):
        raise ParcelError("an update holds NaN or infinity")
    total = memory.setdefault("total", {name: np.zeros_like(value) for name, value in update.items()})
    if {name: value.shape for name, value in update.items()} != {name: value.shape for name, value in total.items()}:
        raise ParcelError("an update has other names or shapes than those before it")
    for name, value in update.items():
        total[name] += weight * value
    for key, number in (("count", 1), ("weight", weight), ("within", int(within is True))):
        memory[key] = memory.get(key, 0) + number
    return Parcel("done")


def release(memory: dict[str, Any], argument: Parcel) -> Parcel:
    """Inside: hand the sum out, once."""
    if memory.get("count", 0) < int(memory["settings"]["least"]) or memory.get("released"):
        raise ParcelError(f"{memory.get('count', 0)} updates are there, or their sum was handed out before")
    memory["released"] = True
    total = {name: torch.from_numpy(value.astype(np.float32)) for name, value in memory.pop("total").items()}
    return Parcel("sum", {"weight": memory["weight"], "within": memory["within"]}, total)


PROGRAM = Program({"gather": gather, "release": release}, {"least": LEAST})


@cache
def simulated() -> Platform:
    """Return the platform that everybody trusts here, and that anybody can sign for."""
    return Platform(b"mycel's simulated platform")


@dataclass
class EnclaveGuard(Guard):
    """The coordinator's half: it starts the enclave and carries what it cannot read."""

    shapes: Shapes
    weights: Mapping[int, int]
    tag: str = field(default_factory=lambda: os.urandom(16).hex())
    enclave: Enclave | None = None
    hellos: dict[int, bytes] = field(default_factory=dict)

    async def prepare(self, post: Post, cohort: Sequence[int]) -> list[int]:
        """Start the enclave and have it attested to every party."""
        self.enclave = simulated().start(PROGRAM)
        found = await post({node: Parcel(f"{KIND}hello", {"tag": self.tag}) for node in cohort})
        self.hellos = {node: read(letter, "hello") for node, letter in found.items()}
        quotes = {node: self.enclave.quote(read(letter, "nonce")) for node, letter in found.items()}
        letters = {
            node: Parcel(f"{KIND}quote", {"tag": self.tag}, {"letter/quote": write(quote.to_bytes())})
            for node, quote in quotes.items()
        }
        present = sorted(await post(letters))
        if len(present) < LEAST:
            raise ParcelError(f"{len(present)} parties trust the enclave and {LEAST} are needed to hide anybody")
        return present

    def terms(self) -> dict[str, Any]:
        """The tag."""
        return {"tag": self.tag}

    def check(self, node: int, parcel: Parcel) -> None:
        """One sealed text; what it holds the enclave alone can say."""
        found = parcel.tensors.get(SUM)
        if len(parcel.tensors) != 1 or found is None or found.dtype != torch.uint8 or found.ndim != 1:
            raise ParcelError(f"the sealed update of node {node} is not one text of bytes")
        check_weight(node, parcel, self.weights)

    async def open(self, post: Post, answers: Iterable[Sealed]) -> Opened:
        """Carry updates in; those that the enclave refuses are left out."""
        assert self.enclave is not None
        for answer in answers:
            try:
                self.enclave.carry(self.hellos[answer.node], read(answer.parcel, "sum"))
            except ParcelError:
                continue
        inside = Visitor(self.enclave, simulated().public, [PROGRAM.measurement()])
        found = inside.call("release")
        if {name: tuple(value.shape) for name, value in found.tensors.items()} != dict(self.shapes):
            raise ParcelError("the sum has other names or shapes than an update")
        return Opened(found.tensors, int(found.header["weight"]), int(found.header["within"]))

    def close(self) -> None:
        """End the enclave."""
        if self.enclave is not None:
            self.enclave.close()
            self.enclave = None


class EnclaveParty(PartyGuard):
    """The party's half: it keeps a secret, and after attestation the enclave's key."""

    def answer(self, node: int, message: Parcel, kept: Tensors) -> tuple[Parcel, Tensors]:
        """Ask for attestation, or judge it."""
        tag = write(str(message.header.get("tag")).encode())
        if message.kind == f"{KIND}hello":
            secret, nonce = new_secret(), os.urandom(32)
            tensors = {"letter/hello": write(public_key(secret)), "letter/nonce": write(nonce)}
            return Parcel("answer", {}, tensors), {"secret": write(secret), "nonce": write(nonce), "tag": tag}
        if message.kind != f"{KIND}quote":
            raise ParcelError(f"a message of the kind {message.kind[:40]!r} is none of an enclave's")
        if "nonce" not in kept or not torch.equal(kept["tag"], tag):
            raise ParcelError(f"node {node} asked for no attestation in this round: its secrets were lost")
        quote = Quote.from_bytes(read(message, "quote"))
        verify(quote, simulated().public, kept["nonce"].numpy().tobytes(), [PROGRAM.measurement()])
        return Parcel("answer"), {"secret": kept["secret"], "enclave": write(quote.key), "tag": tag}

    def seal(
        self, node: int, update: Tensors, weight: int, within: bool, terms: Mapping[str, Any], kept: Tensors
    ) -> tuple[Tensors, Tensors]:
        """Seal the update for the program that was attested; secrets serve once."""
        if "enclave" not in kept or kept["tag"].numpy().tobytes() != str(terms.get("tag")).encode():
            raise ParcelError(f"node {node} has verified no enclave for this round: refused")
        secret, key = (kept[name].numpy().tobytes() for name in ("secret", "enclave"))
        call = Parcel("call", {"weight": weight, "within": within}, update)
        return {SUM: write(sealed_call(secret, key, "gather", call))}, {}
