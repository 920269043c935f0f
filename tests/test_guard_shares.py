"""Shared secrets: any so many shares rebuild one, fewer say nothing, and lies are passed over."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from mycel.errors import ParcelError
from mycel.guard.secagg.keys import new_secret
from mycel.guard.secagg.shamir import PRIME, join, split


@settings(max_examples=30, deadline=None, derandomize=True)
@given(some.binary(min_size=32, max_size=32), some.integers(1, 12), some.data())
def test_any_threshold_of_shares_rebuilds_a_secret(secret: bytes, threshold: int, data: some.DataObject) -> None:
    shares = split(secret, range(12), threshold)
    kept = data.draw(some.permutations(range(12)))[:threshold]
    assert join({node: shares[node] for node in kept}, threshold, lambda found: found == secret) == secret
    if threshold > 1:
        with pytest.raises(ParcelError, match="are needed"):
            join({node: shares[node] for node in kept[1:]}, threshold, lambda found: True)


def test_fewer_shares_than_the_threshold_fit_every_secret() -> None:
    """For two points of a line, one share and any secret there is a second share: the one says nothing."""
    (share,) = split(bytes(32), [4], 1).values()
    value = int.from_bytes(split(new_secret(), [4, 5], 2)[4], "big")
    for secret in (0, 12345, (1 << 256) - 1):
        slope = (value - secret) * pow(5, -1, PRIME) % PRIME
        other = ((secret + 6 * slope) % PRIME).to_bytes(33, "big")
        found = join({4: value.to_bytes(33, "big"), 5: other}, 2, lambda _: True)
        assert int.from_bytes(found, "big") == secret
    assert int.from_bytes(share, "big") == 0


def test_lying_shares_are_passed_over_and_too_many_refused() -> None:
    secret = new_secret()
    shares = split(secret, range(6), 3)
    shares[1] = split(new_secret(), range(6), 3)[1]
    assert join(shares, 3, lambda found: found == secret) == secret
    lying = {**split(new_secret(), range(6), 3), 0: shares[0]}
    with pytest.raises(ParcelError, match="contradict"):
        join(lying, 3, lambda found: found == secret)
