"""Small pre-training over three islands, for laws that any base of any size keeps."""

from __future__ import annotations

from typing import Any

from mycel.pretrain.proving import pretraining
from mycel.recipe.schema import Recipe
from mycel.rounds.laboratory import Laboratory

SMALL: dict[str, Any] = {
    "data.examples": 30,
    "data.held_out": 2,
    "data.max_length": 16,
    "data.count": 3,
    "training.batch_size": 2,
    "rounds.count": 4,
    "rounds.local_steps": 2,
    "rounds.evaluate_every": 100,
    "fleet.devices": "islands",
}


def recipe(lab: Laboratory, system: str, changes: dict[str, Any] | None = None) -> Recipe:
    """Return a small recipe of a system, changed."""
    return lab.recipe(system, pretraining({**SMALL, **(changes or {})}))
