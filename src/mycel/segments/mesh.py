"""A group of ranks that add up tensors: links between every two, and sums by star or by ring.

Links may be given a latency and a bandwidth, by which a message is held back where it arrives: each rank's network
card sends one message after another, and receives one after another, as a hub's does that everyone talks to.
"""

from __future__ import annotations

import secrets
import socket
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mycel.errors import EngineError

HEADER = struct.Struct("<Qd")  # bytes that follow, and when the last of them left
LONGEST = 1 << 28


@dataclass(frozen=True)
class Pace:
    """What a link is made to cost.

    Attributes
    ----------
    latency : float
        Seconds one way.
    bandwidth : float
        Bytes a second of each rank's card, each way.
    """

    latency: float = 0.0
    bandwidth: float = float("inf")


class Mesh:
    """One rank's links to all others.

    Attributes
    ----------
    rank, size : int
        Place in the group, and members.
    sent : int
        Bytes that left here, headers included.
    messages : int
        Messages that left here.
    """

    def __init__(self, rank: int, links: dict[int, socket.socket], pace: Pace | None = None) -> None:
        self.rank, self.size, self.links, self.pace = rank, len(links) + 1, links, pace or Pace()
        self.sent = self.messages = 0
        self._out = self._in = 0.0
        for link in links.values():
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @classmethod
    def connect(
        cls, rank: int, server: socket.socket, ports: Sequence[int], secret: str, pace: Pace | None = None
    ) -> Mesh:
        """Connect to every other rank on loopback; a caller who does not know the secret is turned away.

        ``server`` listens at this rank's port; it is closed.
        """
        links: dict[int, socket.socket] = {}
        with server:
            server.settimeout(60)
            for other in range(rank):
                links[other] = _dial(ports[other], rank, secret)
            while len(links) < len(ports) - 1:
                link, _ = server.accept()
                link.settimeout(5)
                try:
                    greeting = _exactly(link, len(secret) + 4)
                except OSError:  # a stranger who says nothing, or goes
                    link.close()
                    continue
                other = int.from_bytes(greeting[:4], "little")
                if secrets.compare_digest(greeting[4:], secret.encode()) and rank < other < len(ports):
                    link.settimeout(None)
                    links[other] = link
                else:
                    link.close()
        return cls(rank, links, pace)

    def send(self, other: int, content: bytes | memoryview) -> None:
        """Send a message."""
        now = time.monotonic()
        self._out = max(now, self._out) + len(content) / self.pace.bandwidth
        self.sent += HEADER.size + len(content)
        self.messages += 1
        try:
            self.links[other].sendall(HEADER.pack(len(content), self._out))
            self.links[other].sendall(content)
        except OSError as error:
            raise EngineError(f"rank {other} is gone: {error}") from error

    def receive(self, other: int, limit: int = LONGEST) -> bytearray:
        """Return a rank's next message, when the links' pace lets it arrive."""
        try:
            length, left = HEADER.unpack(_exactly(self.links[other], HEADER.size))
            if length > limit:
                raise EngineError(f"rank {other} sends {length:,} bytes; at most {limit:,} are accepted")
            content = _exactly(self.links[other], length)
        except OSError as error:
            raise EngineError(f"rank {other} is gone: {error}") from error
        taken = length / self.pace.bandwidth
        self._in = max(left - taken + self.pace.latency, self._in) + taken
        delay = self._in - time.monotonic()
        if delay > 0 and (self.pace.latency or taken):
            time.sleep(delay)
        return content

    def send_tensor(self, other: int, tensor: Tensor) -> None:
        """Send a tensor's numbers from where they lie."""
        numbers: Any = tensor.detach().contiguous().numpy()
        self.send(other, memoryview(numbers).cast("B"))

    def receive_tensor(self, other: int, like: Tensor) -> Tensor:
        """Return a rank's next message as a tensor of the shape of ``like``; another length is refused."""
        content = self.receive(other, like.numel() * like.element_size())
        if len(content) != like.numel() * like.element_size():
            raise EngineError(f"rank {other} sends {len(content):,} bytes, where {like.numel():,} numbers are expected")
        return torch.frombuffer(content, dtype=like.dtype).reshape(like.shape)

    def close(self) -> None:
        """Close all links."""
        for link in self.links.values():
            with suppress(OSError):
                link.close()


class Reduce(ABC):
    """Adds up what every rank gives; all receive the same sum."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.calls = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        self.calls += 1
        return tensor if self.mesh.size == 1 else self.sum(tensor.detach().contiguous())

    @abstractmethod
    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over at least two ranks."""


class Star(Reduce):
    """Everyone sends to rank 0, which adds up in the order of ranks and sends back: two hops, whatever the size."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum."""
        mesh = self.mesh
        if mesh.rank:
            mesh.send_tensor(0, tensor)
            return mesh.receive_tensor(0, tensor)
        total = tensor.clone()
        for other in range(1, mesh.size):
            total += mesh.receive_tensor(other, tensor)
        for other in range(1, mesh.size):
            mesh.send_tensor(other, total)
        return total


class Ring(Reduce):
    """Chunks go round twice, 2 (n - 1) hops: no rank sends more than twice the tensor."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum."""
        mesh, size = self.mesh, self.mesh.size
        after, before = (mesh.rank + 1) % size, (mesh.rank - 1) % size
        chunks = [chunk.clone() for chunk in tensor.reshape(-1).tensor_split(size)]
        for step in range(size - 1):
            mesh.send_tensor(after, chunks[(mesh.rank - step) % size])
            place = (mesh.rank - step - 1) % size
            chunks[place] += mesh.receive_tensor(before, chunks[place])
        for step in range(size - 1):
            mesh.send_tensor(after, chunks[(mesh.rank + 1 - step) % size])
            place = (mesh.rank - step) % size
            chunks[place] = mesh.receive_tensor(before, chunks[place])
        return torch.cat(chunks).reshape(tensor.shape)


REDUCES: dict[str, type[Reduce]] = {"star": Star, "ring": Ring}


def listening(count: int) -> list[socket.socket]:
    """Return sockets that listen on loopback: a port that was only found free may be another's when it is needed."""
    return [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]


def _dial(port: int, rank: int, secret: str) -> socket.socket:
    until = time.monotonic() + 60
    while True:
        try:
            link = socket.create_connection(("127.0.0.1", port), timeout=5)
            break
        except OSError as error:
            if time.monotonic() > until:
                raise EngineError(f"no rank listens at port {port}: {error}") from error
            time.sleep(0.02)
    link.settimeout(None)
    link.sendall(rank.to_bytes(4, "little") + secret.encode())
    return link


def _exactly(link: socket.socket, count: int) -> bytearray:
    content = bytearray(count)
    view, got = memoryview(content), 0
    while got < count:
        more = link.recv_into(view[got:])
        if not more:
            raise ConnectionResetError("the link was closed")
        got += more
    return content
