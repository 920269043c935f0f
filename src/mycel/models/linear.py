"""Linear layers for few rows: the same weights and sums, in the order and layout that the processor answers fastest.

A decode step multiplies every weight with a handful of rows, so its time is the time to read the weights. PyTorch
writes ``x @ W.T``; on many machines its BLAS then reads far below the memory's bandwidth. For one row, ``W @ x.T`` in
two halves comes near it; for more, oneDNN over weights laid out in blocks once, which are a second copy of them.
`benchmarks/serving.py` measures the difference.

Low-rank adapters of several requests are computed in the same layers, each over the rows of its own requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

FEW_ROWS = 8
ROWS_EXPECTED = 8  # a hint for the blocks' layout; any number of rows computes


@dataclass
class Routing:
    """Which rows of the running batch belong to which adapter: (name, first row, end), the base's rows left out."""

    runs: list[tuple[str, int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Factors:
    """One layer's low-rank change: ``down`` of shape (inputs, rank), ``up`` of (rank, outputs), scaling included."""

    down: Tensor
    up: Tensor


class _Adapted(nn.Module):
    """What both kinds of layer share: adapters by name over a routing that the executor sets before each step."""

    adapters: dict[str, Factors]
    routing: Routing
    packed: Tensor | None

    def _add_adapters(self, x: Tensor, y: Tensor) -> Tensor:
        rows_in, rows_out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for name, start, end in self.routing.runs:
            factors = self.adapters.get(name)
            if factors is not None:
                rows_out[start:end].addmm_(rows_in[start:end] @ factors.down, factors.up)
        return y


class FewRowLinear(_Adapted, nn.Linear):
    """``nn.Linear`` with the fast order for few rows."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias`` and the adapters' part."""
        y = _product(input, self.weight, self.bias, self.packed)
        return self._add_adapters(input, y) if self.adapters and self.routing.runs else y


class FewRowConv1D(_Adapted, Conv1D):  # type: ignore[misc]
    """The layer of GPT-2, whose weight is kept as (inputs, outputs)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight + bias`` and the adapters' part."""
        y = cast("Tensor", super().forward(x))
        return self._add_adapters(x, y) if self.adapters and self.routing.runs else y


def quicken(model: nn.Module, pack: bool = True) -> Routing:
    """Let the model's linear layers take the fast order and adapters; return the routing that they share.

    Parameters
    ----------
    model : nn.Module
        In float32 on the processor; layers elsewhere compute as before.
    pack : bool
        Whether a second copy of the weights, laid out in blocks, is made for more rows than one.
    """
    routing = Routing()
    kinds: dict[type, type] = {nn.Linear: FewRowLinear, Conv1D: FewRowConv1D}
    for layer in model.modules():
        kind = kinds.get(type(layer))
        if kind is not None:
            layer.__class__ = kind
            quick = cast("Layer", layer)
            quick.adapters, quick.routing, quick.packed = {}, routing, None
            weight = quick.get_parameter("weight").detach()
            if pack and kind is FewRowLinear and _plain(weight) and torch._C._has_mkldnn:
                quick.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_EXPECTED)
    return routing


def rounded_rows(rows: int) -> int:
    """Return for how many rows so many are computed: at most a quarter more, of four numbers an octave.

    oneDNN compiles a kernel for each number of rows and keeps it: with all numbers that come, memory would grow for
    thousands of requests, and each new one would wait for its kernel.
    """
    step = 1 << max(0, rows.bit_length() - 3)
    return -(-rows // step) * step


def _plain(weight: Tensor) -> bool:
    return weight.dtype is torch.float32 and weight.device.type == "cpu"


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None) -> Tensor:
    inputs, outputs = x.shape[-1], weight.shape[0]
    rows = x.numel() // inputs
    if rows > 1 and packed is not None:
        more = rounded_rows(rows) - rows
        padded = functional.pad(x.reshape(rows, inputs), (0, 0, 0, more)) if more else x
        found: Tensor = torch.ops.mkldnn._linear_pointwise(padded, packed, bias, "none", [], "")
        return found[:rows].view(*x.shape[:-1], outputs) if more else found
    if rows > FEW_ROWS or rows == 0 or not _plain(weight):
        return functional.linear(x, weight, bias)
    across = x.reshape(rows, inputs).t()
    if rows > 1:
        y = torch.mm(weight, across).t()
    elif outputs % 2 == 0:
        y = torch.bmm(weight.view(2, outputs // 2, inputs), across.expand(2, inputs, 1)).view(1, outputs)
    else:
        y = torch.mm(weight, across.expand(inputs, 2))[:, :1].t()
    shaped = y.contiguous().view(*x.shape[:-1], outputs)
    return shaped if bias is None else shaped.add_(bias)


Layer = FewRowLinear | FewRowConv1D
