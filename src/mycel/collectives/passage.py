"""One rank's part in passing the pieces of a batch through its pipeline and back, so that a torn step loses little.

All pieces go forward, then all come back. What a piece left behind on its way forward (the graph of its operations) is
kept until its way back: when a step is torn and begun again at the same version, what this rank computed before is not
computed again. A rank that shadows its successor computes the successor's forward as well, in the time in which it
waits for gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from mycel.collectives.formation import Formation, Segment
from mycel.collectives.units import Chain, Unit
from mycel.collectives.waiting import done, receive

LossOf = Callable[[Tensor, int], Tensor]  # of the logits of a piece, by its index
Note = Callable[[str], None]


@dataclass
class _Kept:
    entering: Tensor
    leaving: Tensor


@dataclass
class Passage:
    """What one rank keeps of the step under way.

    Parameters
    ----------
    note : callable
        Told "forward" and "backward" before each piece of work, and "between" after it.

    Attributes
    ----------
    computed, spared : int
        Forward passes of a segment that were computed, and that were there already.
    """

    chain: Chain
    member: int
    note: Note
    computed: int = 0
    spared: int = 0
    _kept: dict[tuple[int, int, int], _Kept] = field(default_factory=dict)

    def forget(self) -> None:
        """Drop what is kept: the weights have changed."""
        self._kept.clear()

    def run(
        self,
        formation: Formation,
        units: Mapping[int, Unit],
        members: Sequence[int],
        pieces: Sequence[Tensor],
        loss_of: LossOf,
        redundant: bool,
    ) -> float:
        """Fill the units' gradients with this rank's share; return its part of the loss."""
        for unit in units.values():
            unit.optimizer.zero_grad(set_to_none=True)
        for pipeline, share in zip(formation.pipelines, formation.micro_batches, strict=True):
            if any(segment.member == self.member for segment in pipeline):
                way = _Way(self, pipeline, share, units, members, pieces)
                way.forward()
                if redundant:
                    way.ahead([shadow for shadow in formation.shadows if shadow.member == self.member])
                return way.backward(loss_of)
        return 0.0

    def through(self, segment: Segment, piece: int, entering: Tensor, units: Mapping[int, Unit]) -> Tensor:
        """Return what leaves a segment, computed now or before."""
        key = (segment.first, segment.last, piece)
        if key in self._kept:
            self.spared += 1
        else:
            self.note("forward")
            self.computed += 1
            if entering.is_floating_point():
                entering = entering.detach().requires_grad_(True)
            leaving = self.chain.forward(units, segment.first, segment.last, entering)
            self._kept[key] = _Kept(entering, leaving)
        return self._kept[key].leaving

    def back(self, segment: Segment, piece: int, gradient: Tensor | None, loss: Tensor | None) -> Tensor | None:
        """Return the gradient of what entered a segment, from that of what left it or from the loss."""
        self.note("backward")
        kept = self._kept.pop((segment.first, segment.last, piece))
        torch.autograd.backward(kept.leaving if loss is None else loss, gradient)
        return kept.entering.grad

    def leaving(self, segment: Segment, piece: int) -> Tensor:
        """Return what left a segment that was passed."""
        return self._kept[segment.first, segment.last, piece].leaving


class _Way:
    """One run through a pipeline; its messages end with it, as nothing else may refer to them."""

    def __init__(
        self,
        passage: Passage,
        pipeline: tuple[Segment, ...],
        share: Sequence[int],
        units: Mapping[int, Unit],
        members: Sequence[int],
        pieces: Sequence[Tensor],
    ) -> None:
        self.passage, self.pipeline, self.share, self.units = passage, pipeline, share, units
        self.rank = {member: rank for rank, member in enumerate(members)}
        self.pieces = pieces
        self.mine = [index for index, segment in enumerate(pipeline) if segment.member == passage.member]
        self.sent: list[tuple[dist.Work | None, Tensor]] = []
        self.gradients: dict[tuple[int, int], Tensor] = {}
        some = next(iter(next(iter(units.values())).weights.values()))
        self.dtype, self.width = some.dtype, int(passage.chain.config.hidden_size)

    def forward(self) -> None:
        """Take every piece through this rank's segments."""
        for index in self.mine:
            for piece in self.share:
                leaving = self.passage.through(self.pipeline[index], piece, self._entering(index, piece), self.units)
                if index + 1 < len(self.pipeline) and self.pipeline[index + 1].member != self.passage.member:
                    self._send(leaving.detach(), index + 1, self._tag(index, piece, 0))
                self.passage.note("between")

    def ahead(self, shadows: Sequence[Segment]) -> None:
        """Compute a successor's forward while its gradients are on their way."""
        for shadow in shadows:
            before = [self.pipeline[index] for index in self.mine if self.pipeline[index].last == shadow.first]
            for piece in self.share:
                if shadow.first == 0:
                    self.passage.through(shadow, piece, self.pieces[piece], self.units)
                elif before:
                    self.passage.through(shadow, piece, self.passage.leaving(before[0], piece), self.units)

    def backward(self, loss_of: LossOf) -> float:
        """Bring every piece back; return the sum of this rank's losses."""
        total = 0.0
        for index in reversed(self.mine):
            segment = self.pipeline[index]
            for piece in self.share:
                loss = gradient = None
                if index == len(self.pipeline) - 1:
                    loss = loss_of(self.passage.leaving(segment, piece), piece)
                    total += float(loss.detach())
                elif self.pipeline[index + 1].member == self.passage.member:
                    gradient = self.gradients.pop((index, piece))
                else:
                    gradient = self._receive(index + 1, piece, self._tag(index, piece, 1))
                entering = self.passage.back(segment, piece, gradient, loss)
                if entering is not None:
                    self._hand_back(index, piece, entering)
                self.passage.note("between")
        for work, _ in self.sent:
            done(work)
        return total

    def _entering(self, index: int, piece: int) -> Tensor:
        if index == 0:
            return self.pieces[piece]
        if self.pipeline[index - 1].member == self.passage.member:
            return self.passage.leaving(self.pipeline[index - 1], piece)
        return self._receive(index - 1, piece, self._tag(index - 1, piece, 0))

    def _hand_back(self, index: int, piece: int, gradient: Tensor) -> None:
        if self.pipeline[index - 1].member == self.passage.member:
            self.gradients[index - 1, piece] = gradient
        else:
            self._send(gradient, index - 1, self._tag(index - 1, piece, 1))

    def _tag(self, cut: int, piece: int, back: int) -> int:
        return 2 * (cut * len(self.pieces) + piece) + back

    def _send(self, tensor: Tensor, segment: int, tag: int) -> None:
        tensor = tensor.contiguous()
        self.sent.append((dist.isend(tensor, self.rank[self.pipeline[segment].member], tag=tag), tensor))

    def _receive(self, segment: int, piece: int, tag: int) -> Tensor:
        tensor = torch.empty(*self.pieces[piece].shape, self.width, dtype=self.dtype)
        return receive(tensor, self.rank[self.pipeline[segment].member], tag=tag)
