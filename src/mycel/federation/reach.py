"""How `mycel run --on` and `mycel status` reach a coordinator: on its own machine, or from another with a key."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from mycel.engines.line import opened
from mycel.errors import EngineError, RunError
from mycel.federation.begin import begin
from mycel.federation.desk import RUN, STANDING, STATUS, SWITCH, join
from mycel.federation.hub import split
from mycel.federation.place import Post, overview, read_post, state_folder, write_status
from mycel.guard.gates import client_context
from mycel.guard.keys import Identity, pem
from mycel.recipe.schema import Rounds
from mycel.rounds.deadline import Wait

ATTEMPTS = 12  # at a question whose answer does not come in the learnt time, which doubles for each
LONGEST = 1 << 24  # bytes of an answer


class Reach(Protocol):
    """A coordinator."""

    secure: bool

    def seats(self) -> dict[str, int]:
        """Return the SuperLink's number of each party's node; one that was started again has given out new ones."""

    async def line(self, job: str) -> Connection:
        """Begin Flower's run and return the line to its ServerApp."""

    def tell(self, standing: Mapping[str, Any]) -> None:
        """Put down at the coordinator how the run stands."""

    def close(self) -> None:
        """Wait until the last of it has been put down."""


class Here:
    """A coordinator of this machine and this user."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._post: Post = read_post(address)
        self.secure = self._post.secure

    def seats(self) -> dict[str, int]:
        """Return the SuperLink's number of each party's node."""
        return read_post(self._address).seats

    async def line(self, job: str) -> Connection:
        """Begin Flower's run and return the line to its ServerApp."""
        return opened(await begin(state_folder("coordinators", self._address), Path(self._post.line), job))

    def tell(self, standing: Mapping[str, Any]) -> None:
        """Put down how the run stands."""
        write_status(self._address, dict(standing))

    def close(self) -> None:
        """Nothing is on its way."""


@dataclass
class Elsewhere:
    """A coordinator on another machine, which knows the operator by a key."""

    address: str
    key: Path
    patience: float = Rounds().patience
    secure: bool = True
    _latest: bytes = b""
    _closing: bool = False
    _news: threading.Event = field(default_factory=threading.Event)
    _teller: threading.Thread | None = None

    def __post_init__(self) -> None:
        identity = Identity.load(self.key)
        with tempfile.TemporaryDirectory(prefix="mycel-") as folder:
            authority = Path(folder) / "authority.crt"
            authority.write_bytes(pem(identity.authority))
            self._context = client_context(authority, self.key)
        self._wait = Wait(self.patience)

    def overview(self) -> dict[str, Any]:
        """Return how the coordinator, its gate and its latest run stand."""
        found: dict[str, Any] = json.loads(self._ask(STATUS, b""))
        return {**found, "address": self.address}

    def seats(self) -> dict[str, int]:
        """Return the SuperLink's number of each party's node."""
        return {name: int(number) for name, number in self.overview()["seats"].items()}

    def _ask(self, path: str, body: bytes) -> bytes:
        """Ask, and again while nothing comes in the time that answers lately took; the first has all the time."""
        silence: OSError = TimeoutError("it is silent")
        for _ in range(ATTEMPTS):
            began, allowed = time.monotonic(), self._wait.seconds
            try:
                status, said = self._ask_once(path, body, allowed)
            except TimeoutError as error:
                if allowed is None:
                    raise self._unreached(error) from error
                silence = error
                self._wait.lost()
                continue
            except (OSError, http.client.HTTPException) as error:
                raise self._unreached(error) from error
            self._wait.learn(time.monotonic() - began)
            if status != 200:
                raise RunError(f"the coordinator at {self.address} refuses: {said.decode(errors='replace')[:500]}")
            return said
        raise self._unreached(silence)

    def _ask_once(self, path: str, body: bytes, allowed: float | None) -> tuple[int, bytes]:
        host, port = split(self.address)
        call = http.client.HTTPSConnection(host, port, timeout=allowed, context=self._context)
        try:
            call.request("POST", path, body)
            answer = call.getresponse()
            return answer.status, answer.read(LONGEST)
        finally:
            call.close()

    def _unreached(self, error: Exception) -> RunError:
        if isinstance(error, ssl.SSLError | ConnectionResetError | http.client.RemoteDisconnected):
            return RunError(
                f"the coordinator at {self.address} and the key {str(self.key)!r} do not know each other ({error}): "
                f"take the key that `mycel keys operator` made for this federation"
            )
        return RunError(f"nobody can be reached at {self.address}: {error}")

    async def line(self, job: str) -> Connection:
        """Begin Flower's run and return the line to its ServerApp, which is carried here over TLS."""
        ours, theirs = socket.socketpair()
        ready: Future[None] = Future()
        # A thread with a loop of its own: whoever sends on the line does not wait for this one.
        carrier = threading.Thread(
            target=lambda: asyncio.run(self._carry(job, theirs, ready)), daemon=True, name="mycel-line"
        )
        carrier.start()
        try:
            await asyncio.wrap_future(ready)
        except BaseException:
            ours.close()
            raise
        return opened(ours)

    async def _carry(self, job: str, end: socket.socket, ready: Future[None]) -> None:
        try:
            host, port = split(self.address)
            far = await asyncio.open_connection(host, port, ssl=self._context)
            body = job.encode()
            far[1].write(f"POST {RUN} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
            head = await far[0].readuntil(b"\r\n\r\n")
            if head != SWITCH:
                raise EngineError(f"the coordinator began no run: {(await far[0].read()).decode(errors='replace')}")
            near = await asyncio.open_unix_connection(sock=end)
        except Exception as error:  # whatever it was, whoever waits must hear of it
            end.close()
            ready.set_exception(error if isinstance(error, EngineError) else self._unreached(error))
            return
        ready.set_result(None)
        await join(near, far)

    def tell(self, standing: Mapping[str, Any]) -> None:
        """Send how the run stands; a thread of its own sends the latest, so that the run does not wait."""
        self._latest = json.dumps(standing).encode()
        self._news.set()
        if self._teller is None:
            self._teller = threading.Thread(target=self._send_news, daemon=True, name="mycel-standing")
            self._teller.start()

    def _send_news(self) -> None:
        closing = False
        while not closing:
            self._news.wait()
            self._news.clear()
            closing = self._closing
            with suppress(RunError):  # this piece of news is lost; the next may pass
                self._ask(STANDING, self._latest)

    def close(self) -> None:
        """Wait until the last word on the run was sent."""
        if self._teller is not None:
            self._closing = True
            self._news.set()
            self._teller.join()


def reach(address: str, key: Path | None, patience: float) -> Reach:
    """Return the coordinator at ``address``: with an operator's key wherever it is, without one on this machine."""
    if key is None:
        return Here(address)
    found = Elsewhere(address, key, patience)
    found.overview()
    return found


def standing(address: str, key: Path | None) -> dict[str, Any]:
    """Return how a coordinator, its gate and its latest run stand."""
    return overview(address) if key is None else Elsewhere(address, key).overview()
