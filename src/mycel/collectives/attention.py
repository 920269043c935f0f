"""Causal attention over rows whose tokens lie on several ranks: keys and values are gathered, queries stay.

Or, where the layout says ``attention = "balanced"``, by `mycel.collectives.balanced_attention`: no rank holds all keys.

Rank p of P holds the tokens from ``p T/P`` to before ``(p+1) T/P``.
Shapes: B rows, H heads, T tokens, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mycel.collectives.balanced_attention import BalancedAttention, Stash

NAME = "mycel_sequence"


@dataclass(frozen=True)
class Spanning:
    """How attention spans the ranks of ``group``."""

    group: dist.ProcessGroup
    balanced: bool = False
    stash: Stash | None = None


_spanning: list[Spanning] = []


class _Gather(torch.autograd.Function):
    """All-gather along the tokens; the way back sums every rank's gradient and keeps this rank's part."""

    @staticmethod
    def forward(context: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        context.group = group
        size = dist.get_world_size(group)
        gathered = local.new_empty(size * local.shape[0], *local.shape[1:])
        dist.all_gather_single(gathered, local.contiguous(), group=group)
        return torch.cat(gathered.chunk(size), dim=2)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        size = dist.get_world_size(context.group)
        parts = torch.cat(gradients[0].chunk(size, dim=2)).contiguous()
        own = parts.new_empty(parts.shape[0] // size, *parts.shape[1:])
        dist.reduce_scatter_single(own, parts, group=context.group)
        return own, None


def spanning_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attend from this rank's tokens to all tokens up to each; the form that ``transformers`` calls.

    Parameters
    ----------
    query, key, value : Tensor
        (B, H, T/P, D), with fewer heads for keys and values where they are shared.
    """
    spanning = _spanning[-1]
    group, scale = spanning.group, options.get("scaling") or query.shape[-1] ** -0.5
    if spanning.balanced:
        apply: Callable[..., Tensor] = BalancedAttention.apply
        return apply(query, key, value, scale, group, spanning.stash).transpose(1, 2).contiguous(), None
    here, own = dist.get_rank(group), query.shape[2]
    keys, values = _Gather.apply(key, group), _Gather.apply(value, group)  # type: ignore[no-untyped-call]
    shared = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
    place = torch.arange(own, device=query.device) + here * own
    seen = torch.arange(keys.shape[2], device=query.device)[None, :] <= place[:, None]
    mixed = nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=scale)
    return mixed.transpose(1, 2).contiguous(), None


@contextmanager
def over_tokens(model: PreTrainedModel, spanning: Spanning) -> Iterator[None]:
    """Inside the block the model's attention spans the ranks of a group; if it is one rank, it is as it was."""
    if dist.get_world_size(spanning.group) == 1:
        yield
        return
    before = model.config._attn_implementation
    register: Callable[..., None] = ALL_ATTENTION_FUNCTIONS.register
    register(NAME, spanning_attention)
    model.config._attn_implementation = NAME
    _spanning.append(spanning)
    try:
        yield
    finally:
        _spanning.pop()
        model.config._attn_implementation = before
