"""Where weights are while a model is served: in memory, in their file, or read for each block and let go behind it."""

from __future__ import annotations

from pathlib import Path

import psutil

from mycel.generation.executor import Executor, Whole
from mycel.generation.tensor_parallel import TensorParallel
from mycel.models.base import open_base
from mycel.segments.ranks import Group
from mycel.segments.weights import Weights
from mycel.segments.window import Window


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
