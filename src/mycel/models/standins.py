"""What stands in a model's forward for the parts that live elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache


def stand_in(part: nn.Module) -> nn.Module:
    """Return what takes the place of a part outside the blocks."""
    return Nothing() if isinstance(part, nn.Embedding) else Passing()


class Elsewhere(nn.Module):
    """Keeps a missing block's place, and the plain attributes that a family's loop over blocks may read."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, value in vars(block).items():
            if isinstance(value, str | int | float) and not name.startswith("_") and name != "training":
                setattr(self, name, value)


class Passing(nn.Module):
    """Returns its input."""

    def forward(self, value: Any, *_: Any, **__: Any) -> Any:
        """Return ``value``."""
        return value


class Nothing(nn.Module):
    """Adds nothing, wherever a table of embeddings would have been added."""

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """Return a zero that fits every shape."""
        return torch.zeros(())


class Entry(Elsewhere):
    """Runs a block on the hidden state that came over the cut, whatever the family's entry made of it before."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.block = block
        self.hidden: Tensor | None = None

    def forward(self, hidden: Tensor, *rest: Any, **named: Any) -> Any:
        """Run the block."""
        return self.block(hidden if self.hidden is None else self.hidden, *rest, **named)


class Given(Elsewhere):
    """Stands for all blocks before the head: returns what came over the cut, in the form that a block returns."""

    def __init__(self, tuples: bool, block: nn.Module) -> None:
        super().__init__(block)
        self.tuples = tuples
        self.hidden: Tensor | None = None

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Any:
        """Return what was given."""
        given = hidden if self.hidden is None else self.hidden
        return (given,) if self.tuples else given


class ShiftedCache(Cache):  # type: ignore[misc]
    """A cache of blocks that know themselves by their place in the whole model, and are numbered from 0 in it."""

    def __init__(self, inner: Cache, first: int) -> None:
        self.inner, self.first = inner, first
        self.layers = inner.layers

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **named: Any) -> Any:
        """Store under the place that the block has here."""
        return self.inner.update(key_states, value_states, layer_idx - self.first, *rest, **named)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens held."""
        return int(self.inner.get_seq_length(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> Any:
        """Return the length and offset of the mask."""
        return self.inner.get_mask_sizes(query_length, layer_idx)
