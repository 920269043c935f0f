"""The two factors of LoRA states: ``lora_A`` (rank, inputs) leads down, ``lora_B`` (outputs, rank) leads up."""

from __future__ import annotations

from mycel.errors import RecipeError
from mycel.recipe.schema import Recipe
from mycel.wire.parcel import Tensors


def require_lora(recipe: Recipe) -> None:
    """Refuse a recipe whose trainable has no factors."""
    if recipe.trainable.kind != "lora":
        raise RecipeError(
            f"trainable.kind is {recipe.trainable.kind!r}, and the system {recipe.system!r} works on LoRA's two "
            "factors: set trainable.kind = 'lora'"
        )


def is_a(name: str) -> bool:
    """Whether a tensor is a factor A."""
    return name.endswith(".lora_A")


def is_b(name: str) -> bool:
    """Whether a tensor is a factor B."""
    return name.endswith(".lora_B")


def factors_a(state: Tensors) -> Tensors:
    """The factors A of a state."""
    return {name: tensor for name, tensor in state.items() if is_a(name)}


def factors_b(state: Tensors) -> Tensors:
    """The factors B of a state."""
    return {name: tensor for name, tensor in state.items() if is_b(name)}


def layers(state: Tensors) -> list[str]:
    """Paths of the layers that a state adapts, sorted."""
    return sorted(name.removesuffix(".lora_A") for name in state if is_a(name))
