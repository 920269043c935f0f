"""Shamir's secret sharing of 32 bytes: any ``threshold`` shares rebuild them, fewer say nothing.

Shamir 1979, "How to Share a Secret". The field is that of the smallest prime above 2^256.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import combinations
from math import comb, prod

from mycel.errors import ParcelError

PRIME = (1 << 256) + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
ATTEMPTS = 200  # sets of shares that are tried where some of them lie


def split(secret: bytes, holders: Iterable[int], threshold: int) -> dict[int, bytes]:
    """Return a share of ``secret`` for each holder.

    Parameters
    ----------
    secret : bytes
        32 bytes.
    holders : iterable of int
        Numbers of 0 or more, each once.
    threshold : int
        How many shares rebuild the secret.

    Raises
    ------
    ValueError
        When the secret has another length or the threshold does not lie between 1 and the number of holders.
    """
    places = sorted(holders)
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret of {len(secret)} bytes cannot be shared: it has {SECRET_BYTES}")
    if len(set(places)) != len(places) or (places and places[0] < 0):
        raise ValueError("holders are numbers of 0 or more, each once")
    if not 1 <= threshold <= len(places):
        raise ValueError(f"the threshold {threshold} is not between 1 and the {len(places)} holders")
    terms = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = {}
    for place in places:
        value = 0
        for term in reversed(terms):
            value = (value * (place + 1) + term) % PRIME
        shares[place] = value.to_bytes(SHARE_BYTES, "big")
    return shares


def join(shares: Mapping[int, bytes], threshold: int, right: Callable[[bytes], bool]) -> bytes:
    """Rebuild the secret for which ``right`` holds, passing over shares that lie.

    Raises
    ------
    ParcelError
        When there are fewer shares than the threshold, or no set of them that was tried makes the secret.
    """
    if len(shares) < threshold:
        raise ParcelError(f"{len(shares)} shares of a secret are there and {threshold} are needed")
    values = {place: _value(share) for place, share in shares.items()}
    for places in _sets(sorted(values), threshold):
        found = sum(weight * values[place] for place, weight in zip(places, _weights(places), strict=True)) % PRIME
        if found < 1 << 256:
            secret = found.to_bytes(SECRET_BYTES, "big")
            if right(secret):
                return secret
    raise ParcelError(f"{len(shares)} shares of a secret contradict each other or what was announced of it")


def _sets(places: list[int], threshold: int) -> Iterator[tuple[int, ...]]:
    """Sets of shares to try: all where they are few, else neighbours on a ring, then random ones.

    In order, all the first sets would hold the first share; on the ring no share is in all of them.
    """
    count = len(places)
    if comb(count, threshold) <= ATTEMPTS:
        yield from combinations(places, threshold)
        return
    for start in range(min(count, ATTEMPTS)):
        yield tuple(sorted((places + places)[start : start + threshold]))
    chance = random.Random(count)
    for _ in range(max(ATTEMPTS - count, 0)):
        yield tuple(sorted(chance.sample(places, threshold)))


def _value(share: bytes) -> int:
    if len(share) != SHARE_BYTES:
        raise ParcelError(f"a share has {len(share)} bytes where {SHARE_BYTES} are needed: truncated")
    value = int.from_bytes(share, "big")
    if value >= PRIME:
        raise ParcelError("a share lies outside the field: it was not made by splitting a secret")
    return value


@lru_cache(maxsize=4096)
def _weights(places: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights at 0, with one inversion for all of them (Montgomery's trick)."""
    points = [place + 1 for place in places]
    whole = prod(points) % PRIME
    below = [one * prod(other - one for other in points if other != one) % PRIME for one in points]
    before = [1]
    for value in below:
        before.append(before[-1] * value % PRIME)
    inverse, weights = pow(before[-1], -1, PRIME), []
    for place in reversed(range(len(points))):
        weights.append(whole * inverse * before[place] % PRIME)
        inverse = inverse * below[place] % PRIME
    return tuple(reversed(weights))
