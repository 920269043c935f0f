"""The optimisers that a recipe can name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mycel.recipe.schema import Training


def make_optimizer(parameters: Mapping[str, nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """Return the local optimiser that a recipe names."""
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            parameters.values(),
            lr=training.learning_rate,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
        )
    return torch.optim.AdamW(parameters.values(), lr=training.learning_rate, weight_decay=training.weight_decay)
