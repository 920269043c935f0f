"""Sums of encrypted vectors: near the plain sum, opaque to the coordinator, and refusing what is not theirs."""

from __future__ import annotations

import pytest
import torch

from mycel.errors import ParcelError
from mycel.guard.ckks import SLOTS, Keys, add, decrypt, encrypt, make_keys


@pytest.fixture(scope="module")
def keys() -> Keys:
    return make_keys()


def test_encrypted_sums_are_near_plain_sums(keys: Keys) -> None:
    source = torch.Generator().manual_seed(1)
    vectors = [0.1 * torch.randn(SLOTS + 100, generator=source) for _ in range(3)]
    total = decrypt(keys.party, add(keys.coordinator, [encrypt(keys.coordinator, vector) for vector in vectors]))
    assert float((total - sum(vectors)).abs().max()) < 1e-3


def test_the_coordinator_decrypts_nothing_and_ciphertexts_differ(keys: Keys) -> None:
    one, again = (encrypt(keys.coordinator, torch.zeros(8)) for _ in range(2))
    assert one != again
    with pytest.raises(ParcelError, match="only a party's"):
        decrypt(keys.coordinator, one)


def test_damaged_ciphertexts_and_keys_of_the_wrong_kind_are_refused(keys: Keys) -> None:
    (piece,) = encrypt(keys.coordinator, torch.zeros(8))
    with pytest.raises(ParcelError, match="damaged"):
        add(keys.coordinator, [[piece], [piece[: len(piece) // 2]]])
    with pytest.raises(ParcelError, match="wrong kind"):
        encrypt(b"not a key", torch.zeros(8))
    with pytest.raises(ParcelError, match="pieces"):
        add(keys.coordinator, [[piece], [piece, piece]])
