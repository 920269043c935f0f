"""Who may take part in a swarm: an authority, its members' certificates, and announcements they sign."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mycel.errors import EngineError, ExtraMissing

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    INSTALLED = True
except ImportError:
    INSTALLED = False

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
YEARS = 10
LARGEST_ANNOUNCEMENT = 1 << 16  # bytes
SKEW = 120.0  # seconds by which two machines' clocks may differ


@dataclass(frozen=True)
class Identity:
    """A member's credentials.

    Attributes
    ----------
    name : str
        Lower-case letters, digits and '-'; the certificate says the same.
    authority, certificate, key : bytes
        PEM: the swarm's authority, the member's certificate and its private key.
    """

    name: str
    authority: bytes
    certificate: bytes
    key: bytes

    def sign(self, facts: dict[str, Any], lease: float) -> bytes:
        """Return an announcement of ``facts`` that holds for ``lease`` seconds."""
        _need()
        text = json.dumps({"name": self.name, "facts": facts, "issued": time.time_ns(), "lease": lease})
        key: Any = serialization.load_pem_private_key(self.key, None)
        signature = key.sign(text.encode(), ec.ECDSA(hashes.SHA256()))
        frame = {"text": text, "signature": _text(signature), "certificate": self.certificate.decode()}
        return json.dumps(frame).encode()


@dataclass(frozen=True)
class Announcement:
    """What a member says of itself, its signature checked."""

    name: str
    facts: dict[str, Any]
    issued: int
    lease: float


class Authority:
    """Issues members' certificates for one swarm."""

    def __init__(self, certificate: bytes, key: bytes) -> None:
        self.certificate, self.key = certificate, key

    @classmethod
    def new(cls, swarm: str) -> Authority:
        """Make an authority for a new swarm."""
        _need()
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"mycel swarm {swarm}")])
        builder = _builder(name, name, key.public_key())
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        return cls(_pem(builder.sign(key, hashes.SHA256())), _key_pem(key))

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """Read ``authority.pem`` and ``authority.key``."""
        try:
            return cls((folder / "authority.pem").read_bytes(), (folder / "authority.key").read_bytes())
        except OSError as error:
            raise EngineError(f"{folder} holds no swarm's authority: {error}") from error

    def save(self, folder: Path) -> None:
        """Write the two files; only the owner may read the key."""
        (folder / "authority.pem").write_bytes(self.certificate)
        write_secret(folder / "authority.key", self.key)

    def issue(self, name: str, hosts: tuple[str, ...] = ("localhost", "127.0.0.1")) -> Identity:
        """Return credentials for a member that others may reach under ``hosts``."""
        _need()
        if not NAME.fullmatch(name):
            raise EngineError(
                f"the member's name is {name[:80]!r}: up to 63 lower-case letters, digits and '-' will do"
            )
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = x509.load_pem_x509_certificate(self.certificate)
        signer: Any = serialization.load_pem_private_key(self.key, None)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(subject, issuer.subject, key.public_key())
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = builder.add_extension(uses, critical=False)
        return Identity(name, self.certificate, _pem(builder.sign(signer, hashes.SHA256())), _key_pem(key))


def verified(frame: bytes, authority: bytes) -> Announcement:
    """Check an announcement against the swarm's authority.

    Raises
    ------
    EngineError
        When it is not signed by a member, says another's name, is stale or is no announcement at all.
    """
    _need()
    if len(frame) > LARGEST_ANNOUNCEMENT:
        raise EngineError(f"an announcement of {len(frame):,} bytes; at most {LARGEST_ANNOUNCEMENT:,} are accepted")
    try:
        envelope = json.loads(frame)
        text = envelope["text"].encode()
        certificate = x509.load_pem_x509_certificate(envelope["certificate"].encode())
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
        key: Any = certificate.public_key()
        key.verify(base64.b64decode(envelope["signature"]), text, ec.ECDSA(hashes.SHA256()))
        said = json.loads(text)
        found = Announcement(said["name"], said["facts"], said["issued"], float(said["lease"]))
        common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    except (InvalidSignature, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError(f"an announcement that no member of this swarm signed: {type(error).__name__}") from error
    if found.name != common or not isinstance(found.facts, dict) or type(found.issued) is not int:
        raise EngineError(f"an announcement in the name of {str(found.name)[:60]!r}, signed by {str(common)[:60]!r}")
    age = time.time() - found.issued / 1e9
    if not 0 < found.lease <= 3600 or not -SKEW <= age <= found.lease + SKEW:
        why = f"old ones do not count, and clocks may differ by {SKEW:.0f} s"
        raise EngineError(f"an announcement of {found.name!r} that is {age:.0f} s old, for {found.lease:.0f} s: {why}")
    return found


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _need() -> None:
    if not INSTALLED:
        raise ExtraMissing("cryptography", "swarm")


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=365 * YEARS))
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
