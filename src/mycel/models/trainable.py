"""What is trained and travels: a named sub-state with algebra, bound to a base.

Many trainables live over one frozen base. Inside ``active()`` the model computes with one of them; outside, the base
is what it was before, to the bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.hooks import RemovableHandle

from mycel.errors import ModelError
from mycel.models.base import Base
from mycel.recipe.schema import TrainableSpec

State = dict[str, Tensor]


class Trainable(ABC):
    """A named sub-state bound to a base.

    Attributes
    ----------
    kind : str
        The name a recipe chooses it by.
    base : Base
        The frozen model it lives over.
    """

    kind: str

    def __init__(self, base: Base) -> None:
        self.base = base
        self._mask_hooks: list[RemovableHandle] = []

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the live parameters: what an optimiser steps."""

    @abstractmethod
    def initial(self, seed: int) -> State:
        """Return the state that training starts from; nothing is loaded."""

    @abstractmethod
    def delta_weight(self, state: Mapping[str, Tensor]) -> State:
        """Return the dense change that ``state`` makes, by the name of the base weight it changes."""

    @abstractmethod
    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add what ``state`` changes into the base's weights for good."""

    @abstractmethod
    def active(self) -> AbstractContextManager[None]:
        """Inside the block the model computes with this trainable and only its parameters require gradients."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the live state: an adapter in PEFT's format, or a whole model in Hugging Face's."""

    def state(self) -> State:
        """Return detached copies of the live parameters."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy ``state`` into the live parameters.

        Raises
        ------
        ModelError
            When names or shapes differ, or a value is not finite; the live parameters are then untouched.
        """
        live = self.parameters()
        check_state(state, {name: tuple(parameter.shape) for name, parameter in live.items()})
        with torch.no_grad():
            for name, parameter in live.items():
                parameter.copy_(state[name])

    def mask(self, masks: Mapping[str, Tensor] | None) -> None:
        """Hold every element still whose mask is 0, by making its gradient zero; ``None`` clears all masks.

        A parameter that ``masks`` does not name stays free. Masks act on gradients alone: weight decay and momentum
        gathered before are the optimiser's own.
        """
        live = self.parameters()
        for name, mask in (masks or {}).items():
            if name not in live or mask.shape != live[name].shape:
                expected = tuple(live[name].shape) if name in live else "no parameter of that name"
                raise ModelError(f"mask {name[:80]!r} has the shape {tuple(mask.shape)}; expected {expected}")
            if not bool(((mask == 0) | (mask == 1)).all()):
                raise ModelError(f"mask {name[:80]!r} holds values other than 0 and 1: round it first")
        for handle in self._mask_hooks:
            handle.remove()
        self._mask_hooks = [_freeze(live[name], mask == 0) for name, mask in (masks or {}).items()]

    def size(self) -> int:
        """Return the number of elements."""
        return sum(parameter.numel() for parameter in self.parameters().values())


def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a state whose names, shapes or values do not fit.

    Raises
    ------
    ModelError
        Naming the first tensor at fault.
    """
    if state.keys() != shapes.keys():
        missing, unknown = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys())
        raise ModelError(
            f"the state does not fit the trainable: missing {missing[:3]}, unknown {unknown[:3]};"
            " build the trainable with the recipe that made the state"
        )
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise ModelError(f"tensor {name!r} has the shape {tuple(state[name].shape)}; the trainable needs {shape}")
        if not state[name].is_floating_point():
            raise ModelError(f"tensor {name!r} holds {state[name].dtype}; the trainable needs floating-point values")
    check_finite(state)


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Refuse a state with a NaN or an infinite value.

    Raises
    ------
    ModelError
        Naming the first such tensor.
    """
    # One fused maximum over all tensors, finite only if every value is, keeps this off a step's critical path.
    filled = [tensor.detach() for tensor in state.values() if tensor.numel()]
    if filled and not bool(torch.isfinite(get_total_norm(filled, norm_type=float("inf")))):
        name = next(name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all()))
        raise ModelError(f"tensor {name!r} holds a NaN or infinite value: lower the learning rate or drop this answer")


def build_trainable(spec: TrainableSpec, base: Base, rank: int | None = None) -> Trainable:
    """Build the trainable that a recipe describes over ``base``.

    Parameters
    ----------
    spec : TrainableSpec
        The recipe's section.
    base : Base
        The opened base.
    rank : int, optional
        LoRA rank of this party; without it ``spec.rank``, of a list the largest.

    Raises
    ------
    ModelError
        When the spec does not fit the base.
    """
    from mycel.models.blocks import Blocks
    from mycel.models.full import Full
    from mycel.models.lora import Lora
    from mycel.models.prompt import Prompt

    if spec.kind == "lora":
        ranks = spec.rank if isinstance(spec.rank, list) else [spec.rank]
        return Lora(base, max(ranks) if rank is None else rank, spec.scaling, spec.targets)
    if spec.kind == "prompt":
        return Prompt(base, spec.length)
    return Full(base) if spec.kind == "full" else Blocks(base, spec.blocks)


def _freeze(parameter: nn.Parameter, frozen: Tensor) -> RemovableHandle:
    def hook(gradient: Tensor) -> Tensor:
        return gradient.masked_fill(frozen, 0.0)

    return parameter.register_hook(hook)  # type: ignore[no-any-return,no-untyped-call]
