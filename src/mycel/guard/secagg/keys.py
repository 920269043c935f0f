"""Keys that two parties agree on through a third, what is sealed under them, and masks drawn from them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from mycel.errors import ParcelError

KEY_BYTES = 32
NONCE_BYTES = 12
PIECE = 1 << 17  # bytes of a mask that are made at once: they stay in a core's cache

Ring = NDArray[np.unsignedinteger]


def new_secret() -> bytes:
    """Return 32 bytes that nobody can guess; they serve as a private key or as a seed."""
    return os.urandom(KEY_BYTES)


def public_key(secret: bytes) -> bytes:
    """Return the public half of a private key."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agree(secret: bytes, public: bytes, purpose: bytes) -> bytes:
    """Return the 32 bytes that the holders of two key pairs share for one purpose (X25519, HKDF-SHA256).

    Raises
    ------
    ParcelError
        When ``public`` is no key of this kind.
    """
    return next(agree_each(secret, [public], purpose))


def agree_each(secret: bytes, publics: Iterable[bytes], purpose: bytes) -> Iterator[bytes]:
    """Yield what ``agree`` returns for each of several public keys; the private one is read once."""
    own = X25519PrivateKey.from_private_bytes(secret)
    for public in publics:
        if len(public) != KEY_BYTES:
            raise ParcelError(f"a public key has {len(public)} bytes; an X25519 key has {KEY_BYTES}")
        try:
            shared = own.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            raise ParcelError("a public key is of the wrong kind: nothing can be agreed on with it") from error
        yield HKDF(SHA256(), KEY_BYTES, None, purpose).derive(shared)


def encrypt(key: bytes, text: bytes, about: bytes) -> bytes:
    """Seal ``text`` so that only holders of ``key`` read it and nobody changes it or says it is about another thing."""
    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, text, about)


def decrypt(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """Inverse of ``encrypt``.

    Raises
    ------
    ParcelError
        When the text was cut, changed, replayed from another round or sealed under another key.
    """
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], about)
    except (InvalidTag, ValueError) as error:
        raise ParcelError("a sealed share does not open: it was truncated, changed or replayed") from error


def digest(*parts: bytes) -> bytes:
    """SHA-256 over parts whose bounds count."""
    state = Hash(SHA256())
    for part in parts:
        state.update(len(part).to_bytes(8, "big") + part)
    return state.finalize()


def add_mask(total: Ring, seed: bytes, sign: int) -> None:
    """Add to ``total``, or with ``sign`` -1 subtract in place, the mask that ``seed`` stands for (AES-128-CTR).

    Parameters
    ----------
    total : array
        Unsigned integers, flat; sums wrap around at their width. The same seed makes the same bytes on every machine.
    """
    stream = Cipher(AES(seed[:16]), CTR(bytes(16))).encryptor()
    kind = np.dtype(f"<u{total.itemsize}")
    combine = np.add if sign > 0 else np.subtract
    step = PIECE // total.itemsize
    zeros, room = memoryview(bytes(PIECE)), bytearray(PIECE + 15)
    for start in range(0, total.size, step):
        piece = total[start : start + step]
        stream.update_into(zeros[: piece.nbytes], room)
        combine(piece, np.frombuffer(room, dtype=kind, count=len(piece)), out=piece)
