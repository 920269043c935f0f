"""``mycel join``: a party's process. It works; its node speaks for it; nothing reaches it but through its own gate."""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

from mycel.engines import children
from mycel.engines.children import LOOPBACK
from mycel.engines.flower import launch
from mycel.engines.line import listen, serve
from mycel.engines.resident import PartyHost, Resident
from mycel.federation.hub import split
from mycel.federation.place import state_folder
from mycel.federation.pulse import Pulse
from mycel.guard.gates import PartyGate, client_context, server_context
from mycel.guard.keys import Identity, issue, make_authority, openssh_private, pem
from mycel.wire.relay import Relay

SOONEST, LATEST = 1.0, 10.0  # seconds after which a node that has ended is started again, doubling
logger = logging.getLogger("mycel.party")


@dataclass
class Seat:
    """A party's place in a federation.

    Parameters
    ----------
    address : str
        ``HOST:PORT`` of the coordinator; all connections go out from here.
    identity : Identity or None
        The party's key and certificate; None joins in plain text.
    """

    address: str
    name: str
    identity: Identity | None
    host: PartyHost
    pulse: Pulse = field(default_factory=Pulse)
    _node: subprocess.Popen[bytes] | None = None
    _door: socket.socket | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.folder = state_folder("parties", f"{self.address}-{self.name}")
        self._work = Path(tempfile.mkdtemp(prefix="mycel-"))

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            app = await asyncio.to_thread(launch.bundle, self.folder)
            server, client = self._contexts()
            relay = Relay(split(self.address), PartyGate(app, self.pulse.heard, self.pulse.handed), server, client)
            listener = await relay.start(LOOPBACK, 0)
            port = listener.sockets[0].getsockname()[1]
            self._serve()
            try:
                await self._keep_node(f"{LOOPBACK}:{port}")
            finally:
                if self._node is not None:  # while the gate is open: the node takes its leave through it
                    await asyncio.to_thread(children.end, self._node)
                listener.close()
                await relay.close()
        finally:
            if self._door is not None:
                self._door.close()
            shutil.rmtree(self._work, ignore_errors=True)
            (self.folder / "node.key").unlink(missing_ok=True)

    def _contexts(self) -> tuple[ssl.SSLContext | None, ssl.SSLContext | None]:
        """TLS towards the party's own node, and towards the coordinator."""
        if self.identity is None:
            return None, None
        root = make_authority("loopback")
        issue(root, "gate", [LOOPBACK]).save(self._work / "gate.pem")
        (self._work / "inner.crt").write_bytes(pem(root.certificate))
        self.identity.save(self._work / "party.pem")
        (self._work / "authority.crt").write_bytes(pem(self.identity.authority))
        (self.folder / "node.key").touch(0o600)  # in the party's own folder: a process that is killed removes nothing
        (self.folder / "node.key").write_bytes(openssh_private(self.identity.key))
        inward = server_context(self._work / "gate.pem")
        outward = client_context(self._work / "authority.crt", self._work / "party.pem")
        for name in ("gate.pem", "party.pem"):  # read; a second copy of a key is one too many
            (self._work / name).unlink()
        return inward, outward

    async def _keep_node(self, gate: str) -> None:
        """Start the node, and again whenever it has ended: the coordinator was away, or it knows us by a new number.

        One that runs on and does nothing is ended.
        """
        pause = SOONEST
        secure = self.identity is not None
        authority, key = (self._work / "inner.crt", self.folder / "node.key") if secure else (None, None)
        while True:
            began = asyncio.get_running_loop().time()
            self._node = launch.supernode(self.folder, gate, authority, key, self._work / "line")
            self.pulse.started()
            logger.info("node started towards %s", self.address)
            why = ""
            while self._node.poll() is None and not why:
                await asyncio.sleep(0.2)
                why = self.pulse.stopped()
            # One that lags takes no leave: what is sent to it meanwhile would come back, and its party count as gone.
            await asyncio.to_thread(children.end, self._node, not why)
            lasted = asyncio.get_running_loop().time() - began
            pause = SOONEST if lasted > LATEST else min(2 * pause, LATEST)
            logger.warning("the node %s: it is started again in %.0f seconds", why or "has ended", pause)
            await asyncio.sleep(pause)

    def _serve(self) -> None:
        """Answer messages in a thread of their own, one after another."""
        resident = Resident(self.host, self.name, self.folder / "home")
        self._door = door = listen(self._work / "line")
        threading.Thread(
            target=serve, args=(door, self.pulse.around(resident.reply)), daemon=True, name="mycel-party"
        ).start()
