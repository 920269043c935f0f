"""A simulated enclave: a process of its own, with a call gate, attestation by measurement, and sealed memory.

Nothing here protects against the owner of the machine, who can read any process's memory: hardware does that (SGX, TDX,
SEV). What is real is the interface, so that whoever works with this one works with those:

- *measurement*: the SHA-256 of the program that the enclave runs and of its settings.
- *attestation*: the platform signs (measurement, the enclave's key, the verifier's nonce); the verifier checks the
  signature, its own nonce, and that the measurement is one it knows, before it trusts the key.
- *channel*: X25519 with that key, then AES-GCM with counters, so that nothing is read, changed or replayed on the way.
- *call gate*: only the program's ``calls`` can be called; arguments and results are parcels.
- *sealed memory*: what the enclave hands out to be stored opens only in an enclave of the same measurement on the same
  platform.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import multiprocessing
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from mycel.errors import EngineError, MycelError, ParcelError
from mycel.guard.secagg.keys import agree, decrypt, digest, encrypt, new_secret, public_key
from mycel.wire.parcel import Parcel

Call = Callable[[dict[str, Any], Parcel], Parcel]
LARGEST = 1 << 28


@dataclass(frozen=True)
class Program:
    """What an enclave runs.

    Attributes
    ----------
    calls : mapping
        The gate: importable functions of (memory, argument) to a result.
    settings : mapping
        JSON; part of the measurement.
    """

    calls: Mapping[str, Call]
    settings: Mapping[str, Any]

    def measurement(self) -> str:
        """SHA-256 over the source of every call and the settings."""
        sources = {
            name: inspect.getsource(inspect.getmodule(call) or call) for name, call in sorted(self.calls.items())
        }
        return hashlib.sha256(json.dumps([sources, dict(self.settings)], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Quote:
    """A platform's word for an enclave."""

    measurement: str
    key: bytes
    nonce: bytes
    signature: bytes

    def content(self) -> bytes:
        """What is signed."""
        return digest(self.measurement.encode(), self.key, self.nonce)

    def to_bytes(self) -> bytes:
        """Write it as JSON."""
        parts = {"key": self.key.hex(), "nonce": self.nonce.hex(), "signature": self.signature.hex()}
        return json.dumps({"measurement": self.measurement, **parts}).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Quote:
        """Inverse of ``to_bytes``."""
        try:
            found = json.loads(content)
            return cls(str(found["measurement"]), *(bytes.fromhex(found[key]) for key in ("key", "nonce", "signature")))
        except (ValueError, LookupError, TypeError) as error:
            raise ParcelError(f"what came is no attestation: {str(error)[:60]}") from error


class Platform:
    """Stands for the processor: holds the key that signs, and the one that memory is sealed under.

    Parameters
    ----------
    phrase : bytes
        Makes both keys the same wherever it is known, which is to say that it protects nothing; empty: new ones.
    """

    def __init__(self, phrase: bytes = b"") -> None:
        signing = digest(b"signing", phrase) if phrase else new_secret()
        self._signing = Ed25519PrivateKey.from_private_bytes(signing)
        self._sealing = digest(b"sealing", phrase) if phrase else new_secret()

    @property
    def public(self) -> bytes:
        """The key that verifiers know."""
        return self._signing.public_key().public_bytes_raw()

    def start(self, program: Program) -> Enclave:
        """Start a program in an enclave of its own."""
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        secrets = self._signing.private_bytes_raw(), digest(self._sealing, program.measurement().encode())
        process = context.Process(target=_serve, args=(theirs, program, *secrets), daemon=True)
        process.start()
        theirs.close()
        return Enclave(ours, process)


@dataclass
class Enclave:
    """The outside of an enclave: it carries bytes and can read none of them."""

    connection: Connection
    process: multiprocessing.process.BaseProcess

    def quote(self, nonce: bytes) -> Quote:
        """Ask for attestation."""
        return Quote.from_bytes(self._exchange(b"quote", nonce))

    def carry(self, hello: bytes, sealed: bytes) -> bytes:
        """Carry a sealed call in and its sealed result out."""
        return self._exchange(b"call", hello, sealed)

    def _exchange(self, *parts: bytes) -> bytes:
        try:
            for part in (str(len(parts)).encode(), *parts):
                self.connection.send_bytes(part)
            verdict, answer = self.connection.recv_bytes(), self.connection.recv_bytes(LARGEST)
        except (EOFError, OSError) as error:
            raise EngineError("the enclave has ended: start it again and attest it anew") from error
        if verdict != b"done":
            raise ParcelError(answer.decode())
        return answer

    def close(self) -> None:
        """End the enclave; what it did not seal is lost."""
        self.connection.close()
        self.process.terminate()
        self.process.join()


class Visitor:
    """A verified channel into an enclave.

    Parameters
    ----------
    platform : bytes
        Public key of the platform that is trusted.
    known : collection of str
        Measurements that are trusted.

    Raises
    ------
    ParcelError
        When the quote is not this platform's, answers another's nonce, or names an unknown measurement.
    """

    def __init__(self, enclave: Enclave, platform: bytes, known: Collection[str]) -> None:
        nonce = os.urandom(32)
        quote = enclave.quote(nonce)
        verify(quote, platform, nonce, known)
        secret = new_secret()
        self._enclave, self._hello = enclave, public_key(secret)
        self._key = agree(secret, quote.key, b"enclave")
        self._count = 0

    def call(self, name: str, argument: Parcel | None = None) -> Parcel:
        """Pass the gate: call one of the program's functions."""
        self._count += 1
        found = self._enclave.carry(self._hello, _sealed(self._key, name, argument or Parcel("call"), self._count))
        return Parcel.from_bytes(decrypt(self._key, found, digest(b"out", str(self._count).encode())))


def verify(quote: Quote, platform: bytes, nonce: bytes, known: Collection[str]) -> None:
    """Refuse a quote with ``ParcelError`` that is not the platform's, not about ``nonce``, or of an unknown program."""
    try:
        Ed25519PublicKey.from_public_bytes(platform).verify(quote.signature, quote.content())
    except InvalidSignature as error:
        raise ParcelError("the attestation is not signed by the platform that is trusted: refused") from error
    if quote.nonce != nonce:
        raise ParcelError("the attestation answers another's question: replayed, refused")
    if quote.measurement not in known:
        raise ParcelError(f"the enclave runs {quote.measurement[:12]}, which is none of the programs that are trusted")


def sealed_call(secret: bytes, key: bytes, name: str, argument: Parcel) -> bytes:
    """Write a visitor's first call, for somebody else to carry: ``key`` is the enclave's, out of a verified quote."""
    return _sealed(agree(secret, key, b"enclave"), name, argument, 1)


def _sealed(key: bytes, name: str, argument: Parcel, count: int) -> bytes:
    frame = argument.to_bytes()
    head = json.dumps({"name": name, "size": len(frame)}).encode()
    return encrypt(key, len(head).to_bytes(4, "big") + head + frame, digest(b"in", str(count).encode()))


def seal(memory: Mapping[str, Any], parcel: Parcel) -> bytes:
    """Inside: make a parcel storable outside."""
    return encrypt(memory["sealing"], parcel.to_bytes(), b"sealed")


def unseal(memory: Mapping[str, Any], sealed: bytes) -> Parcel:
    """Inside: inverse of ``seal``; another program's or another platform's does not open."""
    return Parcel.from_bytes(decrypt(memory["sealing"], sealed, b"sealed"))


def _serve(connection: Connection, program: Program, signing: bytes, sealing: bytes) -> None:
    secret = new_secret()
    key, measured = public_key(secret), program.measurement()
    platform = Ed25519PrivateKey.from_private_bytes(signing)
    memory: dict[str, Any] = {"sealing": sealing, "settings": dict(program.settings)}
    counts: dict[bytes, int] = {}
    while True:
        try:
            parts = [connection.recv_bytes(LARGEST) for _ in range(int(connection.recv_bytes()))]
        except (EOFError, OSError):
            return
        try:
            if parts[0] == b"quote":
                quote = Quote(measured, key, parts[1], b"")
                answer = replace(quote, signature=platform.sign(quote.content())).to_bytes()
            else:
                answer = _gate(program, memory, agree(secret, parts[1], b"enclave"), counts, parts[1], parts[2])
            verdict = b"done"
        except MycelError as error:
            verdict, answer = b"refused", str(error).encode()
        except Exception as error:  # whatever a visitor's argument brings about ends its call, never the enclave
            verdict, answer = b"refused", f"the call is damaged: {type(error).__name__}: {error}"[:200].encode()
        connection.send_bytes(verdict)
        connection.send_bytes(answer)


def _gate(
    program: Program, memory: dict[str, Any], key: bytes, counts: dict[bytes, int], visitor: bytes, sealed: bytes
) -> bytes:
    count = counts.get(visitor, 0) + 1
    text = decrypt(key, sealed, digest(b"in", str(count).encode()))
    counts[visitor] = count
    length = int.from_bytes(text[:4], "big")
    name = str(json.loads(text[4 : 4 + length])["name"])
    if name not in program.calls:
        raise ParcelError(f"{name[:40]!r} is no call of this enclave: {', '.join(sorted(program.calls))}")
    result = program.calls[name](memory, Parcel.from_bytes(text[4 + length :]))
    return encrypt(key, result.to_bytes(), digest(b"out", str(count).encode()))
