"""Runs whose process is killed where it is told to be: each piece is forked from one process that imports once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Point:
    """The moment after an event was logged: which of its kind in a round, counted from 1 in each piece of a run."""

    event: str
    round: int = 0
    number: int = 1


class Dying:
    """A watcher that ends its process, and leaves it no time for anything, at a point; never at None."""

    def __init__(self, point: Point | None) -> None:
        self._point = point
        self._seen = 0

    def phase(self, name: str, done: int, total: int) -> None:
        """Ignore it."""

    def arm(self, name: str, total: int) -> None:
        """Ignore it."""

    def event(self, entry: dict[str, Any]) -> None:
        """Count, and die."""
        if self._point and (entry["event"], entry.get("round", 0)) == (self._point.event, self._point.round):
            self._seen += 1
            if self._seen == self._point.number:
                os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Nursery:
    """Where pieces of runs are forked."""

    process: subprocess.Popen[bytes]

    def piece(self, recipe: list[str], out: Path, point: Point | None, resume: bool, on: str = "") -> int:
        """Run from where a run stands until a point, or its end; return how the process ended."""
        order = {"recipe": recipe, "out": str(out), "resume": resume, "on": on, "point": point and vars(point)}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextmanager
def nursery(environment: Mapping[str, str], log: Path) -> Iterator[Nursery]:
    """Start the process that imports; its words and its children's go to ``log``."""
    with log.open("wb") as words:
        process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words
        )
    try:
        yield Nursery(process)
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    """Fork a piece for each order, and say how it ended."""
    import torch

    from mycel.engines.children import die_with_parent
    from mycel.federation.execute import run_federated
    from mycel.models.base import find_base, open_base
    from mycel.recipe import load_recipe
    from mycel.run.execute import run_recipe

    torch.set_num_threads(1)
    open_base(find_base("micro")).tokenizer.encode("what is imported late is imported now")
    for line in sys.stdin:
        order = json.loads(line)
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        die_with_parent()
        recipe, out = load_recipe("quickstart", order["recipe"]), Path(order["out"])
        watcher = Dying(order["point"] and Point(**order["point"]))
        try:
            if order["on"]:
                run_federated(recipe, order["on"], out, order["resume"], watcher)
            else:
                run_recipe(recipe, out, order["resume"], watcher)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)


if __name__ == "__main__":
    main()
