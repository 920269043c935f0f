"""Secure aggregation as a guard: the four answers of the protocol as parcels."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mycel.errors import ParcelError
from mycel.guard.contract import KIND, Guard, Opened, PartyGuard, Post, Sealed, Shapes, check_weight, size_of
from mycel.guard.letters import cut, numbers, read, write
from mycel.guard.secagg.coordinator import MaskingCoordinator
from mycel.guard.secagg.graph import Terms, complete, need, sparse
from mycel.guard.secagg.levels import KINDS, flatten, unflatten, width
from mycel.guard.secagg.party import Keys, MaskingParty
from mycel.guard.secagg.shamir import SHARE_BYTES
from mycel.wire.codecs.fixed import Fixed
from mycel.wire.parcel import Parcel, Tensors

SUM = "sealed/sum"


@dataclass
class MaskGuard(Guard):
    """The coordinator's half for one attempt at one round.

    Parameters
    ----------
    codec : Fixed
        What levels are worth.
    shapes : mapping
        Names and shapes of an update.
    weights : dict of int to int
        What each node counts for.
    staying : float
        Share of the parties that is enough to open the sum.
    thin : bool
        Whether masks follow a sparse graph.
    """

    codec: Fixed
    shapes: Shapes
    weights: Mapping[int, int]
    staying: float
    thin: bool
    tag: str = field(default_factory=lambda: os.urandom(16).hex())
    protocol: MaskingCoordinator | None = None
    wide: int = 64

    async def prepare(self, post: Post, cohort: Sequence[int]) -> list[int]:
        """Collect keys, then sealed shares; whoever answers both takes part."""
        least = need(len(cohort), self.staying) if len(cohort) > 1 else 2
        found = await post({node: Parcel(f"{KIND}keys", {"tag": self.tag}) for node in cohort})
        keys = {node: Keys.from_bytes(read(letter, "keys")) for node, letter in found.items()}
        self._enough(len(keys), least, "sent keys")
        terms = self._graph(sorted(keys))
        self.protocol = MaskingCoordinator(terms, keys)
        for node, letter in (await post({node: self._ask_shares(node) for node in sorted(keys)})).items():
            holders = terms.holders(node)
            sealed = letter.tensors.get("shares/sealed")
            if sealed is None or sealed.dtype != torch.uint8 or sealed.ndim != 2 or len(sealed) != len(holders):
                continue  # like a party that did not answer
            texts = cut(sealed.numpy().tobytes(), holders)
            self.protocol.take_shares(node, texts, read(letter, "commitment"))
        present = sorted(self.protocol.sealed)
        self._enough(len(present), least, "shared secrets")
        self.wide = width(self.codec, sum(self.weights[node] for node in present))
        return present

    def terms(self) -> dict[str, Any]:
        """The tag, the ring, and who takes part."""
        assert self.protocol is not None
        return {"tag": self.tag, "ring": self.wide, "present": sorted(self.protocol.sealed)}

    def check(self, node: int, parcel: Parcel) -> None:
        """One vector of the ring, and nothing else."""
        found = parcel.tensors.get(SUM)
        size = size_of(self.shapes) + 1
        if len(parcel.tensors) != 1 or found is None or found.dtype != KINDS[self.wide] or found.shape != (size,):
            raise ParcelError(f"the hidden update of node {node} is not one vector of {size} {self.wide}-bit numbers")
        check_weight(node, parcel, self.weights)

    async def open(self, post: Post, answers: Iterable[Sealed]) -> Opened:
        """Add up, ask for shares, take masks away."""
        assert self.protocol is not None
        for answer in answers:
            signed = answer.parcel.tensors[SUM].numpy().astype(f"<i{self.wide // 8}", copy=False)
            hidden = signed.view(f"<u{self.wide // 8}")
            self.protocol.take_input(answer.node, hidden)
        asked = {node: self._ask_reveal(node) for node in sorted(self.protocol.inputs)}
        for node, letter in (await post(asked)).items():
            wanted = sorted(self.protocol.wanted(node))
            opened = read(letter, "opened")
            if len(opened) == SHARE_BYTES * len(wanted):
                self.protocol.take_reveal(node, cut(opened, wanted))
        levels, within = unflatten(self.protocol.sum(), self.codec, self.shapes)
        weight = sum(self.weights[node] for node in self.protocol.inputs)
        return Opened({name: self.codec.value(value) for name, value in levels.items()}, weight, within)

    def _graph(self, parties: Sequence[int]) -> Terms:
        if not self.thin:
            return complete(self.tag, parties, self.staying)
        return sparse(self.tag, parties, self.staying, int(self.tag[:12], 16))

    def _ask_shares(self, node: int) -> Parcel:
        assert self.protocol is not None
        terms = self.protocol.terms
        holders = terms.holders(node)
        keys = b"".join(self.protocol.keys[holder].to_bytes() for holder in holders)
        header = {"tag": self.tag, "holders": list(holders), "threshold": terms.threshold}
        return Parcel(f"{KIND}shares", header, {"shares/keys": write(keys)})

    def _ask_reveal(self, node: int) -> Parcel:
        assert self.protocol is not None
        wanted = self.protocol.wanted(node)
        header = {"tag": self.tag, "of": sorted(wanted), "arrived": sorted(self.protocol.inputs)}
        return Parcel(f"{KIND}reveal", header, {"reveal/sealed": write(b"".join(wanted[of] for of in sorted(wanted)))})

    def _enough(self, count: int, least: int, deed: str) -> None:
        if count < max(least, 2):
            raise ParcelError(f"{count} parties {deed} and {max(least, 2)} are needed to hide anybody")


class MaskParty(PartyGuard):
    """The party's half.

    Parameters
    ----------
    codec : Fixed
        What levels are worth.
    """

    def __init__(self, codec: Fixed) -> None:
        self.codec = codec

    def answer(self, node: int, message: Parcel, kept: Tensors) -> tuple[Parcel, Tensors]:
        """Send keys, share secrets, or reveal shares."""
        step, tag = message.kind.removeprefix(KIND), str(message.header.get("tag"))
        if step == "keys":
            party = MaskingParty(node)
            return Parcel("answer", {}, {"keys/keys": write(party.advertise().to_bytes())}), _keep(tag, party)
        party = _recall(tag, node, kept)
        if step == "shares":
            terms, keys = _agreed(tag, node, message)
            sealed, commitment = party.share(terms, keys)
            rows = torch.stack([write(sealed[holder]) for holder in terms.holders(node)])
            tensors = {"shares/sealed": rows, "commitment/commitment": write(commitment)}
            return Parcel("answer", {}, tensors), _keep(tag, party)
        if step == "reveal":
            nodes, arrived = (numbers(message, key) for key in ("of", "arrived"))
            content = read(message, "sealed")
            shares = party.reveal(cut(content, nodes), set(arrived))
            opened = b"".join(shares[of] for of in sorted(shares))
            return Parcel("answer", {}, {"opened/opened": write(opened)}), {}
        raise ParcelError(f"a message of the kind {message.kind[:40]!r} is none of secure aggregation's")

    def seal(
        self, node: int, update: Tensors, weight: int, within: bool, terms: Mapping[str, Any], kept: Tensors
    ) -> tuple[Tensors, Tensors]:
        """Turn an update into levels and put the masks on."""
        tag, wide, present = str(terms.get("tag")), terms.get("ring"), terms.get("present")
        if wide not in KINDS or not isinstance(present, list):
            raise ParcelError("the brief does not say how to hide the answer: another coordinator's, or a damaged one")
        party = _recall(tag, node, kept)
        levels = flatten(update, self.codec, weight, within, wide)
        hidden = party.hide(levels, {int(other) for other in present})
        return {SUM: torch.from_numpy(hidden.view(f"<i{wide // 8}"))}, _keep(tag, party)


def _agreed(tag: str, node: int, message: Parcel) -> tuple[Terms, dict[int, Keys]]:
    holders, threshold, content = numbers(message, "holders"), message.header.get("threshold"), read(message, "keys")
    if type(threshold) is not int or not len(holders) // 2 < threshold <= len(holders) or node not in holders:
        raise ParcelError(f"a threshold of {threshold} for {len(holders)} holders is not above a half and at most all")
    if len(content) != 64 * len(holders):
        raise ParcelError(f"keys of {len(holders)} holders have {64 * len(holders)} bytes, found {len(content)}")
    keys = {holder: Keys.from_bytes(content[64 * place : 64 * (place + 1)]) for place, holder in enumerate(holders)}
    return Terms(tag, {node: tuple(holder for holder in holders if holder != node)}, threshold), keys


def _keep(tag: str, party: MaskingParty) -> Tensors:
    content = {
        "tag": tag,
        "secrets": [secret.hex() for secret in (party.seal, party.mask, party.own)],
        "threshold": party.terms.threshold if party.terms else 0,
        "keys": {str(node): keys.to_bytes().hex() for node, keys in party.keys.items()},
        "sent": party.sent,
    }
    return {"masks": write(json.dumps(content).encode())}


def _recall(tag: str, node: int, kept: Tensors) -> MaskingParty:
    content = json.loads(kept["masks"].numpy().tobytes()) if "masks" in kept else {}
    if content.get("tag") != tag:
        raise ParcelError(f"node {node} has no secrets for this round: they were lost, revealed or made for another")
    seal, mask, own = map(bytes.fromhex, content["secrets"])
    party = MaskingParty(node, seal, mask, own, sent=content["sent"])
    party.keys = {int(other): Keys.from_bytes(bytes.fromhex(keys)) for other, keys in content["keys"].items()}
    if party.keys:
        beside = tuple(sorted(other for other in party.keys if other != node))
        party.terms = Terms(tag, {node: beside}, content["threshold"])
    return party
