"""Runs on a village of real processes: started, watched and ended from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mycel.federation.demo import PROGRAM, Village

RECIPE = [
    'data.parties="dirichlet(0.5)"',
    "data.count=3",
    "data.examples=24",
    "data.held_out=8",
    "compare=[]",
    "model.base=micro",
    "rounds.count=3",
    "rounds.local_steps=2",
    "trainable.rank=64",  # adapters of 0.6 MB, beside which what Flower adds to a message is small
]
PATIENT = "rounds.patience=10"  # where nobody is to be found silent, however busy the machine gets
Events = list[dict[str, Any]]


def peak_of(pid: int | str) -> int:
    """Return the most memory that a process has had, in bytes, as the kernel kept it; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


@dataclass
class Going:
    """A run in a process of its own."""

    village: Village
    out: Path
    process: subprocess.Popen[bytes]
    peak: int = 0

    def events(self) -> Events:
        path = self.out / "events.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def until(self, seen: Callable[[Events], bool]) -> None:
        """Wait for something in the log, or for the end."""
        while self.process.poll() is None and not seen(self.events()):
            time.sleep(0.1)

    def finish(self) -> dict[str, Any]:
        while self.process.poll() is None:
            self.peak = max(self.peak, peak_of(self.process.pid))
            time.sleep(0.05)
        assert self.process.returncode == 0, self.words()
        found: dict[str, Any] = json.loads((self.out / "result.json").read_text())
        return found

    def words(self) -> str:
        return (self.village.folder / "run.log").read_text()[-2000:]


def go(made: Village, out: Path, *arguments: str) -> Going:
    options = ("--out", str(out), "--on", made.address, *arguments)
    return Going(made, out, made.start("run", "quickstart", *RECIPE, *options, log="run"))


@dataclass
class Operator:
    """Somebody on another machine: with a home, a working directory and one file of the federation's own."""

    folder: Path

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "MYCEL_STATE": str(self.folder / "state"), "OMP_NUM_THREADS": "1"}
        with (self.folder / "words").open("wb") as words:
            return subprocess.Popen(
                [*PROGRAM, *arguments], cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=words
            )

    def ask(self, *arguments: str) -> tuple[int, str]:
        """Run a command; return its status, and its answer or its words."""
        process = self.start(*arguments)
        said, _ = process.communicate()
        return process.returncode, said.decode() if not process.returncode else (self.folder / "words").read_text()


def rounds(events: Events) -> int:
    return sum(event["event"] == "round" for event in events)


def in_the_middle_of(number: int) -> Callable[[Events], bool]:
    """Whether a round has begun and is not over; answers may come all at once, so not even one is waited for."""
    return lambda events: rounds(events) == number - 1 and bool(events) and events[-1]["event"] in {"ask", "answer"}


def answered(events: Events) -> list[tuple[int, int]]:
    """Return round and node of each answer that was taken."""
    return [(event["round"], event["node"]) for event in events if event["event"] == "answer"]


def lost(node: int) -> Callable[[Events], bool]:
    """Whether a node stayed silent."""
    return lambda events: any(event.get("reason") == "lost" and event["node"] == node for event in events)


@contextmanager
def slowed(process: subprocess.Popen[bytes], share: float) -> Iterator[None]:
    """Let a process run for a share of the time only."""
    ended = threading.Event()

    def take_turns() -> None:
        while not ended.wait(0.2 * share):
            os.killpg(process.pid, signal.SIGSTOP)
            ended.wait(0.2 * (1 - share))
            os.killpg(process.pid, signal.SIGCONT)

    thread = threading.Thread(target=take_turns)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
