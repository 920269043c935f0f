"""One rank of a drill: what it trains, with which system, and the moment at which it kills itself."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from mycel.collectives.copies import DiskCopies
from mycel.collectives.enduring import Enduring
from mycel.collectives.formation import Recovery
from mycel.collectives.membership import Line
from mycel.collectives.units import Chain
from mycel.models.random_llama import llama_config
from mycel.pretrain.bamboo import Bamboo
from mycel.pretrain.gemini import Gemini
from mycel.pretrain.oobleck import Oobleck
from mycel.recipe.schema import Training
from mycel.wire.parcel import Parcel

TRAINING = Training(learning_rate=1e-2)
Death = tuple[int, int, str, int]


@dataclass(frozen=True)
class Drill:
    """What is rehearsed.

    Attributes
    ----------
    system : str
        "bamboo", "oobleck", "gemini", or "restart": all are killed, started again, and read the disk.
    shape : tuple of int
        Blocks, hidden width, rows of a step, tokens of a row.
    work : float
        Seconds that each piece of work takes besides its computing, for ranks with a machine of their own.
    """

    system: str
    deaths: tuple[Death, ...] = ()
    ranks: int = 4
    steps: int = 8
    pieces: int = 4
    shape: tuple[int, int, int, int] = (6, 32, 8, 16)
    pipelines: int = 1
    copies: int = 2
    least: int = 2
    save_every: int = 0
    work: float = 0.0
    tied: bool = True
    seed: int = 1

    def recovery(self) -> Recovery:
        """Return the system that is rehearsed."""
        units = self.shape[0] + 2
        if self.system == "bamboo":
            return Bamboo(units, self.pieces, self.pipelines)
        if self.system == "oobleck":
            return Oobleck((0.5, *[1.0] * self.shape[0], 0.5), self.pieces, self.least)
        copies = self.copies if self.system == "gemini" else 1
        return Gemini(units, self.pieces, self.ranks, copies, self.pipelines)


def model_of(drill: Drill) -> LlamaForCausalLM:
    """Return the decoder of a drill at version 0."""
    blocks, hidden, _, length = drill.shape
    torch.manual_seed(drill.seed)
    return LlamaForCausalLM(
        llama_config(hidden, blocks, 64, 2 * hidden, 2, max_position_embeddings=length, tie_word_embeddings=drill.tied)
    )


def serve_drill(connection: Connection) -> None:
    """Be one rank, and report at the end."""
    torch.set_num_threads(1)
    job = json.loads(connection.recv_bytes())
    try:
        _train(job, lambda report: connection.send_bytes(report.to_bytes()))
    except Exception as error:  # whatever it is, the launcher must not take it for a death
        connection.send_bytes(Parcel("report", {"error": f"{type(error).__name__}: {error}"}).to_bytes())


def _train(job: dict[str, Any], hand_over: Callable[[Parcel], None]) -> None:
    told = job["drill"]
    drill = Drill(**{**told, "deaths": tuple(map(tuple, told["deaths"])), "shape": tuple(told["shape"])})
    deaths = [death for death in job["deaths"] if death[1] == job["member"]]
    chain = Chain(model_of(drill), TRAINING)
    line = Line(job["port"], job["member"], epoch=job["epoch"] - 1)
    enduring = Enduring(
        line,
        chain,
        drill.recovery(),
        lambda step: rows_of(drill, step),
        lambda step: TRAINING.learning_rate,
        drill.pieces,
        disk=DiskCopies(Path(job["folder"]), chain.count) if drill.save_every else None,
        copy_every=1 if drill.system == "gemini" else 0,
        save_every=drill.save_every,
    )
    enduring.note = _fate(enduring, deaths, drill.work)
    enduring.train(drill.steps, hand_over)


def rows_of(drill: Drill, step: int) -> Tensor:
    """Return the batch (B, T) of a step."""
    _, _, rows, length = drill.shape
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(1000 * drill.seed + step))


def _fate(enduring: Enduring, deaths: list[Any], work: float) -> Callable[[str], None]:
    """Count phases within a step, and die at the one that was chosen."""
    seen: dict[tuple[int, str], int] = {}

    def note(phase: str) -> None:
        key = enduring.version, phase
        seen[key] = seen.get(key, 0) + 1
        if any((step, wanted, times) == (*key, seen[key]) for step, _, wanted, times in deaths):
            os.kill(os.getpid(), signal.SIGKILL)
        if work and phase in {"forward", "backward"}:
            time.sleep(work if phase == "forward" else 2 * work)

    return note
