"""The coordinator's half of secure aggregation: it relays, adds up, and takes away what does not cancel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mycel.errors import ParcelError
from mycel.guard.secagg.graph import Terms
from mycel.guard.secagg.keys import KEY_BYTES, Ring, add_mask, agree_each, digest, public_key
from mycel.guard.secagg.party import SEALED_BYTES, Keys, purpose
from mycel.guard.secagg.shamir import SHARE_BYTES, join


@dataclass
class MaskingCoordinator:
    """What the coordinator learns in one round: keys, sealed shares, hidden inputs, and shares in the clear."""

    terms: Terms
    keys: dict[int, Keys] = field(default_factory=dict)
    sealed: dict[int, dict[int, bytes]] = field(default_factory=dict)
    commitments: dict[int, bytes] = field(default_factory=dict)
    inputs: set[int] = field(default_factory=set)
    total: Ring | None = None
    shares: dict[int, dict[int, bytes]] = field(default_factory=dict)

    def take_shares(self, node: int, sealed: Mapping[int, bytes], commitment: bytes) -> None:
        """Take a party's second answer."""
        if set(sealed) != set(self.terms.holders(node)):
            raise ParcelError(f"node {node} sealed shares for {sorted(sealed)}, not for itself and its neighbours")
        for holder, text in sealed.items():
            if len(text) != SEALED_BYTES:
                raise ParcelError(f"the share of node {node} for {holder} has {len(text)} bytes, not {SEALED_BYTES}")
        if len(commitment) != KEY_BYTES:
            raise ParcelError(f"the commitment of node {node} has {len(commitment)} bytes, not {KEY_BYTES}")
        self.sealed[node], self.commitments[node] = dict(sealed), commitment

    def take_input(self, node: int, hidden: Ring) -> None:
        """Take a party's third answer and add it up."""
        if node not in self.sealed or node in self.inputs:
            raise ParcelError(f"an input of node {node} was not asked for: it shared no secrets or has sent one before")
        if self.total is None:
            self.total = np.zeros_like(hidden)
        if hidden.shape != self.total.shape or hidden.dtype != self.total.dtype:
            raise ParcelError(
                f"the input of node {node} is {hidden.dtype} of {hidden.shape}, "
                f"others sent {self.total.dtype} of {self.total.shape}"
            )
        self.total += hidden
        self.inputs.add(node)

    def wanted(self, holder: int) -> dict[int, bytes]:
        """What to ask a party to open: the sealed shares that it holds of parties whose masks are in the sum."""
        beside = self.terms.holders(holder)  # who holds a party's shares is whose shares it holds
        return {node: self.sealed[node][holder] for node in beside if node in self.sealed and self._concerns(node)}

    def take_reveal(self, holder: int, shares: Mapping[int, bytes]) -> None:
        """Take a party's fourth answer."""
        expected = self.wanted(holder).keys()
        if shares.keys() != expected:
            raise ParcelError(f"node {holder} opened shares of {sorted(shares)}, asked for were {sorted(expected)}")
        for node, share in shares.items():
            if len(share) != SHARE_BYTES:
                raise ParcelError(f"a share of node {node} has {len(share)} bytes where {SHARE_BYTES} are needed")
            self.shares.setdefault(node, {})[holder] = share

    def sum(self) -> Ring:
        """Return the sum of the inputs that arrived, without any mask.

        Raises
        ------
        ParcelError
            When a secret cannot be rebuilt: the round is to be repeated.
        """
        if self.total is None or len(self.inputs) < 2:
            raise ParcelError(f"{len(self.inputs)} inputs arrived: their sum would hide nobody")
        total = self.total.copy()
        for node in sorted(filter(self._concerns, self.sealed)):
            shares = self.shares.get(node, {})
            try:
                if node in self.inputs:
                    announced = self.commitments[node]
                    own = join(shares, self.terms.threshold, lambda found, said=announced: digest(found) == said)  # type: ignore[misc]
                    add_mask(total, own, -1)
                else:
                    key = self.keys[node].mask
                    mask = join(shares, self.terms.threshold, lambda found, said=key: public_key(found) == said)  # type: ignore[misc]
                    self._cancel(total, node, mask)
            except ParcelError as error:
                raise ParcelError(f"the sum cannot be opened at node {node}: {error}") from error
        return total

    def _cancel(self, total: Ring, gone: int, mask: bytes) -> None:
        """Take away what the neighbours of a party that left have put on for it."""
        others = [other for other in self.terms.neighbours[gone] if other in self.inputs]
        seeds = agree_each(mask, (self.keys[other].mask for other in others), purpose(self.terms.tag))
        for other, seed in zip(others, seeds, strict=True):
            add_mask(total, seed, -1 if gone > other else 1)

    def _concerns(self, node: int) -> bool:
        return node in self.inputs or any(other in self.inputs for other in self.terms.neighbours[node])
