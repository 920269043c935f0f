"""Consecutive blocks of a model in this process: forward with sessions' keys and values, and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mycel.errors import EngineError
from mycel.models.cut import Cut
from mycel.segments.keys import Slab

MOST_PENDING = 64  # forwards that may wait for their backward


@dataclass(frozen=True)
class Row:
    """New positions of one session.

    Attributes
    ----------
    session : str
        Identity, chosen by its owner; nobody else can guess it.
    start : int
        Place of the first; positions before it are held here, those after it are taken back.
    count : int
        How many there are.
    turn : int
        Number of this step among the session's; it rises.
    """

    session: str
    start: int
    count: int
    turn: int = 0


class Segment:
    """Blocks ``first <= index < last`` of a cut.

    Parameters
    ----------
    cut : Cut
        Holds at least these blocks.
    first, last : int, optional
        By default all that the cut holds.
    slab : Slab, optional
        Where sessions keep their keys and values.
    """

    def __init__(self, cut: Cut, first: int | None = None, last: int | None = None, slab: Slab | None = None) -> None:
        self.cut = cut
        self.first = cut.first if first is None else first
        self.last = cut.last if last is None else last
        self.slab = slab or Slab()
        self.width = int(cut.config.hidden_size)
        self._pending: dict[str, tuple[Tensor, int, int]] = {}
        self.together = self.last > self.first and self._rows_agree()

    def infer(
        self, hidden_ND: Tensor, rows: Sequence[Row], first: int | None = None, last: int | None = None
    ) -> Tensor:
        """Run new positions of many sessions; rows of one position are computed together.

        Parameters
        ----------
        hidden_ND : Tensor
            The rows' positions one after another, ``[sum of counts, width]``.
        rows : sequence of Row
            Distinct sessions.
        first, last : int, optional
            Blocks, among those held.

        Raises
        ------
        LookupError
            When earlier positions of a session are not held here: they must be sent again.
        EngineError
            When the rows are unsound, or more than there is room for.
        """
        first, last = self._range(first, last)
        if sum(row.count for row in rows) != len(hidden_ND) or len({row.session for row in rows}) != len(rows):
            raise EngineError("the rows do not share out the positions that came")
        self.slab.enter(rows)
        with torch.inference_mode():
            if len(rows) == 1:
                return self._run(hidden_ND[None], rows, first, last)[0]
            pieces = dict(zip(rows, torch.split(hidden_ND, [row.count for row in rows]), strict=True))
            single = [row for row in rows if row.count == 1] if self.together else []
            if len(single) > 1:
                stacked = torch.stack([pieces[row] for row in single])
                pieces |= dict(zip(single, self._run(stacked, single, first, last), strict=True))
            else:
                single = []
            for row in rows:
                if row not in single:
                    pieces[row] = self._run(pieces[row][None], [row], first, last)[0]
        return torch.cat([pieces[row] for row in rows])

    def forward(self, hidden_BTD: Tensor, session: str, first: int | None = None, last: int | None = None) -> Tensor:
        """Run whole sequences for training; the input is kept until ``backward`` of the same session."""
        first, last = self._range(first, last)
        # Of owners that only looked, or left, nothing tells: the longest waiting makes room.
        if session not in self._pending and len(self._pending) >= MOST_PENDING:
            del self._pending[next(iter(self._pending))]
        self._pending[session] = (hidden_BTD.detach(), first, last)
        with torch.no_grad():
            return self.cut.run(hidden_BTD, first, last)

    def backward(self, gradient_BTD: Tensor, session: str) -> Tensor:
        """Return the gradient at the input; weights that require one collect theirs.

        The forward is computed again from its kept input, so that a waiting session costs one activation.
        """
        kept = self._pending.pop(session, None)
        if kept is None:
            raise EngineError(f"no forward of the session {session[:40]!r} waits here for its backward")
        hidden = kept[0].requires_grad_()
        if gradient_BTD.shape != hidden.shape:
            raise EngineError(f"a gradient of {tuple(gradient_BTD.shape)} for a state of {tuple(hidden.shape)}")
        with torch.enable_grad():
            self.cut.run(hidden, kept[1], kept[2]).backward(gradient_BTD)  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        return hidden.grad

    def trainable(self) -> list[nn.Parameter]:
        """Return the weights that collect gradients."""
        held = (self.cut.block(index) for index in range(self.first, self.last))
        return [parameter for block in held for parameter in block.parameters() if parameter.requires_grad]

    def _run(self, hidden_BTD: Tensor, rows: Sequence[Row], first: int, last: int) -> Tensor:
        count = rows[0].count
        cache = self.slab.rows([row.session for row in rows], count, first)
        hidden = self.cut.run(hidden_BTD, first, last, cache, cache.places, cache.mask())
        for row in rows:
            self.slab.lengths[row.session] = row.start + count
        return hidden

    def _range(self, first: int | None, last: int | None) -> tuple[int, int]:
        first, last = self.first if first is None else first, self.last if last is None else last
        if not self.first <= first < last <= self.last:
            raise EngineError(f"blocks {first} to {last} are asked for; {self.first} to {self.last} are held here")
        return first, last

    def _rows_agree(self) -> bool:
        """Try whether this family computes padded rows with a mask of ours; sliding windows would need their own."""
        config = self.cut.config
        types = {*(getattr(config, "layer_types", None) or []), *getattr(config, "attention_layers", [])}
        if types - {"full_attention", "global"} or getattr(config, "sliding_window", None):
            return False
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(5, self.width, generator=generator)
        slab, self.slab = self.slab, Slab()
        try:
            self.together = False
            fill = [Row("a", 0, 2), Row("b", 0, 1)]
            step = [Row("a", 2, 1), Row("b", 1, 1)]
            self.infer(states[:3], fill)
            alone = self.infer(states[3:], step)
            self.together = True
            return torch.allclose(self.infer(states[3:], step), alone, rtol=1e-4, atol=1e-5)
        except (RuntimeError, ValueError, TypeError):
            return False
        finally:
            self.slab = slab
