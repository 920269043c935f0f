"""Attention over pages, put under transformers' own blocks through its attention interface.

Tokens of all sequences of a batch stand in one row; every sequence attends to its own pages. The mask is ours too, so
the blocks are never given one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from mycel.errors import ModelError
from mycel.generation.memory import Memory

NAME = "mycel_paged"
# Arguments of other families' attention whose meaning is not built here; ignoring them would be wrong in silence.
UNKNOWN = ("s_aux", "position_bias", "sinks")


@dataclass(frozen=True)
class Span:
    """One sequence's tokens in the row: from ``start`` to ``end``, and where its ``length`` positions lie."""

    start: int
    end: int
    length: int
    where: Tensor | slice


@dataclass
class Paged:
    """The batch under way: where keys and values are written, and what each span reads."""

    memory: Memory
    slots: Tensor | slice
    spans: Sequence[Span]
    masks: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def mask(self, new: int, length: int, window: int) -> Tensor:
        """Return which of ``length`` positions each of the last ``new`` may see, as a bool matrix."""
        key = (new, length, window)
        if key not in self.masks:
            row = torch.arange(length - new, length)[:, None]
            column = torch.arange(length)[None]
            seen = column <= row
            self.masks[key] = seen & (column > row - window) if window else seen
        return self.masks[key]


def register() -> None:
    """Make ``NAME`` known to transformers."""
    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    paged: Paged | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend over pages; ``query``, ``key`` and ``value`` are (1, heads, tokens, width).

    Returns
    -------
    tuple
        Output of shape (1, tokens, heads, width), and None for the weights.
    """
    if paged is None:
        raise ModelError(f"{type(module).__name__} does not hand its arguments on to the attention function")
    given = [name for name in UNKNOWN if others.get(name) is not None]
    if given:
        raise ModelError(f"{type(module).__name__} attends with {given[0]}, which paged attention does not know")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    paged.memory.write(layer, paged.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    outputs = [
        attend(query[:, :, span.start : span.end], paged, span, layer, scaling, softcap, sliding_window or 0)
        for span in paged.spans
    ]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)).transpose(1, 2), None


def attend(
    query: Tensor, paged: Paged, span: Span, layer: int, scaling: float | None, softcap: float | None, window: int
) -> Tensor:
    """Attention of one sequence's new tokens, shape (1, heads, new, width), over all of its positions."""
    keys, values = paged.memory.read(layer, span.where, span.length)
    new, length = span.end - span.start, span.length
    if window and new == 1 and length > window:
        keys, values, length = keys[-window:], values[-window:], window
    keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
    groups = query.shape[1] // keys.shape[1]
    limited = bool(window) and length > window
    if new == 1 and softcap is None:
        folded = query.reshape(1, keys.shape[1], groups, query.shape[-1])
        found = functional.scaled_dot_product_attention(folded, keys, values, scale=scaling)
        return found.reshape(1, query.shape[1], 1, values.shape[-1])
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    if softcap is not None:
        return _capped(query, keys, values, paged.mask(new, length, window), scaling, softcap)
    if new == length and not limited:
        return functional.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling)
    mask = paged.mask(new, length, window)
    return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)


def _capped(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float | None, cap: float) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = cap * torch.tanh(query @ keys.transpose(-1, -2) * (scale / cap))
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ values


def _no_mask(*arguments: Any, **named: Any) -> None:
    return None
