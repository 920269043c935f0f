"""What a model is made of: its transformer blocks, its linear layers, and where each weight sits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches

from torch import nn
from transformers.pytorch_utils import Conv1D

from mycel.errors import ModelError

Sites = list[tuple[nn.Module, str]]


def transformer_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the transformer blocks by module path, in order (encoder before decoder).

    Raises
    ------
    ModelError
        When the model holds no list of blocks.
    """
    stacks: list[str] = []
    blocks: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{stack}.") for stack in stacks):
            stacks.append(path)
            blocks.update({f"{path}.{index}": block for index, block in enumerate(module)})
    if not blocks:
        raise ModelError(f"the model {type(model).__name__} has no list of transformer blocks: choose another base")
    return blocks


def linear_layers(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Linear | Conv1D]:
    """Return the linear layers that ``targets`` name, by module path.

    Parameters
    ----------
    model : nn.Module
        The base model.
    targets : iterable of str
        Whole module paths or their last parts (``q_proj``); empty: every linear layer inside the blocks.

    Raises
    ------
    ModelError
        When a target names no linear layer; the sentence lists the nearest names.
    """
    every = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    wanted = list(targets)
    if not wanted:
        prefixes = tuple(f"{path}." for path in transformer_blocks(model))
        return {path: layer for path, layer in every.items() if path.startswith(prefixes)}
    chosen: set[str] = set()
    for target in wanted:
        found = {path for path in every if path == target or path.endswith(f".{target}")}
        if not found:
            raise ModelError(_unknown("trainable.targets", target, sorted({path.rpartition(".")[2] for path in every})))
        chosen |= found
    return {path: layer for path, layer in every.items() if path in chosen}


def features(layer: nn.Linear | Conv1D) -> tuple[int, int]:
    """Return (inputs, outputs) of a linear layer; GPT-2's ``Conv1D`` stores its weight transposed."""
    if isinstance(layer, Conv1D):
        return int(layer.weight.shape[0]), int(layer.weight.shape[1])
    return layer.in_features, layer.out_features


def weight_sites(model: nn.Module) -> dict[str, Sites]:
    """Return every place a weight is used at, by the weight's first name.

    Tied weights are one entry with several places. Names are those of the bare model, also while LoRA layers wrap it.
    """
    sites: dict[str, Sites] = {}
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if "lora_" in path:
            continue
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{path}.{leaf}".lstrip(".").replace(".base_layer.", ".")
            places = sites.setdefault(first.setdefault(id(parameter), name), [])
            if not any(module is owner and leaf == other for owner, other in places):
                places.append((module, leaf))
    return sites


@contextmanager
def substituted(sites: Mapping[str, Sites], replacements: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Put other parameters in place inside the block; afterwards the very same objects are back."""
    before = [(module, leaf, module._parameters[leaf]) for name in replacements for module, leaf in sites[name]]
    try:
        for name, parameter in replacements.items():
            for module, leaf in sites[name]:
                module._parameters[leaf] = parameter
        yield
    finally:
        for module, leaf, original in before:
            module._parameters[leaf] = original


def _unknown(field: str, found: str, known: list[str]) -> str:
    near = get_close_matches(found, known, n=3, cutoff=0.4) or known[:6]
    return f"{field} names {found!r}, which no linear layer is called: did you mean {', '.join(near)}?"
