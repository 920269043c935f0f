"""Sums of encrypted updates as a guard: parties agree on a CKKS key that the coordinator lacks (`mycel.guard.ckks`).

    guard.keys     every party sends a public key
    guard.make     the first of them makes a CKKS key pair: the public half for the coordinator, the secret one sealed
    guard.secret   the coordinator relays the sealed half; who opens it takes part
    work           a party sends its update times its share of the weight, encrypted
    guard.reveal   parties decrypt the sum, once in a round; most of them must say the same

The coordinator follows the protocol and works with no party: all share one key, and nobody could tell a sum from a
single update when asked to decrypt. Keys serve one round. What is decrypted is rounded to ``STEP`` before it leaves,
for the error of a CKKS decryption tells of the key (Li and Micciancio 2021); it is a hundred times that error.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from typing import Any

import torch

from mycel.errors import ParcelError
from mycel.guard import ckks
from mycel.guard.contract import KIND, Guard, Opened, PartyGuard, Post, Sealed, Shapes, check_weight, size_of
from mycel.guard.letters import cut, numbers, read, write
from mycel.guard.secagg.keys import KEY_BYTES, agree, decrypt, digest, encrypt, new_secret, public_key
from mycel.wire.parcel import Parcel, Tensors

STEP = 2.0**-20  # of the opened sum, whose elements are no larger than an update's
JUDGES = 3  # parties that decrypt
LARGEST = 1 << 20  # bytes of one ciphertext


@dataclass
class CkksGuard(Guard):
    """The coordinator's half; see `mycel.guard.secagg.guard.MaskGuard` for its parameters."""

    shapes: Shapes
    weights: Mapping[int, int]
    tag: str = field(default_factory=lambda: os.urandom(16).hex())
    keys: bytes = b""

    async def prepare(self, post: Post, cohort: Sequence[int]) -> list[int]:
        """Let one party make the key and hand its secret half to the others."""
        found = await post({node: Parcel(f"{KIND}keys", {"tag": self.tag}) for node in cohort})
        public = {node: read(letter, "keys") for node, letter in sorted(found.items())}
        bad = [node for node, key in public.items() if len(key) != KEY_BYTES]
        if bad:
            raise ParcelError(f"public keys of the nodes {bad} are of the wrong kind: {KEY_BYTES} bytes are needed")
        maker, made = await self._make(post, public)
        self.keys = read(made, "coordinator")
        sealed, locks = read(made, "sealed"), cut(read(made, "locks"), list(public))
        relayed = {
            node: Parcel(f"{KIND}secret", {"tag": self.tag}, _bytes(sealed=sealed, lock=lock, maker=public[maker]))
            for node, lock in locks.items()
        }
        present = sorted(await post(relayed))
        if len(present) < 2:
            raise ParcelError(f"{len(present)} parties hold the key and 2 are needed to hide anybody")
        return present

    async def _make(self, post: Post, public: Mapping[int, bytes]) -> tuple[int, Parcel]:
        """Ask one after another to make a key; return who did, and what came."""
        keys = _bytes(keys=b"".join(public.values()))
        ask = Parcel(f"{KIND}make", {"tag": self.tag, "holders": list(public)}, keys)
        for maker in public:
            made = (await post({maker: ask})).get(maker)
            if made is not None:
                return maker, made
        raise ParcelError("no party made a key to encrypt under")

    @property
    def whole(self) -> int:
        """What the weights of all parties add up to."""
        return sum(self.weights.values())

    def terms(self) -> dict[str, Any]:
        """The tag, what all weights add up to, and how many they are."""
        return {"tag": self.tag, "whole": self.whole, "parties": len(self.weights)}

    def check(self, node: int, parcel: Parcel) -> None:
        """So many ciphertexts as an update needs, and nothing else."""
        _pieces(parcel, ceil((size_of(self.shapes) + 1) / ckks.SLOTS))
        check_weight(node, parcel, self.weights)

    async def open(self, post: Post, answers: Iterable[Sealed]) -> Opened:
        """Add up and let parties decrypt."""
        pieces, nodes = ceil((size_of(self.shapes) + 1) / ckks.SLOTS), []
        total: list[bytes] = []
        for answer in answers:
            sent = _pieces(answer.parcel, pieces)
            try:
                total = ckks.add(self.keys, [total, sent] if total else [sent])
            except ParcelError:  # no ciphertexts under this key: as if the party had left
                continue
            nodes.append(answer.node)
        if len(nodes) < 2:
            raise ParcelError(f"{len(nodes)} inputs arrived: their sum would hide nobody")
        asked = Parcel(f"{KIND}reveal", {"tag": self.tag, "arrived": sorted(nodes)}, _laid(total))
        found = (await post(dict.fromkeys(sorted(nodes)[:JUDGES], asked))).values()
        values = _most([read(letter, "opened") for letter in found])
        count = size_of(self.shapes) + 1
        if len(values) != 4 * count:
            raise ParcelError(f"what was decrypted has {len(values)} bytes where {4 * count} belong")
        sums = torch.frombuffer(bytearray(values), dtype=torch.float32).double()
        if not bool(torch.isfinite(sums).all()):
            raise ParcelError("what was decrypted holds NaN or infinity")
        names = sorted(self.shapes)
        parts = torch.split(sums[:-1] * self.whole, [prod(self.shapes[name]) for name in names])
        opened = {name: part.reshape(self.shapes[name]).float() for name, part in zip(names, parts, strict=True)}
        return Opened(opened, sum(self.weights[node] for node in nodes), round(float(sums[-1]) * len(self.weights)))


class CkksParty(PartyGuard):
    """The party's half; what it keeps is its secret, then the key, until it has decrypted once."""

    def answer(self, node: int, message: Parcel, kept: Tensors) -> tuple[Parcel, Tensors]:
        """Send a public key, make the common key, take it, or decrypt the sum."""
        step, tag = message.kind.removeprefix(KIND), str(message.header.get("tag"))
        about = digest(tag.encode())
        if step == "keys":
            secret = new_secret()
            return Parcel("answer", {}, _bytes(keys=public_key(secret))), {"secret": write(secret), "tag": write(about)}
        if "tag" not in kept or kept["tag"].numpy().tobytes() != about:
            raise ParcelError(f"node {node} has no key for this round: it was lost, used or made for another")
        if step == "make":
            secret, holders = kept["secret"].numpy().tobytes(), numbers(message, "holders")
            public, made, lock = cut(read(message, "keys"), holders), ckks.make_keys(), new_secret()
            locks = [encrypt(agree(secret, public[holder], about), lock, about) for holder in holders]
            sealed = encrypt(lock, made.party, about)
            return Parcel(
                "answer", {}, _bytes(coordinator=made.coordinator, sealed=sealed, locks=b"".join(locks))
            ), kept
        if step == "secret":
            shared = agree(kept["secret"].numpy().tobytes(), read(message, "maker"), about)
            key = decrypt(decrypt(shared, read(message, "lock"), about), read(message, "sealed"), about)
            return Parcel("answer"), {"key": write(key), "tag": write(about)}
        if step != "reveal":
            raise ParcelError(f"a message of the kind {message.kind[:40]!r} is none of encrypted sums'")
        if len(numbers(message, "arrived")) < 2:
            raise ParcelError("fewer than 2 inputs arrived: their sum would hide nobody")
        sums = ckks.decrypt(_key(node, kept), _pieces(message, None)).double()
        rounded = ((sums / STEP).round() * STEP).float()
        return Parcel("answer", {}, _bytes(opened=rounded.numpy().tobytes())), {}

    def seal(
        self, node: int, update: Tensors, weight: int, within: bool, terms: Mapping[str, Any], kept: Tensors
    ) -> tuple[Tensors, Tensors]:
        """Encrypt the update times its share of all weights, with one more number that counts the bounded ones."""
        whole, parties = terms.get("whole"), terms.get("parties")
        if type(whole) is not int or type(parties) is not int or whole < weight or parties < 2:
            raise ParcelError(f"the brief says that {str(parties)[:20]} parties weigh {str(whole)[:20]}: it is damaged")
        parts = [update[name].detach().double().reshape(-1) * (weight / whole) for name in sorted(update)]
        counted = torch.tensor([float(within) / parties], dtype=torch.float64)
        return _laid(ckks.encrypt(_key(node, kept), torch.cat([*parts, counted]))), kept


def _bytes(**parts: bytes) -> Tensors:
    return {f"letter/{name}": write(content) for name, content in parts.items()}


def _laid(pieces: Sequence[bytes]) -> Tensors:
    lengths = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
    return {"sealed/sum": write(b"".join(pieces)), "sealed/lengths": lengths}


def _pieces(parcel: Parcel, count: int | None) -> list[bytes]:
    """Take ciphertexts apart; ``count`` is how many there have to be."""
    content, lengths = parcel.tensors.get("sealed/sum"), parcel.tensors.get("sealed/lengths")
    if len(parcel.tensors) != 2 or content is None or lengths is None:
        raise ParcelError("an encrypted update is ciphertexts and their lengths, and nothing else")
    if content.dtype != torch.uint8 or lengths.dtype != torch.int64 or content.ndim != 1 or lengths.ndim != 1:
        raise ParcelError(f"ciphertexts are bytes with whole lengths; found {content.dtype} and {lengths.dtype}")
    sizes = lengths.tolist()
    if not sizes or min(sizes) < 1 or max(sizes) > LARGEST or sum(sizes) != len(content):
        raise ParcelError("the lengths of the ciphertexts are not those of what came")
    if count is not None and len(sizes) != count:
        raise ParcelError(f"an encrypted update has {len(sizes)} ciphertexts where {count} are needed")
    return [piece.numpy().tobytes() for piece in torch.split(content, sizes)]


def _key(node: int, kept: Tensors) -> bytes:
    if "key" not in kept:
        raise ParcelError(f"node {node} holds no key to encrypt under: it was lost or used")
    return kept["key"].numpy().tobytes()


def _most(values: Sequence[bytes]) -> bytes:
    """What more than half of the judges say; all of them decrypt the same, to the bit."""
    said = Counter(values).most_common(1)
    if not said or 2 * said[0][1] <= len(values):
        raise ParcelError(f"{len(values)} parties decrypted the sum and most of them do not agree")
    return said[0][0]
