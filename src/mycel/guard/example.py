"""Training of which no single example can be told: per-example gradients clipped and noised by ``opacus``.

Abadi et al. 2016, "Deep Learning with Differential Privacy" (DP-SGD). Batches are drawn by independent coins of odds
``batch_size / examples``, as the accountant assumes, so their sizes vary and one may be empty: its noise is released
all the same. The loss of an example is the mean over its own tokens; a mean over the batch's tokens would let one
example change the gradients of others.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mycel.data.tokens import TokenTable
from mycel.errors import ExtraMissing
from mycel.guard.noise import noise_source

Correction = Callable[[Mapping[str, nn.Parameter]], None]


@dataclass(frozen=True)
class Privacy:
    """How examples are protected.

    Attributes
    ----------
    bound : float
        On the norm of an example's gradient.
    noise : float
        Standard deviation of the noise on a batch's sum of gradients, over ``bound``.
    seed : int or None
        Where draws and noise come from; None: the operating system.
    """

    bound: float
    noise: float
    seed: int | None = None


def train_private(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    table: TokenTable,
    batch_size: int,
    steps: int,
    pad_id: int,
    privacy: Privacy,
    correct: Correction | None = None,
    after: Correction | None = None,
) -> tuple[float, int]:
    """Train ``parameters`` in place; return the mean loss of the drawn examples and their target tokens.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Over exactly ``parameters``.
    correct, after : callable, optional
        Called after noise was added and after each step; they may use nothing of the examples.
    """
    try:
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer
    except ImportError as error:
        raise ExtraMissing("opacus", "privacy") from error
    chance = random.SystemRandom() if privacy.seed is None else random.Random(privacy.seed)
    odds = min(1.0, batch_size / len(table))
    losses, tokens = [], 0
    with ExitStack() as stack, warnings.catch_warnings():
        # The first adapted layer's input needs no gradient, which is right: the embedding is frozen.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        sampled = GradSampleModule(model, strict=False, loss_reduction="sum")
        stack.callback(sampled._close)
        private = DPOptimizer(
            optimizer,
            noise_multiplier=privacy.noise,
            max_grad_norm=privacy.bound,
            expected_batch_size=batch_size,
            generator=noise_source(privacy.seed),
        )
        for _ in range(steps):
            drawn = [index for index in range(len(table)) if chance.random() < odds]
            private.zero_grad(set_to_none=True)
            if drawn:
                batch = table.batch(drawn, pad_id, "causal")
                each = example_losses(model, batch.input_ids, batch.attention_mask, batch.labels)
                each.sum().backward()  # type: ignore[no-untyped-call]
                losses += each.tolist()
                tokens += batch.tokens()
            else:
                for parameter in parameters.values():
                    parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
            if private.pre_step():
                if correct is not None:
                    correct(parameters)
                optimizer.step()
            if after is not None:
                after(parameters)
    return sum(losses) / max(len(losses), 1), tokens


def example_losses(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Each example's mean cross-entropy over its own target tokens, (B,), in nats."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
    targets = labels[:, 1:]
    each = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
    return each.sum(1) / (targets != -100).sum(1).clamp_min(1)
