"""Sums of encrypted updates: CKKS by ``tenseal``, for parties that share a key which the coordinator lacks.

Cheon et al. 2017. The coordinator adds ciphertexts and sends the sum back; who holds the secret key decrypts. Compared
with masks there are no messages before or after, and any party may leave at any time; the price is bytes, time, and an
error of the encoding (``benchmarks/guard.py``). It hides nothing from a coordinator that works with one of the parties,
for all share one key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mycel.errors import ExtraMissing, ParcelError

DEGREE = 8192
MODULI = (60, 40, 60)
SCALE = 2**40
SLOTS = DEGREE // 2  # numbers in one ciphertext


@dataclass(frozen=True)
class Keys:
    """Serialised contexts: what parties hold, and what the coordinator may."""

    party: bytes
    coordinator: bytes


def make_keys() -> Keys:
    """Return new keys; whoever makes them hands ``party`` to the parties alone."""
    tenseal = _tenseal()
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=list(MODULI))
    context.global_scale = SCALE
    needed = {"save_galois_keys": False, "save_relin_keys": False}  # nothing is rotated or multiplied
    secret = context.serialize(save_secret_key=True, **needed)
    context.make_context_public()
    return Keys(secret, context.serialize(**needed))


def encrypt(keys: bytes, vector: Tensor) -> list[bytes]:
    """Encrypt a flat float tensor, ``SLOTS`` numbers to a ciphertext."""
    tenseal, context = _tenseal(), _context(keys)
    pieces = torch.split(vector.detach().double().reshape(-1), SLOTS)
    return [tenseal.ckks_vector(context, piece.tolist()).serialize() for piece in pieces]


def add(keys: bytes, vectors: Sequence[Sequence[bytes]]) -> list[bytes]:
    """Add encrypted vectors; needs no secret.

    Raises
    ------
    ParcelError
        When a ciphertext is damaged, of another context, or vectors differ in length.
    """
    if len({len(vector) for vector in vectors}) != 1:
        raise ParcelError(f"encrypted vectors of {sorted({len(vector) for vector in vectors})} pieces do not add up")
    tenseal, context = _tenseal(), _context(keys)
    sums = []
    for pieces in zip(*vectors, strict=True):
        try:
            total = tenseal.ckks_vector_from(context, pieces[0])
            for piece in pieces[1:]:
                total += tenseal.ckks_vector_from(context, piece)
        except (ValueError, RuntimeError) as error:
            raise ParcelError(f"a ciphertext is damaged or made under another key: {str(error)[:80]}") from error
        sums.append(total.serialize())
    return sums


def decrypt(keys: bytes, pieces: Sequence[bytes]) -> Tensor:
    """Return the float32 vector that ciphertexts hold.

    Raises
    ------
    ParcelError
        When the keys hold no secret or a ciphertext is damaged.
    """
    tenseal, context = _tenseal(), _context(keys)
    if not context.has_secret_key():
        raise ParcelError("these keys encrypt and add; only a party's decrypt")
    try:
        values = [number for piece in pieces for number in tenseal.ckks_vector_from(context, piece).decrypt()]
    except (ValueError, RuntimeError) as error:
        raise ParcelError(f"a ciphertext is damaged or made under another key: {str(error)[:80]}") from error
    return torch.tensor(values, dtype=torch.float32)


def _context(keys: bytes) -> Any:
    try:
        return _tenseal().context_from(keys)
    except (ValueError, RuntimeError) as error:
        raise ParcelError("these are no CKKS keys: of the wrong kind, or damaged") from error


def _tenseal() -> Any:
    try:
        import tenseal
    except ImportError as error:
        raise ExtraMissing("tenseal", "homomorphic") from error
    return tenseal
