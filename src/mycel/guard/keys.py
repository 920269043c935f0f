"""Who is who in a federation: an authority, the coordinator's certificate, and one key for each party.

A party's bundle is one PEM file - its private key, its certificate, and the authority's certificate - which is all it
needs to find the right coordinator and to be known there. Keys lie on the curve P-384, which Flower asks for; files
that hold one are readable by their owner alone.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mycel.errors import RunError

DAYS = 365
Certificate = x509.Certificate


@dataclass(frozen=True)
class Identity:
    """A private key, its certificate, and the certificate of the authority that signed it."""

    key: ec.EllipticCurvePrivateKey
    certificate: Certificate
    authority: Certificate

    @property
    def name(self) -> str:
        """Whom the certificate names."""
        return name_of(self.certificate)

    def to_pem(self) -> bytes:
        """Return the bundle."""
        return pem(self.key) + pem(self.certificate) + pem(self.authority)

    def save(self, path: Path) -> None:
        """Write the bundle, readable by its owner alone; a file that is there is never replaced."""
        write_secret(path, self.to_pem())

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Read a bundle and check that its parts belong together."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise RunError(f"the key file {str(path)!r} cannot be read: {error.strerror}") from error
        if path.stat().st_mode & 0o077:
            raise RunError(f"the key file {str(path)!r} can be read by others: chmod 600 {path}")
        try:
            key = load_pem_private_key(content, None)
            certificate, authority = x509.load_pem_x509_certificates(content)
        except (ValueError, TypeError) as error:
            raise RunError(
                f"{str(path)!r} is no bundle of a key, its certificate and the authority's: {error}"
            ) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp384r1":
            raise RunError(f"the key in {str(path)!r} is not on the curve P-384: make one with `mycel keys`")
        if spki(key.public_key()) != spki(certificate.public_key()) or not signed_by(certificate, authority):
            raise RunError(f"the key and certificates in {str(path)!r} do not belong together")
        return cls(key, certificate, authority)


def name_of(certificate: Certificate) -> str:
    """Return the common name."""
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def spki(key: object) -> bytes:
    """Return a public key in the form in which Flower's nodes state it: PEM."""
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def pem(part: ec.EllipticCurvePrivateKey | Certificate) -> bytes:
    """Write a key or a certificate as PEM."""
    if isinstance(part, Certificate):
        return part.public_bytes(Encoding.PEM)
    return part.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def openssh_private(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as Flower's nodes read it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def openssh_public(key: bytes) -> bytes:
    """Return a public key, given as PEM, as Flower's commands read it."""
    return load_pem_public_key(key).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def signed_by(certificate: Certificate, authority: Certificate) -> bool:
    """Whether ``authority`` issued ``certificate``."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def in_date(certificate: Certificate, now: datetime | None = None) -> bool:
    """Whether a certificate is valid at this moment."""
    now = now or datetime.now(UTC)
    return certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc


def make_authority(name: str = "mycel", days: float = 10 * DAYS) -> Identity:
    """Make the key and the certificate that all others of a federation rest on."""
    key = ec.generate_private_key(ec.SECP384R1())
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    builder = _builder(name, name, key, days).add_extension(x509.BasicConstraints(True, 0), critical=True)
    certificate = builder.add_extension(usage, critical=True).sign(key, hashes.SHA384())
    return Identity(key, certificate, certificate)


def issue(authority: Identity, name: str, hosts: Sequence[str] = (), days: float = DAYS) -> Identity:
    """Issue a certificate: for a server that answers under ``hosts``, or without hosts for a party."""
    key = ec.generate_private_key(ec.SECP384R1())
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = (
        _builder(name, authority.name, key, days)
        .add_extension(x509.BasicConstraints(False, None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    return Identity(key, builder.sign(authority.key, hashes.SHA384()), authority.certificate)


def _builder(name: str, issuer: str, key: ec.EllipticCurvePrivateKey, days: float) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_common_name(name))
        .issuer_name(_common_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5) + min(timedelta(days=days), timedelta(0)))
        .not_valid_after(now + timedelta(days=days))
    )


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read; refuse to replace one."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise RunError(
            f"{str(path)!r} exists: keys are never overwritten; remove it first, or choose another folder"
        ) from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
