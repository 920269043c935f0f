"""Large updates: in a process of its own the coordinator holds little more than two of them; small ones pay nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="the federation extra is not installed")

import large_rounds
from large_rounds import TENSOR
from mycel.engines.flower.engine import PART, PIECE
from mycel.engines.line import Control, accept, listen, receive, send
from mycel.wire.algebra import with_role
from mycel.wire.parcel import Parcel

SLACK = 24 << 20  # what the allocator keeps, and a piece on its way each way


class Flower:
    """Plays the ServerApp and two parties: takes briefs in parts, and gives one answer to both in pieces."""

    def __init__(self, answer: Path) -> None:
        self.answer = answer
        self.messages: list[str] = []
        self.brief = 0
        self.longest = 0

    def reply(self, control: Control, frame: bytes) -> tuple[Control, bytes]:
        """Answer one message."""
        self.messages.append(control["verb"])
        self.longest = max(self.longest, len(frame))
        self.brief += len(frame)
        if control["verb"] == "part":
            return {"tag": control["tag"], "said": {}}, b""
        total, offset = self.answer.stat().st_size, control["offset"] if control["verb"] == "more" else 0
        with self.answer.open("rb") as file:
            file.seek(offset)
            part = file.read(control["size"] if total <= control["size"] else control["piece"])
        self.longest = max(self.longest, len(part))
        return {"tag": control["tag"], "said": {"total": total, "seconds": 0.0}}, part


Round = Callable[[int, int], tuple[Flower, int, int]]


@pytest.fixture(scope="module")
def a_round(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Round]:
    """Yield what runs a round of so many numbers in parts so many times smaller: messages, memory, an answer's size."""
    folder = tmp_path_factory.mktemp("large")
    with listen(folder / "line") as door, coordinating(folder / "line") as process:

        def run(numbers: int, scale: int) -> tuple[Flower, int, int]:
            update = {
                f"w{index}": torch.ones(min(TENSOR, numbers - start))
                for index, start in enumerate(range(0, numbers, TENSOR))
            }
            Parcel("answer", {"samples": 1}, with_role("update", update)).to_file(folder / "answer")
            flower = Flower(folder / "answer")
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps([numbers, scale]).encode() + b"\n")
            process.stdin.flush()
            with accept(door) as line:
                try:
                    while True:
                        send(line, *flower.reply(*receive(line)))
                except (EOFError, OSError):  # it hangs up once the round is over
                    pass
            return flower, int(process.stdout.readline()), flower.answer.stat().st_size

        yield run


@contextmanager
def coordinating(line: Path) -> Iterator[subprocess.Popen[bytes]]:
    command: list[Any] = [sys.executable, large_rounds.__file__, line]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_an_adapter_of_a_megabyte_is_one_question_and_one_answer(a_round: Round) -> None:
    flower, _, size = a_round(1 << 18, 1)
    assert size >= 1 << 20
    assert flower.messages == ["ask", "ask"]  # one for each party


def test_a_coordinator_holds_little_more_than_two_large_updates(a_round: Round) -> None:
    scale = 8
    flower, memory, size = a_round(1 << 24, scale)
    assert size >= 64 << 20
    pieces = -(-size // (PIECE // scale))
    assert flower.messages.count("part") == 2 * (pieces - 1)
    assert flower.messages.count("more") == 2 * (pieces - 1)
    assert flower.longest <= PART // scale
    assert memory <= 2.5 * size + SLACK, f"{memory / size:.2f} times an update of {size / 1e6:.0f} MB"
    assert memory >= size, "the state alone is as large"
