"""A swarm on disk: its name, its authority, where members meet, and the invitations that let others in."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from mycel.engines.identity import NAME, Authority, Identity, write_secret
from mycel.engines.peers import Peers
from mycel.errors import EngineError

FILE = "swarm.json"
MOST_ROUTERS = 16


@dataclass(frozen=True)
class Swarm:
    """What a member's folder says.

    Attributes
    ----------
    folder : Path
        Holds ``swarm.json`` and either the authority with its key, or one member's credentials.
    name : str
        Of the swarm.
    routers : tuple of str
        ``host:port`` where members meet.
    """

    folder: Path
    name: str
    routers: tuple[str, ...]

    @classmethod
    def create(cls, folder: Path, meet: str) -> Swarm:
        """Make a new swarm whose members meet at ``host:port``; who holds the folder lets others in.

        Raises
        ------
        EngineError
            When the folder holds something else already.
        """
        address(meet)
        if folder.exists() and any(folder.iterdir()):
            raise EngineError(f"{folder} is not empty: give a new folder for the swarm")
        folder.mkdir(parents=True, exist_ok=True)
        swarm = cls(folder, f"swarm-{secrets.token_hex(4)}", (meet,))
        Authority.new(swarm.name).save(folder)
        swarm._save()
        return swarm

    @classmethod
    def load(cls, folder: Path) -> Swarm:
        """Read a swarm's folder or an invitation."""
        try:
            said = json.loads((folder / FILE).read_text())
            name, routers = said["name"], tuple(said["routers"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise EngineError(f"{folder} is no swarm's folder (`mycel swarm {folder}` makes one): {error}") from error
        if not isinstance(name, str) or not NAME.fullmatch(name) or not 0 < len(routers) <= MOST_ROUTERS:
            raise EngineError(f"{folder / FILE} names no swarm and where it meets: make or fetch it again")
        for router in routers:
            address(router)
        return cls(folder, name, routers)

    def invite(self, member: str, hosts: tuple[str, ...] = ("localhost", "127.0.0.1")) -> Path:
        """Write a folder with which ``member`` can join from elsewhere; it is to be kept secret on the way."""
        identity = Authority.load(self.folder).issue(member, hosts)
        folder = self.folder / "invitations" / member
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "authority.pem").write_bytes(identity.authority)
        (folder / "member.pem").write_bytes(identity.certificate)
        write_secret(folder / "member.key", identity.key)
        (folder / "member").write_text(member)
        Swarm(folder, self.name, self.routers)._save()
        return folder

    def identity(self, member: str = "") -> Identity:
        """Return the credentials in this folder; who holds the authority gets new ones under ``member``."""
        if (self.folder / "authority.key").is_file():
            hosts = ("localhost", "127.0.0.1", *dict.fromkeys(address(router)[0] for router in self.routers))
            return Authority.load(self.folder).issue(member or f"peer-{os.getpid()}-{secrets.token_hex(2)}", hosts)
        try:
            parts = [(self.folder / name).read_bytes() for name in ("authority.pem", "member.pem", "member.key")]
            return Identity((self.folder / "member").read_text().strip(), *parts)
        except OSError as error:
            raise EngineError(
                f"{self.folder} holds neither an authority nor a member's credentials: {error}"
            ) from error

    async def join(self, member: str = "", listen: str = "", router: bool = False) -> Peers:
        """Join as a member.

        Parameters
        ----------
        member : str
            Name; without effect where an invitation says it.
        listen : str
            ``host:port`` to be reached at directly; empty: outbound only.
        router : bool
            Be the place where members meet: listens at the swarm's first address.
        """
        from mycel.engines.peers_zenoh import ZenohPeers

        if router:
            return await ZenohPeers.join(self.identity(member), self.name, (), self.routers[0], router=True)
        return await ZenohPeers.join(self.identity(member), self.name, self.routers, listen)

    def _save(self) -> None:
        (self.folder / FILE).write_text(json.dumps({"name": self.name, "routers": list(self.routers)}, indent=2))


def address(text: object) -> tuple[str, int]:
    """Return host and port of ``host:port``; ``EngineError`` when it is none."""
    host, colon, port = str(text).rpartition(":")
    if not isinstance(text, str) or not colon or not host or not port.isdigit() or not 0 <= int(port) < 1 << 16:
        raise EngineError(f"the address is {str(text)[:80]!r}: host:port is needed, such as 127.0.0.1:7447")
    return host, int(port)
