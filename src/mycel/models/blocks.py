"""Chosen transformer blocks: all weights of some blocks are trained, the rest is frozen."""

from __future__ import annotations

from collections.abc import Sequence

from mycel.errors import ModelError
from mycel.models.base import Base
from mycel.models.full import Full
from mycel.models.layers import transformer_blocks, weight_sites


class Blocks(Full):
    """All weights of the chosen blocks.

    Parameters
    ----------
    base : Base
        The opened base.
    indices : sequence of int
        Blocks counted from 0, encoder before decoder; the number of blocks itself means everything outside them
        (embedding, head and final norm). Empty: all of these.
    """

    kind = "blocks"

    def __init__(self, base: Base, indices: Sequence[int]) -> None:
        groups = block_weights(base)
        wrong = [index for index in indices if not 0 <= index < len(groups)]
        if wrong:
            raise ModelError(
                f"trainable.blocks names block {wrong[0]}, and {base.name!r} has {len(groups) - 1} blocks:"
                f" choose from 0 to {len(groups) - 2}, or {len(groups) - 1} for embedding, head and final norm"
            )
        chosen = sorted(set(indices)) or range(len(groups))
        super().__init__(base, [name for index in chosen for name in groups[index]])


def block_weights(base: Base) -> list[list[str]]:
    """Return the weight names of every block, and last those outside the blocks."""
    names = list(weight_sites(base.model))
    groups = [[name for name in names if name.startswith(f"{path}.")] for path in transformer_blocks(base.model)]
    inside = {name for group in groups for name in group}
    return [*groups, [name for name in names if name not in inside]]
