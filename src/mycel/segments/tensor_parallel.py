"""Blocks shared out inside: each rank holds some heads and some columns, in shares that need not be equal.

What is split how is the family's own plan (``base_model_tp_plan`` of its configuration): ``colwise`` layers give up
output rows, ``rowwise`` layers the matching inputs, everything else is held by all. A partial result is added up over
the ranks behind every rowwise layer; where attention and feed-forward stand side by side, once behind the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from mycel.decisions.shares import shares
from mycel.errors import ModelError
from mycel.models.cut import Cut

Sum = Callable[[Tensor], Tensor]


class Sharded:
    """A cut of which this process keeps one rank's share; weights of the other shares are let go.

    Parameters
    ----------
    cut : Cut
        Its blocks are cut down in place.
    rank : int
        This rank.
    weights : sequence of float
        The ranks' shares, in proportion.
    reduce : callable
        Returns the sum of a tensor over all ranks; called by all in the same order.
    syncs : int
        2: after attention and after the feed-forward part. 1: once a block, where the family lets them stand side by
        side.
    copied : bool
        Whether shares get memory of their own; otherwise they are views of the whole weights, which stay where they
        are (in a mapped file).

    Raises
    ------
    ModelError
        When the family has no plan, or fewer heads than ranks.
    """

    def __init__(
        self, cut: Cut, rank: int, weights: Sequence[float], reduce: Sum, syncs: int = 2, copied: bool = True
    ) -> None:
        self.cut, self.rank, self.weights, self.reduce, self.syncs = cut, rank, weights, reduce, syncs
        self.copied = copied
        self.plan = plan(cut)
        if syncs == 1 and not side_by_side(cut):
            raise ModelError(f"in {cut.config.model_type!r} the feed-forward part needs the sum of attention: two sums")
        for index in range(cut.first, cut.last):
            self.shard(cut.block(index))

    def shard(self, block: nn.Module) -> None:
        """Keep this rank's share of a block, and add up behind it."""
        kept = self.share(block, dict(block.named_parameters()))
        for path, layer, style in self._layers(block):
            leaf = {name: kept.get(f"{path}.{name}") for name in ("weight", "bias")}
            for name, tensor in leaf.items():
                layer._parameters[name] = None if tensor is None else nn.Parameter(tensor, layer.weight.requires_grad)
            if style == "colwise":
                layer.register_forward_pre_hook(lambda _, passed: (_Entered.apply(passed[0], self.reduce),))  # type: ignore[no-untyped-call]
            elif self.syncs == 2:
                layer.register_forward_hook(lambda *passed: _Summed.apply(passed[-1], self.reduce))  # type: ignore[no-untyped-call]
        if self.syncs == 1:
            block.register_forward_hook(self._beside, with_kwargs=True)

    def share(self, block: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's part of a block's whole weights, by name within the block."""
        kept = {name: tensor.detach() for name, tensor in weights.items()}
        for path, _, style in self._layers(block):
            name, axis = f"{path}.weight", 0 if style == "colwise" else 1
            size = kept[name].shape[axis]
            units = self._units(block.get_submodule(path.rpartition(".")[0]), size)
            mine, width = shares(units, self.weights)[self.rank], size // units
            share = kept[name].narrow(axis, mine.start * width, len(mine) * width)
            kept[name] = share.clone() if self.copied else share
            bias = kept.get(f"{path}.bias")
            if bias is not None and style == "colwise":
                kept[f"{path}.bias"] = bias[mine.start * width : mine.stop * width].clone()
            elif bias is not None and self.rank:
                del kept[f"{path}.bias"]  # a bias behind the sum is added once
        return kept

    def _layers(self, block: nn.Module) -> Iterator[tuple[str, nn.Linear, str]]:
        for path, layer in block.named_modules():
            style = next((style for pattern, style in self.plan.items() if fnmatch(path, pattern)), None)
            if style is not None and isinstance(layer, nn.Linear):
                yield path, layer, style

    def _beside(self, block: nn.Module, passed: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        """Add up what both parts made; the residual is everyone's and is added once."""
        made = output[0] if isinstance(output, tuple) else output
        entered = passed[0] if passed else named["hidden_states"]
        whole = entered + _Summed.apply(made - entered, self.reduce)  # type: ignore[no-untyped-call]
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    def _units(self, parent: nn.Module, size: int) -> int:
        """Return into how many parts a layer may be cut: heads with their keys and values, or columns."""
        units = size
        if hasattr(parent, "head_dim") or hasattr(parent, "head_size"):
            config = self.cut.config
            units = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        if size % units:
            raise ModelError(f"a layer of {size} numbers cannot be cut into {units} units")
        return units


def plan(cut: Cut) -> dict[str, str]:
    """Return how the layers of a block are split, by path in the block."""
    found = getattr(cut.config, "base_model_tp_plan", None) or {}
    prefix = f"{cut.parts.blocks}.*."
    inside = {path.removeprefix(prefix): style for path, style in found.items() if path.startswith(prefix)}
    known = {path: style for path, style in inside.items() if style in ("colwise", "rowwise")}
    if set(known.values()) != {"colwise", "rowwise"}:
        raise ModelError(f"the family {cut.config.model_type!r} has no plan for tensor parallelism: cut it by blocks")
    return known


def side_by_side(cut: Cut) -> bool:
    """Return whether attention and feed-forward part both read the block's input."""
    config = cut.config
    return config.model_type == "phi" or bool(getattr(config, "use_parallel_residual", False))


class _Summed(torch.autograd.Function):
    """Adds up over the ranks on the way forward; a gradient goes back to everyone as it is."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, reduce: Sum) -> Tensor:
        return reduce(tensor)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[0], None


class _Entered(torch.autograd.Function):
    """Lets a state pass to this rank's share; on the way back, the shares' gradients are added up."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, reduce: Sum) -> Tensor:
        ctx.reduce = reduce
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.reduce(gradient[0]), None
