"""Programs as child processes, which end with whoever started them."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

LOOPBACK = "127.0.0.1"
RESERVE = 12_000  # ports below those that the kernel hands out
PRCTL = ctypes.CDLL(None).prctl  # looked up before any fork: another thread may hold the loader's lock then


def start(
    command: Sequence[str], environment: Mapping[str, str], log: Path, last_word: int = signal.SIGKILL
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, its words in ``log``; once this process ends it gets ``last_word``."""
    with log.open("ab") as words:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, last_word),
        )


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel signal this process once its parent has ended, however it ended."""
    PRCTL(1, number)  # PR_SET_PDEATHSIG


def end(process: subprocess.Popen[bytes], leaves: bool = True) -> None:
    """End a program and whatever it started; it may take its leave first, or may not."""
    for number in (signal.SIGTERM, signal.SIGKILL) if leaves else (signal.SIGKILL,):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(5)
            if number is signal.SIGKILL:
                return
        except subprocess.TimeoutExpired:
            continue


def free_port() -> int:
    """Return a port of the loopback that nobody uses now and, where it can be told, the kernel hands to nobody."""
    lowest = 0
    with suppress(OSError):
        lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    below = range(max(lowest - RESERVE, 1024), lowest)
    for port in random.SystemRandom().sample(below, min(64, len(below))):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
