"""FFA-LoRA under differential privacy: why freezing A helps when every example's gradient is clipped and noised.

Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning" (catalogue number 94).

With both factors trained under DP-SGD the change carries ``noise_B A + B noise_A + noise_B noise_A``: a product of two
noises, which grows with their square, and twice the numbers to be noised under one clipping bound. With A frozen it is
``noise_B A``. Everything else is `mycel.finetune.ffa_lora`; privacy is the recipe's ``guard.private = "example"``.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from mycel.errors import RecipeError
from mycel.finetune.ffa_lora import FfaLora
from mycel.recipe.schema import Recipe
from mycel.rounds.laboratory import Measured

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory

EPSILONS = (8.0,)
PRIVATE: dict[str, Any] = {
    "guard.private": "example",
    "guard.clip_norm": 0.5,
    "guard.replayable": True,
    "rounds.evaluate_every": 4,
    "training.optimizer": "sgd",
    "training.clip_norm": 0.0,
}
RATES = {"private_ffa_lora": (4.0, 1.0), "fedavg": (4.0, 1.0)}


class PrivateFfaLora(FfaLora):
    """FFA-LoRA that refuses to train without example-level privacy."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        if recipe.guard.private != "example":
            raise RecipeError(
                f"guard.private is {recipe.guard.private!r}, and the system 'private_ffa_lora' protects single "
                "examples: set it to 'example' with guard.epsilon and guard.clip_norm, or take 'ffa_lora'"
            )


def claim(lab: Laboratory) -> Measured:
    """At each epsilon, on three seeds, the loss of FFA-LoRA and of LoRA, each at the best of its learning rates."""
    figures: dict[str, float] = {}
    sentences = []
    for epsilon in EPSILONS:
        best: dict[str, float] = {}
        for system, rates in RATES.items():
            found = []
            for rate in rates:
                changes = {**PRIVATE, "guard.epsilon": epsilon, "training.learning_rate": rate}
                runs = [lab.run(lab.recipe(system, {**changes, "seed": seed})) for seed in (1, 2, 3)]
                spent = max(run.guard["epsilon"] for run in runs)
                figures[f"{system}_{epsilon:g}_spent"] = spent
                found.append(fmean(run.loss() for run in runs))
            best[system] = min(found)
            figures[f"{system}_{epsilon:g}"] = best[system]
        sentences.append(
            f"epsilon {epsilon:g}: loss {best['private_ffa_lora']:.3f} with A frozen, {best['fedavg']:.3f} with both"
        )
    gains = [figures[f"fedavg_{epsilon:g}"] - figures[f"private_ffa_lora_{epsilon:g}"] for epsilon in EPSILONS]
    return Measured("; ".join(sentences) + " (means of seeds 1, 2, 3)", min(gains) > 0, figures)
