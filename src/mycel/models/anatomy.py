"""Where a transformers decoder has its blocks, what runs before them and what after: found by running it once.

The run is on the meta device, which computes shapes and no numbers, so that it costs milliseconds whatever the size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from mycel.errors import ModelError
from mycel.models.layers import transformer_blocks, weight_sites


@dataclass(frozen=True)
class Anatomy:
    """The parts of a decoder.

    Attributes
    ----------
    backbone : str
        Module path of what holds the list of blocks.
    blocks : str
        The list's name in the backbone.
    depth : int
        Number of blocks.
    before, after : tuple of str
        Modules of the backbone that run before the first and after the last block; those without weights that every
        block needs (rotary positions) are in neither.
    tuples : bool
        Whether a block returns a tuple whose first entry is the hidden state.
    weights : dict of str to tuple of str
        Every weight's first name with all names that are tied to it.
    """

    backbone: str
    blocks: str
    depth: int
    before: tuple[str, ...]
    after: tuple[str, ...]
    tuples: bool
    weights: dict[str, tuple[str, ...]]

    def block_path(self, index: int) -> str:
        """Return the module path of a block."""
        return f"{self.backbone}.{self.blocks}.{index}"

    def block_weights(self, index: int) -> list[str]:
        """Return the names of a block's weights."""
        return [name for name in self.weights if name.startswith(f"{self.block_path(index)}.")]

    def end_weights(self, embed: bool, head: bool) -> list[str]:
        """Return the names of the weights outside the blocks that the embedding and the head need."""
        inside = tuple(f"{self.backbone}.{part}." for part in (self.blocks, *self.before, *self.after))
        wanted = tuple(f"{self.backbone}.{part}." for part in (*(self.before * embed), *(self.after * head)))
        return [
            name
            for name, aliases in self.weights.items()
            if any(alias.startswith(wanted) or (head and not alias.startswith(inside)) for alias in aliases)
        ]


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model with real buffers and with weights that take no memory."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def anatomy(config: PreTrainedConfig) -> Anatomy:
    """Find the parts of the decoder that a configuration describes.

    Raises
    ------
    ModelError
        When it is no decoder-only language model, or its parts cannot be told apart.
    """
    if config.is_encoder_decoder:
        raise ModelError(f"a model of the family {config.model_type!r} is no decoder: it cannot be cut into a chain")
    config = copy.deepcopy(config)
    config.pad_token_id = None  # some families look for it among the ids, and the probe's have no values
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config).eval()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"no decoder can be made of this configuration: {str(error)[:200]}") from error
    paths = list(transformer_blocks(model))
    stacks = {path.rpartition(".")[0] for path in paths}
    if len(stacks) != 1:
        raise ModelError(f"the family {config.model_type!r} has {len(stacks)} stacks of blocks; one can be cut")
    backbone, _, blocks = stacks.pop().rpartition(".")
    order, tuples = _probe(model, backbone, blocks)
    place = order.index(blocks)
    core = model.get_submodule(backbone)
    kept = {name for name, part in core.named_children() if _positions_only(part)}
    weights = {
        first: tuple(_name(model, module, leaf) for module, leaf in places)
        for first, places in weight_sites(model).items()
    }
    return Anatomy(
        backbone,
        blocks,
        len(paths),
        tuple(name for name in dict.fromkeys(order[:place]) if name not in kept),
        tuple(name for name in dict.fromkeys(order[place:]) if name not in {blocks, *kept}),
        tuples,
        weights,
    )


def _probe(model: PreTrainedModel, backbone: str, blocks: str) -> tuple[list[str], bool]:
    """Return the order in which the backbone's children run, and whether a block returns a tuple."""
    core = model.get_submodule(backbone)
    order: list[str] = []
    tuples: list[bool] = []
    hooks = [
        part.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, part in core.named_children()
        if name != blocks
    ]
    for block in core.get_submodule(blocks):
        hooks.append(block.register_forward_pre_hook(lambda *_: order.append(blocks)))
        hooks.append(block.register_forward_hook(lambda *passed: tuples.append(isinstance(passed[-1], tuple))))
    try:
        ids = torch.zeros((1, 2), dtype=torch.long, device="meta")
        with torch.device("meta"), torch.no_grad():
            core(input_ids=ids, past_key_values=DynamicCache(config=core.config), use_cache=True)
    except Exception as error:  # any family's own code may fail without numbers
        raise ModelError(f"the family {core.config.model_type!r} cannot be taken apart: {str(error)[:200]}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return order, tuples[0]


def _positions_only(part: nn.Module) -> bool:
    return not any(True for _ in part.parameters()) and any(True for _ in part.buffers())


def _name(model: nn.Module, module: nn.Module, leaf: str) -> str:
    return next(f"{path}.{leaf}" for path, candidate in model.named_modules() if candidate is module)


def stubbed(model: Any, path: str, replacements: dict[str, nn.Module]) -> Any:
    """Return a copy of a module in which children of ``path`` are others; all else is shared, nothing is changed."""
    copied = model.__class__.__new__(model.__class__)
    copied.__dict__ = {**model.__dict__, "_modules": dict(model._modules)}
    first, _, rest = path.partition(".")
    if first:
        copied._modules[first] = stubbed(model._modules[first], rest, replacements)
    else:
        copied._modules.update(replacements)
    return copied
