"""A federation's folder of keys.

authority.pem        the authority's key and certificate; needed only to admit parties, best kept off the network
authority.crt        its certificate
coordinator.pem      the coordinator's key and certificate
parties/NAME.pem     one bundle for each party, to be handed over and then removed here
admitted/NNN-NAME.crt  certificates of the parties that may join, in the order in which they were admitted
operators/NAME.pem   one bundle for each who may run recipes from another machine, to be handed over likewise
operators/NAME.crt   its certificate
revoked/             certificates that were admitted once
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509

from mycel.errors import RunError
from mycel.guard.keys import (
    DAYS,
    Certificate,
    Identity,
    in_date,
    issue,
    make_authority,
    name_of,
    pem,
    signed_by,
    spki,
    write_secret,
)
from mycel.run.folder import write_bytes

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass
class Keyring:
    """The folder."""

    path: Path
    _read: tuple[int, dict[str, Certificate]] = field(default=(0, {}), repr=False)

    @classmethod
    def make(
        cls, path: Path, hosts: Sequence[str], parties: Sequence[str], days: float = DAYS, authority: Path | None = None
    ) -> Keyring:
        """Make a federation's keys; ``authority`` is an existing bundle to rest them on."""
        ring = cls(path)
        root = Identity.load(authority) if authority else make_authority()
        write_secret(path / "authority.pem", root.to_pem())
        (path / "authority.crt").write_bytes(pem(root.certificate))
        issue(root, "coordinator", hosts, days).save(path / "coordinator.pem")
        for folder in ("admitted", "revoked"):
            (path / folder).mkdir(mode=0o700)
        for name in parties:
            ring.add(name, days)
        return ring

    def add(self, name: str, days: float = DAYS) -> Path:
        """Make a party's bundle and admit it; return where the bundle lies."""
        self._check(name)
        identity = issue(Identity.load(self.path / "authority.pem"), name, days=days)
        path = self.path / "parties" / f"{name}.pem"
        identity.save(path)
        self._admit(name, identity.certificate)
        return path

    def add_operator(self, name: str, days: float = DAYS) -> Path:
        """Make a bundle for one who may run recipes from another machine; return where it lies."""
        self._check(name)
        identity = issue(Identity.load(self.path / "authority.pem"), name, days=days)
        path = self.path / "operators" / f"{name}.pem"
        identity.save(path)
        write_bytes(path.with_suffix(".crt"), pem(identity.certificate))
        return path

    def operators(self) -> dict[str, bytes]:
        """Return the public keys of the operators, by name."""
        found = {path.stem: _certificate(path) for path in (self.path / "operators").glob("*.crt")}
        return {
            name: spki(certificate.public_key())
            for name, certificate in found.items()
            if signed_by(certificate, self.authority) and in_date(certificate)
        }

    def admit(self, path: Path) -> str:
        """Admit a party by a certificate that the authority has signed elsewhere; return its name."""
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError) as error:
            raise RunError(f"{str(path)!r} is no certificate: {error}") from error
        if not signed_by(certificate, self.authority):
            raise RunError(f"the certificate {str(path)!r} was not issued by this federation's authority")
        name = name_of(certificate)
        self._check(name)
        self._admit(name, certificate)
        return name

    def revoke(self, name: str) -> None:
        """Admit a party or an operator no longer; a coordinator that is running takes notice by itself."""
        operator = self.path / "operators" / f"{name}.crt"
        if operator.exists():
            (self.path / "revoked" / "operators").mkdir(mode=0o700, exist_ok=True)
            operator.rename(self.path / "revoked" / "operators" / operator.name)
            return
        for path in self._admitted():
            if _name(path) == name:
                path.rename(self.path / "revoked" / path.name)
                return
        raise RunError(f"there is no admitted party {name!r}: {', '.join(map(_name, self._admitted())) or 'none is'}")

    @property
    def authority(self) -> Certificate:
        """The authority's certificate."""
        return x509.load_pem_x509_certificate((self.path / "authority.crt").read_bytes())

    def parties(self) -> dict[str, bytes]:
        """Return the public keys of all who may join now, by name, in the order of admission."""
        changed = (self.path / "admitted").stat().st_mtime_ns
        if changed != self._read[0]:  # looked up for each request, so read only when it has changed
            self._read = (
                changed,
                {
                    _name(path): certificate
                    for path in self._admitted()
                    if signed_by(certificate := _certificate(path), self.authority)
                },
            )
        return {
            name: spki(certificate.public_key()) for name, certificate in self._read[1].items() if in_date(certificate)
        }

    def _check(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise RunError(f"a party cannot be called {name!r}: letters, digits, '_', '.' and '-' only")
        if name in map(_name, self._admitted()) or (self.path / "operators" / f"{name}.crt").exists():
            raise RunError(f"there is a party {name!r} already: revoke it first, or choose another name")

    def _admit(self, name: str, certificate: Certificate) -> None:
        used = [int(path.name[:3]) for folder in ("admitted", "revoked") for path in (self.path / folder).glob("*.crt")]
        # Whole or not at all: a coordinator that is running looks into the folder at each request.
        write_bytes(self.path / "admitted" / f"{max(used, default=-1) + 1:03}-{name}.crt", pem(certificate))

    def _admitted(self) -> list[Path]:
        return sorted((self.path / "admitted").glob("[0-9][0-9][0-9]-*.crt"))


def _certificate(path: Path) -> Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def _name(path: Path) -> str:
    return path.name[4:].removesuffix(".crt")
