"""Where weights are while a model is served: in memory, in their file, or read for each block and let go behind it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import psutil

from mycel.errors import GenerationError
from mycel.generation.executor import Executor, Whole
from mycel.generation.tensor_parallel import TensorParallel
from mycel.models.base import open_base
from mycel.segments.ranks import Group
from mycel.segments.window import Window

FORM = re.compile(r"(resident|mapped)|(tiered|window)\(([1-9][0-9]{0,3})\)")
AHEAD = 2  # blocks in memory beside those that stay: one computes, the next is read


@dataclass(frozen=True)
class Weights:
    """Where a model's weights are.

    Attributes
    ----------
    kind : str
        ``resident``: in memory, laid out a second time for batches. ``mapped``: in their file, pages of which are read
        as they are used. ``tiered``: the first blocks stay in memory, the others are read for each pass. ``window``:
        all blocks are read for each pass.
    blocks : int
        Blocks that stay (``tiered``), or that are in memory at a time (``window``).
    """

    kind: str = "resident"
    blocks: int = 0

    @classmethod
    def parse(cls, text: str) -> Weights:
        """Read ``resident``, ``mapped``, ``tiered(8)`` or ``window(2)``."""
        match = FORM.fullmatch(text)
        if match is None:
            raise GenerationError(f"--weights is {text[:40]!r}: write auto, resident, mapped, tiered(8) or window(2)")
        return cls(match[1] or match[2], int(match[3] or 0))

    @property
    def window(self) -> int:
        """Blocks in memory at a time beside those that stay; 0: all."""
        return {"tiered": AHEAD, "window": self.blocks}.get(self.kind, 0)

    @property
    def held(self) -> int:
        """Blocks that stay in memory where others do not."""
        return self.blocks if self.kind == "tiered" else 0


def open_executor(folder: Path, weights: str = "auto", shares: tuple[float, ...] = ()) -> Executor:
    """Open a model for generating.

    Parameters
    ----------
    folder : Path
        In Hugging Face's format.
    weights : str
        As ``Weights.parse`` reads it, or ``auto``: resident where memory allows.
    shares : tuple of float
        Shares of the ranks inside every block, in proportion; empty: the whole model in this process.
    """
    chosen = Weights.parse(weights) if weights != "auto" else None
    if shares:
        where = chosen or Weights()
        mapped = where.kind == "mapped"
        return TensorParallel(Group(folder, shares, window=where.window, held=where.held, mapped=mapped))
    if chosen is not None and chosen.window:
        window = Window(folder, chosen.window, held=chosen.held)
        return Whole(window.cut.model, pack=False, release=window.close)
    model = open_base(folder).model
    pack = _room_to_pack(model.get_memory_footprint()) if chosen is None else chosen.kind == "resident"
    return Whole(model, pack)


def _room_to_pack(weights: int) -> bool:
    """Whether a second copy of the weights leaves half of the free memory to others."""
    return 2 * weights < int(psutil.virtual_memory().available) // 2
