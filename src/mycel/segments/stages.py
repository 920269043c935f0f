"""A decoder cut into stages that know of each other only what crosses: states forward, gradients back.

Each stage keeps what entered it and runs autograd over its own blocks alone; the stage before is told the gradient of
what it sent. So a stage may stand anywhere, and a link may have a codec of its own. With lossless links, loss and
gradients are those of the uncut model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mycel.errors import RecipeError
from mycel.models.cut import Cut
from mycel.segments.boundary import Boundary, sound
from mycel.segments.segment import Segment

IGNORED = -100


class Stages:
    """Consecutive blocks as segments, joined by boundaries.

    Parameters
    ----------
    model : PreTrainedModel
        Whose weights the stages share; those that require gradients collect them.
    split : sequence of int
        Blocks of each stage.
    codecs : sequence of str
        Of the link behind each stage but the last; none: raw.

    Attributes
    ----------
    links : list of Boundary
        They count what crossed them, both ways.
    """

    def __init__(self, model: PreTrainedModel, split: Sequence[int], codecs: Sequence[str] = ()) -> None:
        self.cut = Cut.of(model)
        if sum(split) != self.cut.depth or min(split) < 1:
            raise RecipeError(f"the split is {list(split)}: numbers above zero that add up to {self.cut.depth} blocks")
        codecs = codecs or ["raw"] * (len(split) - 1)
        if len(codecs) != len(split) - 1:
            raise RecipeError(f"{len(codecs)} codecs for the {len(split) - 1} links between {len(split)} stages")
        edges = [0, *accumulate(split)]
        self.model = model
        self.segments = [Segment(self.cut, first, last) for first, last in pairwise(edges)]
        self.links = [Boundary(codec) for codec in codecs]

    def gradients(self, rows_BT: Tensor, pieces: int = 1) -> float:
        """Add the gradient of the mean loss over a batch to the weights', micro-batch by micro-batch; return the loss.

        Parameters
        ----------
        rows_BT : Tensor
            int64 token ids.
        pieces : int
            Micro-batches; all go forward before the first goes back.
        """
        count, total = rows_BT.shape[0] * (rows_BT.shape[1] - 1), 0.0
        waiting = []
        for index, piece in enumerate(rows_BT.chunk(pieces)):
            hidden = embedded = self.cut.embed(piece)
            for stage, segment in enumerate(self.segments):
                hidden = segment.forward(hidden, f"piece {index} {stage}")
                if stage < len(self.links):
                    hidden = self.crossed(stage, "forward", hidden)
            loss, gradient = self.ends(hidden, piece, count)
            total += loss
            waiting.append((index, embedded, gradient))
        for index, embedded, gradient in waiting:
            for stage in reversed(range(len(self.segments))):
                if stage < len(self.links):
                    gradient = self.crossed(stage, "backward", gradient)
                gradient = self.segments[stage].backward(gradient, f"piece {index} {stage}")
            embedded.backward(gradient)  # type: ignore[no-untyped-call]
        return total

    def ends(self, hidden_BTD: Tensor, piece_BT: Tensor, count: int) -> tuple[float, Tensor]:
        """Loss behind the last block over ``count`` targets, and its gradient there; the head collects its own."""
        entering = hidden_BTD.detach().requires_grad_()
        targets = torch.cat([piece_BT[:, 1:], torch.full_like(piece_BT[:, :1], IGNORED)], dim=1)
        logits = self.cut.head(entering)
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        (loss / count).backward()  # type: ignore[no-untyped-call]
        assert entering.grad is not None
        return float(loss.detach()) / count, entering.grad

    def crossed(self, link: int, kind: str, tensor: Tensor) -> Tensor:
        """What arrives on the other side of a link."""
        frame = self.links[link].pack(kind, {}, state=tensor.detach())
        return sound(Boundary.unpack(frame, (kind,)), "state", tuple(tensor.shape))

    def bytes(self) -> list[int]:
        """Bytes that crossed each link, both ways."""
        return [link.sent for link in self.links]


def train(stages: Stages, batches: Iterator[Tensor], rate: float, pieces: int = 1) -> list[float]:
    """Train a staged model with AdamW; return the loss before each step."""
    optimizer = torch.optim.AdamW(stages.model.parameters(), lr=rate)
    losses = []
    for rows in batches:
        optimizer.zero_grad(set_to_none=True)
        losses.append(stages.gradients(rows, pieces))
        nn.utils.clip_grad_norm_(stages.model.parameters(), 1.0)
        optimizer.step()
    return losses
