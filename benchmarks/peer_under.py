"""``mycel`` under a condition that ``benchmarks/swarm.py`` needs: slow frames, or little memory.

``python benchmarks/peer_under.py LATENCY_SECONDS ROOM_MIB peer --join ...``. The room is what the process may take
beyond its libraries and its links; the kernel enforces it (``RLIMIT_DATA``). 0 leaves either as it is.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from pathlib import Path
from typing import Any


def hold_back(peers: Any, seconds: float) -> None:
    """Let every frame that a member sends take so long."""
    send = peers._send

    def later(self: Any, peer: str, frame: bytes) -> None:
        asyncio.get_running_loop().call_later(seconds, send, self, peer, frame)

    peers._send = later


def limit_memory(mebibytes: int) -> None:
    """Let this process take no more than so much beyond what it has."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    has = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:"))
    limit = (has << 10) + (mebibytes << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main() -> None:
    import torch  # noqa: F401 - what the libraries take does not count
    import transformers  # noqa: F401

    from mycel.cli import main as mycel
    from mycel.engines.peers_zenoh import ZenohPeers
    from mycel.segments.lender import Lender

    latency, room = float(sys.argv[1]), int(sys.argv[2])
    if latency:
        hold_back(ZenohPeers, latency)
    if room:
        begin = Lender.__init__

        def within(self: Any, *arguments: Any, **named: Any) -> None:
            limit_memory(room)
            begin(self, *arguments, **named)

        Lender.__init__ = within  # type: ignore[method-assign]
    sys.argv = ["mycel", *sys.argv[3:]]
    mycel()


if __name__ == "__main__":
    main()
