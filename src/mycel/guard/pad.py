"""Frozen linear layers computed by a process that may not see their input: a one-time pad in a ring.

Huang et al. 2024 (catalogue number 28), after Slalom (Tramer and Boneh 2019). With ``X`` and ``W`` in fixed point:

    trusted, beforehand:   R uniform mod 2^64,  U = R W
    to the other process:  X + R      (uniform, whatever X is)
    back:                  (X + R) W;   X W = (X + R) W - U   exactly, mod 2^64

``W`` is public and frozen; gradients with respect to ``X`` pass through the same layer transposed. Every pad serves
once. Precomputing U costs the trusted side what the layer would; it is done while nobody waits. The other process is
trusted to compute rightly, unless ``check`` is asked for (Freivalds' test on a random vector).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mycel.errors import ParcelError

Whole = NDArray[np.uint64]
FRACTION = 16  # bits after the point of inputs and weights each
LARGEST = 1 << 14  # magnitudes that stay clear of the ring's edge over sums of a few thousand products


def to_ring(values: NDArray[np.floating]) -> Whole:
    """Return fixed-point numbers mod 2^64.

    Raises
    ------
    ParcelError
        When a value is not finite or too large for the ring.
    """
    if not np.isfinite(values).all() or float(np.abs(values).max(initial=0)) >= LARGEST:
        raise ParcelError(f"values to be padded must be finite and below {LARGEST:,}: scale them down")
    return np.rint(values.astype(np.float64) * (1 << FRACTION)).astype(np.int64).view(np.uint64)


def from_ring(products: Whole) -> NDArray[np.float32]:
    """Return the numbers that products of two fixed-point numbers stand for."""
    return (products.view(np.int64).astype(np.float64) / (1 << (2 * FRACTION))).astype(np.float32)


@dataclass(frozen=True)
class Pad:
    """A mask and what it becomes behind the layer."""

    number: int
    mask: Whole
    product: Whole


@dataclass
class PaddedLinear:
    """The trusted side of one frozen layer.

    Parameters
    ----------
    weight : array
        (outputs, inputs) float32.
    elsewhere : callable
        Computes ``(rows, inputs) @ weight.T`` in the ring; sees only padded rows.
    check : bool
        Whether results are tested; a wrong one escapes with odds of about 2^-64 per test.
    """

    weight: NDArray[np.floating]
    elsewhere: Callable[[Whole], Whole]
    check: bool = False
    pads: list[Pad] = field(default_factory=list)
    made: int = 0
    used: int = 0

    def __post_init__(self) -> None:
        self.ring = to_ring(self.weight)

    def prepare(self, rows: int, count: int = 1) -> None:
        """Draw ``count`` pads for inputs of ``rows`` rows."""
        for _ in range(count):
            raw = os.urandom(8 * rows * self.ring.shape[1])
            mask = np.frombuffer(raw, dtype=np.uint64).reshape(rows, -1)
            self.pads.append(Pad(self.made, mask, product(mask, self.ring)))
            self.made += 1

    def __call__(self, inputs: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return ``inputs @ weight.T`` in fixed point, computed elsewhere.

        Raises
        ------
        ParcelError
            When no pad for so many rows is left, or the result is wrong.
        """
        place = next((place for place, pad in enumerate(self.pads) if len(pad.mask) == len(inputs)), None)
        if place is None:
            raise ParcelError(f"no pad for {len(inputs)} rows is left: prepare more, for none serves twice")
        pad = self.pads.pop(place)
        self.used += 1
        padded = to_ring(inputs) + pad.mask
        found = self.elsewhere(padded)
        if self.check:
            probe = np.frombuffer(os.urandom(8 * self.ring.shape[0]), dtype=np.uint64)
            if not np.array_equal(product(found, probe[None]), product(padded, product(probe[None], self.ring.T))):
                raise ParcelError("the untrusted process returned a wrong product: take the work elsewhere")
        return from_ring(found - pad.product)


def product(rows: Whole, weight: Whole) -> Whole:
    """``rows @ weight.T`` mod 2^64."""
    return np.asarray(rows @ weight.T, dtype=np.uint64)
