"""Where a model's weights are while blocks of it are computed: in memory, in their file, or read for each pass."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mycel.errors import GenerationError

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
