"""Low-rank adapters in PEFT's format, loaded beside each other over one base, computed together in one batch."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor, nn

from mycel.errors import ModelError
from mycel.models.adapter import read_adapter
from mycel.models.layers import features
from mycel.models.linear import Factors, FewRowConv1D, FewRowLinear, Layer
from mycel.models.lora import PREFIX, UNSUPPORTED

MOST_RANK = 4096


def load_adapter(model: nn.Module, name: str, folder: Path) -> int:
    """Load a LoRA adapter under ``name``; an adapter of that name is replaced.

    Returns
    -------
    int
        Bytes of its weights.

    Raises
    ------
    ModelError
        When it is no plain LoRA, is damaged, or does not fit this base.
    """
    config, tensors = read_adapter(folder, "LORA")
    unsupported = [key for key in UNSUPPORTED if config.get(key)]
    if unsupported or config.get("bias", "none") != "none":
        raise ModelError(f"the adapter in {folder} uses {unsupported or ['bias']}: plain LoRA is needed")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not 0 < rank <= MOST_RANK or not isinstance(alpha, int | float):
        raise ModelError(f"the adapter in {folder} has rank {rank!r} and alpha {alpha!r}: save it again")
    if not math.isfinite(alpha):
        raise ModelError(f"the adapter in {folder} has alpha {alpha!r}: save it again")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    layers = _layers(model)
    found: dict[str, Factors] = {}
    for path in sorted({key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors}):
        down, up = (tensors.get(f"{PREFIX}{path}.lora_{part}.weight") for part in "AB")
        layer = layers.get(path)
        if layer is None or down is None or up is None or not _fits(layer, down, up, rank):
            raise ModelError(f"the adapter in {folder} does not fit this base at {path[:120]!r}: use its own base")
        found[path] = Factors(down.t().contiguous(), (up.t() * scaling).contiguous())
    if not found:
        raise ModelError(f"the adapter in {folder} holds no LoRA weights: save it again")
    drop_adapter(model, name)
    for path, factors in found.items():
        layers[path].adapters[name] = factors
    return sum(factors.down.nbytes + factors.up.nbytes for factors in found.values())


def drop_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter; nothing happens if there is none."""
    for layer in _layers(model).values():
        layer.adapters.pop(name, None)


def _layers(model: nn.Module) -> dict[str, Layer]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, FewRowLinear | FewRowConv1D)}


def _fits(layer: Layer, down: Tensor, up: Tensor, rank: int) -> bool:
    inputs, outputs = features(layer)
    return down.shape == (rank, inputs) and up.shape == (outputs, rank)
