"""``mycel coordinator``: a SuperLink on the loopback, the gate before it, and the list of who may join."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from mycel.engines import children
from mycel.engines.children import LOOPBACK
from mycel.engines.flower import launch
from mycel.errors import EngineError, MycelError, RunError
from mycel.federation.desk import Desk
from mycel.federation.keyring import Keyring
from mycel.federation.place import Post, state_folder, write_post
from mycel.guard.gates import CoordinatorGate, OpenGate, client_context, server_context
from mycel.guard.keys import Identity, issue, make_authority, openssh_public, pem
from mycel.run.folder import write_json
from mycel.wire.policy import Policy
from mycel.wire.relay import Relay

TICK = 1.0  # seconds between looks at who is admitted and whether the SuperLink is there
logger = logging.getLogger("mycel.coordinator")


@dataclass
class Hub:
    """A coordinator.

    Parameters
    ----------
    address : str
        ``HOST:PORT`` at which parties are expected.
    keys : Path or None
        The federation's keys; None lets anyone join, in plain text.
    """

    address: str
    keys: Path | None
    _link: subprocess.Popen[bytes] | None = None
    _seats: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = state_folder("coordinators", self.address)
        self._ring = Keyring(self.keys) if self.keys else None
        self._line = Path(tempfile.mkdtemp(prefix="mycel-")) / "line"
        self._port = children.free_port()

    async def run(self, ready: asyncio.Event | None = None) -> None:
        """Serve until cancelled."""
        host, port = split(self.address)
        (self.folder / "coordinator.json").unlink(missing_ok=True)  # of one that was killed
        try:
            relay = self._relay()
            await self._start_link()
            server = await relay.start(host, port)
            logger.info("listening at %s", self.address)
            if ready is not None:
                ready.set()
            try:
                while True:
                    await asyncio.sleep(TICK)
                    try:
                        await self._look(relay)
                    except MycelError as error:  # parties that are there are not to lose their coordinator for it
                        logger.warning("%s: it is tried again", error)
            finally:
                server.close()
                await relay.close()
        finally:
            if self._link is not None:
                children.end(self._link)
            shutil.rmtree(self._line.parent, ignore_errors=True)
            (self.folder / "coordinator.json").unlink(missing_ok=True)

    def _relay(self) -> Relay:
        if self._ring is None or self.keys is None:
            return Relay((LOOPBACK, self._port), OpenGate())
        identity = Identity.load(self.keys / "coordinator.pem")
        if not self._ring.parties():
            raise RunError(f"nobody is admitted: `mycel keys add NAME --keys {self.keys}` makes a party's key")
        authority = self.folder / "authority.crt"
        authority.write_bytes(pem(identity.authority))
        policy: Policy = CoordinatorGate(
            self._ring.parties, lambda: self._seats, self._ring.operators, Desk(self.address, self._line).serve
        )
        server = server_context(self.keys / "coordinator.pem", authority)
        return Relay((LOOPBACK, self._port), policy, server, client_context(self._inner().authority))

    def _inner(self) -> launch.Certificates:
        """Return the certificates that the SuperLink and its gate use between themselves, made for this start."""
        folder = self._line.parent / "inner"
        files = launch.Certificates(folder / "server.crt", folder / "server.key", folder / "authority.crt")
        if not folder.exists():
            folder.mkdir(mode=0o700)
            root = make_authority("loopback")
            own = issue(root, "superlink", [LOOPBACK, "localhost"])
            for path, content in (
                (files.certificate, pem(own.certificate)),
                (files.key, pem(own.key)),
                (files.authority, pem(root.certificate)),
            ):
                path.touch(0o600)
                path.write_bytes(content)
        return files

    async def _start_link(self) -> None:
        # What an earlier SuperLink knew is of no use: a run whose line is cut goes on from its own checkpoint.
        for old in self.folder.glob("superlink.sqlite*"):
            old.unlink()
        self._seats = {}
        files = self._inner() if self._ring else None
        self._link = launch.superlink(self.folder, self._port, files, self._line)
        while not await asyncio.to_thread(_answers, self._port):
            if self._link.poll() is not None:
                words = (self.folder / "superlink.log").read_text(errors="replace")[-500:]
                raise EngineError(f"Flower's SuperLink did not start: {words}")
            await asyncio.sleep(0.2)
        await self._admit()

    async def _look(self, relay: Relay) -> None:
        assert self._link is not None
        if self._link.poll() is not None:
            logger.warning("the SuperLink has ended and is started again; `mycel run --resume` goes on with its run")
            if isinstance(relay.policy, CoordinatorGate):
                relay.policy.forget()
            await self._start_link()
        await self._admit()
        if isinstance(relay.policy, CoordinatorGate):
            traffic = {
                name: {"received": dict(found.received), "sent": dict(found.sent)}
                for name, found in relay.policy.traffic.items()
            }
            write_json(self.folder / "gate.json", {"traffic": traffic, "refused": dict(relay.refused)})

    async def _admit(self) -> None:
        """Make the SuperLink know exactly those who are admitted."""
        wanted = self._ring.parties() if self._ring else {}
        if self._ring is not None and wanted.keys() != self._seats.keys():
            for name in self._seats.keys() - wanted.keys():
                await asyncio.to_thread(launch.unregister, self.folder, self._seats.pop(name))
                logger.info("party %s is admitted no longer", name)
            for name, key in wanted.items():
                if name not in self._seats:
                    self._seats[name] = await asyncio.to_thread(self._register, key)
            self._seats = {name: self._seats[name] for name in wanted}
        elif (self.folder / "coordinator.json").exists():
            return
        write_post(self.address, Post(os.getpid(), str(self._line), self._ring is not None, self._seats))

    def _register(self, key: bytes) -> int:
        path = self._line.parent / "party.pub"
        path.write_bytes(openssh_public(key))
        return launch.register(self.folder, path)


def split(address: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise RunError(f"{address!r} is no address: write HOST:PORT, e.g. 0.0.0.0:7400")
    return host.strip("[]"), int(port)


def _answers(port: int) -> bool:
    try:
        socket.create_connection((LOOPBACK, port), 1).close()
    except OSError:
        return False
    return True
