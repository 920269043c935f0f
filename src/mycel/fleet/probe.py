"""What this machine offers, measured: memory and the loopback link, beside the speed it was calibrated to."""

from __future__ import annotations

import socket
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from mycel.errors import EngineError

BURST = 8 << 20  # bytes of one message over the link
PINGS = 50


@dataclass(frozen=True)
class Probed:
    """One machine's figures, in the units of `mycel.fleet.device`.

    Attributes
    ----------
    calibration : dict of str to float
        How its ranks depart from nominal speed.
    """

    name: str
    gflops: float
    memory_gib: float
    mbps: float
    latency_ms: float
    calibration: dict[str, float]

    def to_toml(self) -> str:
        """Return a fleet file with this one device; watts and prices are for whoever knows them."""
        link = {"up_mbps": self.mbps, "down_mbps": self.mbps, "latency_ms": self.latency_ms}
        device: dict[str, Any] = {
            "name": self.name,
            "gflops": self.gflops,
            "memory_gib": self.memory_gib,
            "link": link,
        }
        return tomli_w.dumps({"calibration": self.calibration, "device": [device]})


def probe(gflops: float, calibration: dict[str, float], seconds: float = 2.0) -> Probed:
    """Measure this machine's memory, and for about so many seconds its link.

    Raises
    ------
    EngineError
        The link could not be measured.
    """
    import psutil

    memory = psutil.virtual_memory().available / (1 << 30)
    return Probed(socket.gethostname(), gflops, round(memory, 2), *_link(seconds), calibration)


def _link(seconds: float) -> tuple[float, float]:
    """Megabits a second and one-way milliseconds over the loopback, between two threads."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            thread = threading.Thread(target=_echo, args=(server,), daemon=True)
            thread.start()
            with socket.create_connection(server.getsockname(), timeout=5) as line:
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                trips = sorted(_trip(line, 1) for _ in range(PINGS))
                burst, end = list[float](), time.perf_counter() + seconds
                while time.perf_counter() < end or len(burst) < 3:
                    burst.append(_trip(line, BURST))
            thread.join(timeout=5)
    except OSError as error:
        raise EngineError(f"the link could not be measured: {error.strerror or error}; is the loopback up?") from error
    latency = trips[PINGS // 2] / 2
    rate = 8e-6 * BURST / max(statistics.median(burst) - latency, 1e-9)
    return round(rate, 1), round(1e3 * latency, 4)


def _trip(line: socket.socket, size: int) -> float:
    """Seconds until ``size`` bytes have arrived there and one byte has come back."""
    started = time.perf_counter()
    line.sendall(size.to_bytes(8, "little") + bytes(size))
    if line.recv(1) != b".":
        raise OSError(0, "the other end closed")
    return time.perf_counter() - started


def _echo(server: socket.socket) -> None:
    line, _ = server.accept()
    with line:
        while header := line.recv(8, socket.MSG_WAITALL):
            left = int.from_bytes(header, "little")
            while left:
                left -= len(line.recv(min(left, 1 << 20)))
            line.sendall(b".")


def refuse_existing(path: Path) -> None:
    """Refuse to measure for a file that is there already."""
    if path.exists():
        raise EngineError(f"{str(path)!r} exists: choose another name with --out, or remove it")


def write_probe(path: Path, found: Probed) -> None:
    """Write the fleet file."""
    try:
        path.write_text(found.to_toml(), encoding="utf-8")
    except OSError as error:
        raise EngineError(f"{str(path)!r} cannot be written: {error.strerror}; choose another --out") from error
