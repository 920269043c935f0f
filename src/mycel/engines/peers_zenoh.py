"""The peer engine on Zenoh: mutual TLS, liveliness, direct links where both sides can be reached, routers elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

from mycel.engines.identity import Identity, write_secret
from mycel.engines.peers import Peers
from mycel.errors import EngineError, ExtraMissing

try:
    import zenoh
except ImportError as error:  # pragma: no cover - the test extra brings it
    raise ExtraMissing("eclipse-zenoh", "swarm") from error

LARGE = 1 << 18  # bytes of a frame that may not fit what lies between here and one who does not read
MOST_PUBLISHERS = 1024


class ZenohPeers(Peers):
    """A member of a swarm on a network; made by ``join``."""

    def __init__(self, identity: Identity, swarm: str, session: Any, secrets: Any) -> None:
        super().__init__(identity)
        self._root, self._session, self._secrets = f"mycel/{swarm}", session, secrets
        self._publishers: OrderedDict[str, Any] = OrderedDict()
        self._lines: dict[str, deque[bytes]] = {}  # of frames to those who are being sent a large one
        self._sending: set[asyncio.Task[None]] = set()
        self._inbox: deque[bytes] = deque()
        self._announcement: bytes | None = None
        self._alive: Any = None
        self._declared: list[Any] = [
            session.declare_subscriber(f"{self._root}/to/{self.name}", self._deliver),
            session.declare_subscriber(f"{self._root}/facts/*", self._later(self._announced)),
            session.declare_queryable(f"{self._root}/facts/{self.name}", self._tell_facts),
        ]
        alive = session.liveliness()
        self._declared.append(
            alive.declare_subscriber(f"{self._root}/alive/*", self._later(self._lively), history=True)
        )

    @classmethod
    async def join(
        cls, identity: Identity, swarm: str, routers: tuple[str, ...] = (), listen: str = "", router: bool = False
    ) -> ZenohPeers:
        """Join a swarm.

        Parameters
        ----------
        identity : Identity
            Issued by the swarm's authority.
        swarm : str
            Its name.
        routers : tuple of str
            ``host:port`` of members that pass on what cannot go directly.
        listen : str
            ``host:port`` to be reached at; port 0: any. Empty: outbound only, through routers.
        router : bool
            Pass on others' frames; needs ``listen``.

        Raises
        ------
        EngineError
            When the address is taken or the credentials are unusable.
        """
        secrets = tempfile.TemporaryDirectory(prefix="mycel-")
        try:
            config = _config(identity, Path(secrets.name), routers, listen, router)
            session = await asyncio.to_thread(zenoh.open, config)
        except zenoh.ZError as error:
            secrets.cleanup()
            raise EngineError(f"{identity.name!r} cannot join the swarm {swarm!r}: {str(error)[:300]}") from error
        return cls(identity, swarm, session, secrets)

    def _send(self, peer: str, frame: bytes) -> None:
        if peer in self._lines:
            self._lines[peer].append(frame)
        elif len(frame) <= LARGE:
            _put(self._publisher(peer), frame)
        else:
            self._lines[peer] = deque([frame])
            task = self._loop.create_task(self._drain(peer, self._publisher(peer)))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _drain(self, peer: str, publisher: Any) -> None:
        """Send a large frame, and what comes behind it, from another thread: who does not read holds up nobody else."""
        line = self._lines[peer]
        try:
            while line:
                await asyncio.to_thread(_put, publisher, line.popleft())
        finally:
            del self._lines[peer]

    def _publisher(self, peer: str) -> Any:
        publisher = self._publishers.pop(peer, None) or self._session.declare_publisher(
            f"{self._root}/to/{peer}", congestion_control=zenoh.CongestionControl.BLOCK, express=True
        )
        self._publishers[peer] = publisher
        if len(self._publishers) > MOST_PUBLISHERS:  # members come and go under ever new names
            _, oldest = self._publishers.popitem(last=False)
            _undeclare(oldest)
        return publisher

    def _publish(self, announcement: bytes | None) -> None:
        self._announcement = announcement
        if announcement is None:
            self._unalive()
            return
        self._session.put(f"{self._root}/facts/{self.name}", announcement)
        if self._alive is None:
            self._alive = self._session.liveliness().declare_token(f"{self._root}/alive/{self.name}")

    async def _leave(self) -> None:
        self._unalive()
        for task in list(self._sending):
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        for declared in (*self._declared, *self._publishers.values()):
            _undeclare(declared)
        await asyncio.to_thread(self._session.close)
        self._secrets.cleanup()

    def _unalive(self) -> None:
        if self._alive is not None:
            self._alive.undeclare()
            self._alive = None

    def _later(self, take: Any) -> Any:
        """Return a callback for Zenoh's threads that hands a sample over to the loop."""

        def deliver(sample: Any) -> None:
            found = (str(sample.key_expr).rpartition("/")[2], sample.kind, sample.payload.to_bytes())
            with contextlib.suppress(RuntimeError):  # the loop may be closed already
                self._loop.call_soon_threadsafe(take, *found)

        return deliver

    def _deliver(self, sample: Any) -> None:
        """Take a frame from one of Zenoh's threads."""
        self._inbox.append(sample.payload.to_bytes())
        with contextlib.suppress(RuntimeError):  # the loop may be closed already
            self._loop.call_soon_threadsafe(self._took)

    def _took(self) -> None:
        frame = self._inbox.popleft()
        self._arrived(frame, not self._inbox)

    def _announced(self, name: str, kind: Any, frame: bytes) -> None:
        self._heard(frame)

    def _lively(self, name: str, kind: Any, frame: bytes) -> None:
        if self._closed or name == self.name:
            return
        if kind == zenoh.SampleKind.DELETE:
            self._gone(name)
        elif name not in self._known:
            self._session.get(f"{self._root}/facts/{name}", self._fetched)

    def _fetched(self, reply: Any) -> None:
        if reply.ok is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._heard, reply.ok.payload.to_bytes())

    def _tell_facts(self, query: Any) -> None:
        if self._announcement is not None:
            query.reply(f"{self._root}/facts/{self.name}", self._announcement)


def _put(publisher: Any, frame: bytes) -> None:
    with contextlib.suppress(zenoh.ZError):  # a frame to one who is gone is lost; its liveliness tells
        publisher.put(frame)


def _undeclare(declared: Any) -> None:
    with contextlib.suppress(zenoh.ZError, RuntimeError):  # the latter: a thread still sends; it ends with the session
        declared.undeclare()


def _config(identity: Identity, folder: Path, routers: tuple[str, ...], listen: str, router: bool) -> Any:
    certificate, key, authority = folder / "certificate.pem", folder / "key.pem", folder / "authority.pem"
    authority.write_bytes(identity.authority)
    certificate.write_bytes(identity.certificate)
    write_secret(key, identity.key)
    config = zenoh.Config()
    settings: dict[str, Any] = {
        "mode": "router" if router else "peer" if listen else "client",
        "scouting/multicast/enabled": False,
        "connect/endpoints": [f"tls/{address}" for address in routers],
        "listen/endpoints": [f"tls/{listen}"] if listen else [],
        "transport/link/tls": {
            "root_ca_certificate": str(authority),
            "listen_certificate": str(certificate),
            "listen_private_key": str(key),
            "connect_certificate": str(certificate),
            "connect_private_key": str(key),
            "enable_mtls": True,
            "verify_name_on_connect": True,
        },
    }
    for path, value in settings.items():
        config.insert_json5(path, json.dumps(value))
    return config
