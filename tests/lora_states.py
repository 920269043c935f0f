"""Small LoRA states, answers and runs that the tests of systems share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mycel.recipe.schema import Recipe
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.registry import load_system
from mycel.rounds.simulation import Finished
from mycel.rounds.system import Answer, System
from mycel.wire.parcel import Parcel, Tensors

RANKS = [2, 4, 8]
LAYERS = {"m.one": (12, 9), "m.two": (10, 16)}  # inputs, outputs
SMALL: dict[str, Any] = {
    "data.parties": "iid",
    "data.count": 3,
    "data.examples": 16,
    "data.held_out": 4,
    "data.max_length": 64,
    "rounds.count": 2,
    "rounds.local_steps": 2,
    "trainable.rank": 4,
}
Runs = Callable[..., Finished]


def random_lora(rank: int, seed: int) -> Tensors:
    source = torch.Generator().manual_seed(seed)
    state: Tensors = {}
    for path, (inputs, outputs) in LAYERS.items():
        state[f"{path}.lora_A"] = torch.randn(rank, inputs, generator=source)
        state[f"{path}.lora_B"] = torch.randn(outputs, rank, generator=source)
    return state


def answer(node: int, update: Tensors, samples: int = 10, **header: Any) -> Answer:
    tensors = {f"update/{name}": value for name, value in update.items()}
    return Answer(node, Parcel("answer", {"samples": samples, **header}, tensors), samples, 0, float(samples))


def build(name: str, rank: int | list[int] = 4, **knobs: Any) -> System:
    return load_system(Recipe().replace({"system": name, "trainable.rank": rank, "knobs": knobs}))


def dense_mean(states: list[Tensors], weights: list[float], path: str) -> np.ndarray[Any, Any]:
    total: np.ndarray[Any, Any] = sum(
        weight * state[f"{path}.lora_B"].double().numpy() @ state[f"{path}.lora_A"].double().numpy()
        for weight, state in zip(weights, states, strict=True)
    )
    return total / sum(weights)


def runner(lab: Laboratory) -> Runs:
    """Return what runs a small recipe once and remembers how it finished."""
    found: dict[str, Finished] = {}

    def run(name: str, **changes: Any) -> Finished:
        key = f"{name}{sorted(changes.items())}"
        if key not in found:
            found[key] = lab.run(lab.recipe(name, {**SMALL, **changes}))
        return found[key]

    return run


def sizes_of(finished: Finished) -> dict[str, int]:
    shared = finished.world.starting_state()
    down = sum(value.shape[1] for name, value in shared.items() if name.endswith("A"))
    up = sum(value.shape[0] for name, value in shared.items() if name.endswith("B"))
    return {"inputs": down, "outputs": up, "layers": len(shared) // 2}


def close(found: int, formula: int, tensors: int) -> None:
    """What the meter counted is the formula and headers: at most 160 bytes for a tensor, 400 for a frame."""
    assert formula < found < formula + 160 * tensors + 400
