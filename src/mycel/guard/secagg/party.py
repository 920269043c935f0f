"""A party's half of secure aggregation: four answers, and what it keeps between them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from mycel.errors import ParcelError
from mycel.guard.secagg.graph import Terms
from mycel.guard.secagg.keys import KEY_BYTES, Ring, add_mask, agree, decrypt, digest, encrypt, new_secret, public_key
from mycel.guard.secagg.shamir import SHARE_BYTES, split

SEALED_BYTES = 2 * SHARE_BYTES + 28  # two shares, a nonce and a tag


@dataclass(frozen=True)
class Keys:
    """Two public keys: one to seal shares under, one whose secret may have to be rebuilt to take masks away."""

    seal: bytes
    mask: bytes

    def to_bytes(self) -> bytes:
        """Lay both out, 64 bytes."""
        return self.seal + self.mask

    @classmethod
    def from_bytes(cls, content: bytes) -> Keys:
        """Inverse of ``to_bytes``."""
        if len(content) != 2 * KEY_BYTES:
            raise ParcelError(f"a party's keys have {len(content)} bytes where two X25519 keys have {2 * KEY_BYTES}")
        return cls(content[:KEY_BYTES], content[KEY_BYTES:])


@dataclass
class MaskingParty:
    """What one party does in one round.

    Attributes
    ----------
    seal, mask, own : bytes
        Secrets: of the two key pairs, and of the mask that only this party puts on. They never leave whole.
    """

    node: int
    seal: bytes = field(default_factory=new_secret)
    mask: bytes = field(default_factory=new_secret)
    own: bytes = field(default_factory=new_secret)
    terms: Terms | None = None
    keys: dict[int, Keys] = field(default_factory=dict)
    sent: bool = False
    revealed: bool = False
    _sealings: dict[int, bytes] = field(default_factory=dict)

    def advertise(self) -> Keys:
        """First answer: the public keys."""
        return Keys(public_key(self.seal), public_key(self.mask))

    def share(self, terms: Terms, keys: Mapping[int, Keys]) -> tuple[dict[int, bytes], bytes]:
        """Second answer: sealed shares of both secrets for each holder, and a commitment to the own mask.

        Raises
        ------
        ParcelError
            When keys of a neighbour are missing or used twice, or too few are left to hold shares.
        """
        if self.terms is not None:
            raise ParcelError(f"the shares of {terms.tag!r} were made before: keys serve one round")
        holders = terms.holders(self.node)
        missing = [node for node in holders if node not in keys]
        if missing or keys[self.node] != self.advertise():
            raise ParcelError(f"the keys of parties {missing or [self.node]} are missing or not those that they sent")
        every = [key for node in holders for key in (keys[node].seal, keys[node].mask)]
        if len(set(every)) != len(every):
            raise ParcelError("two parties show one key: somebody repeats another's")
        self.terms, self.keys = terms, {node: keys[node] for node in holders}
        masks, owns = (split(secret, holders, terms.threshold) for secret in (self.mask, self.own))
        return {
            node: encrypt(self._sealing(node), masks[node] + owns[node], self._about(self.node, node))
            for node in holders
        }, digest(self.own)

    def hide(self, values: Ring, present: Collection[int]) -> Ring:
        """Third answer: ``values`` under all masks; ``present`` are the parties whose shares have arrived."""
        terms = self._agreed()
        if self.sent:
            raise ParcelError(f"the input of {terms.tag!r} was sent before: masks serve once")
        others = [node for node in terms.neighbours[self.node] if node in present]
        if self.node not in present or len(others) + 1 < terms.threshold:
            raise ParcelError(
                f"{len(others) + 1} parties of {terms.threshold} needed share secrets with node {self.node}"
            )
        hidden = values.copy()
        add_mask(hidden, self.own, 1)
        for other in others:
            seed = agree(self.mask, self.keys[other].mask, purpose(terms.tag))
            add_mask(hidden, seed, 1 if other > self.node else -1)
        self.sent = True
        return hidden

    def reveal(self, sealed: Mapping[int, bytes], arrived: Collection[int]) -> dict[int, bytes]:
        """Fourth answer: for each party one share, of its own mask if its input arrived, else of its mask key.

        Raises
        ------
        ParcelError
            When asked again, when so few inputs arrived that the sum would tell too much, or a share does not open.
        """
        terms = self._agreed()
        if self.revealed:
            raise ParcelError(
                f"the shares of {terms.tag!r} were revealed before: nobody gets both of a party's secrets"
            )
        if len(arrived) < 2:
            raise ParcelError(f"{len(arrived)} inputs arrived: their sum would hide nobody")
        strange = [node for node in sealed if node not in self.keys]
        if strange:
            raise ParcelError(f"parties {strange} gave node {self.node} no shares: they are not its neighbours")
        shares = {}
        for node, text in sealed.items():
            both = decrypt(self._sealing(node), text, self._about(node, self.node))
            if len(both) != 2 * SHARE_BYTES:
                raise ParcelError(
                    f"the shares of node {node} have {len(both)} bytes where {2 * SHARE_BYTES} are needed"
                )
            shares[node] = both[SHARE_BYTES:] if node in arrived else both[:SHARE_BYTES]
        self.revealed = True
        return shares

    def _agreed(self) -> Terms:
        if self.terms is None:
            raise ParcelError(f"node {self.node} shared no secrets for this round: its keys were lost")
        return self.terms

    def _sealing(self, other: int) -> bytes:
        if other not in self._sealings:
            self._sealings[other] = agree(self.seal, self.keys[other].seal, purpose(self._agreed().tag, b"seal"))
        return self._sealings[other]

    def _about(self, sender: int, receiver: int) -> bytes:
        return digest(self._agreed().tag.encode(), str(sender).encode(), str(receiver).encode())


def purpose(tag: str, kind: bytes = b"mask") -> bytes:
    """What a key that two parties agree on serves for."""
    return digest(tag.encode(), kind)
