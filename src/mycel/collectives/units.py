"""A decoder as a chain of units, each with weights and an optimiser of its own, so that any rank can hold any of them.

Unit 0 is the embedding, units 1 to L are the blocks, unit L + 1 is the final norm with the head. A unit's state (its
weights and what the optimiser remembers of them) is what ranks copy to each other, and all that a recovery moves.
Shapes: B rows, T tokens, D hidden width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from mycel.collectives.saving import prime, state_of
from mycel.decisions.layout import check_family
from mycel.errors import ParcelError
from mycel.models.optimizer import make_optimizer
from mycel.recipe.schema import Training
from mycel.wire.parcel import Tensors

EMBEDDING = "model.embed_tokens.weight"


class Unit:
    """One link of the chain: a module, its parameters by the whole model's names, and their optimiser."""

    def __init__(self, module: nn.Module, weights: Mapping[str, nn.Parameter], training: Training) -> None:
        self.module, self.weights = module, dict(weights)
        self.optimizer = make_optimizer(self.weights, training)
        prime(self.weights, self.optimizer)

    def state(self) -> Tensors:
        """Weights and the optimiser's memory; views of what is trained on."""
        return state_of(self.weights, self.optimizer)

    @torch.no_grad()
    def load(self, state: Tensors) -> None:
        """Take over a state; ``ParcelError`` when it is not of this unit."""
        own = self.state()
        wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
        if wrong or len(state) != len(own):
            raise ParcelError(
                f"a copied unit has no fitting {wrong[0] if wrong else 'names'!r}: it is of another model"
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])


class Chain:
    """What every rank knows of the model: how its units are built, and their weights at the start.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder of the Llama family; its weights are those of version 0.
    """

    def __init__(self, model: Any, training: Training) -> None:
        check_family(model.config)
        inner = model.model
        self.config: PreTrainedConfig = model.config
        self.training, self.rotary = training, inner.rotary_emb
        self.depth = len(inner.layers)
        self.count = self.depth + 2
        self._model = model

    def names(self, unit: int) -> list[str]:
        """Names of a unit's parameters in the whole model; a tied head's goes by the embedding's."""
        return list(self._weights(unit, self._module(unit)))

    def build(self, unit: int) -> Unit:
        """Return a unit of its own at version 0."""
        module = copy.deepcopy(self._module(unit)).train().requires_grad_(True)
        return Unit(module, self._weights(unit, module), self.training)

    def forward(self, units: Mapping[int, Unit], first: int, last: int, entering: Tensor) -> Tensor:
        """Pass token ids (B, T) or hidden states (B, T, D) through units ``first`` to before ``last``."""
        hidden = entering
        positions: Any = None
        for index in range(first, last):
            module = units[index].module
            if index == 0 or index == self.count - 1:
                hidden = module(hidden)
            else:
                if positions is None:
                    positions = self.rotary(hidden, torch.arange(hidden.shape[1])[None])
                left = module(hidden, attention_mask=None, position_embeddings=positions)
                hidden = left[0] if isinstance(left, tuple) else left
        return hidden

    def _module(self, unit: int) -> nn.Module:
        inner = self._model.model
        if unit == 0:
            module: nn.Module = inner.embed_tokens
        elif unit == self.count - 1:
            module = nn.Sequential(inner.norm, self._model.lm_head)
        else:
            module = inner.layers[unit - 1]
        return module

    def _weights(self, unit: int, module: nn.Module) -> dict[str, nn.Parameter]:
        if unit == 0:
            return {EMBEDDING: module.get_parameter("weight")}
        if unit < self.count - 1:
            return {f"model.layers.{unit - 1}.{name}": weight for name, weight in module.named_parameters()}
        head = EMBEDDING if self.config.tie_word_embeddings else "lm_head.weight"
        return {"model.norm.weight": module.get_parameter("0.weight"), head: module.get_parameter("1.weight")}


def packed(states: Mapping[int, Tensors]) -> Tensors:
    """Several units' states as one set of tensors."""
    return {f"{unit}/{name}": tensor for unit, state in states.items() for name, tensor in state.items()}


def unpacked(tensors: Tensors) -> dict[int, Tensors]:
    """Inverse of ``packed``; ``ParcelError`` on a name that begins with no unit."""
    states: dict[int, Tensors] = {}
    for key, tensor in tensors.items():
        unit, _, name = key.partition("/")
        if not unit.isdecimal():
            raise ParcelError(f"a copy holds {key!r}, which belongs to no unit")
        states.setdefault(int(unit), {})[name] = tensor
    return states


def cloned(states: Iterable[tuple[int, Tensors]]) -> dict[int, Tensors]:
    """Copies that training does not change."""
    return {unit: {name: tensor.detach().clone() for name, tensor in state.items()} for unit, state in states}
