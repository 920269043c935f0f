"""The training step, owned once: batches in, a trained state out, with hooks where systems differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mycel.data.tokens import Batch
from mycel.models.optimizer import make_optimizer
from mycel.recipe.schema import Training
from mycel.rounds.gradients import GradientSource, backpropagation, zeroth_order

Correction = Callable[[Mapping[str, nn.Parameter]], None]


@dataclass(frozen=True)
class TrainingResult:
    """What local training came to: mean loss in nats per token, steps done, and target tokens seen."""

    loss: float
    steps: int
    tokens: int


def train(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    training: Training,
    seed: int,
    correct: Correction | None = None,
    after: Correction | None = None,
) -> TrainingResult:
    """Train ``parameters`` in place, one optimiser step per batch.

    Parameters
    ----------
    correct : callable, optional
        Called after each gradient and before clipping; may change ``.grad`` (proximal terms).
    after : callable, optional
        Called after each step of the optimiser; may change the parameters themselves (control variates).
    """
    source = gradient_source(training)
    optimizer = make_optimizer(parameters, training)
    losses: list[float] = []
    tokens = 0
    for index, batch in enumerate(batches):
        optimizer.zero_grad(set_to_none=True)
        losses.append(source(lambda batch=batch: batch_loss(model, batch), parameters, seed + index * 100_003))  # type: ignore[misc]
        if correct is not None:
            correct(parameters)
        if training.clip_norm:
            nn.utils.clip_grad_norm_(parameters.values(), training.clip_norm)
        optimizer.step()
        if after is not None:
            after(parameters)
        tokens += batch.tokens()
    return TrainingResult(sum(losses) / max(len(losses), 1), len(losses), tokens)


def batch_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the batch's target tokens, in nats."""
    loss: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    return loss


def gradient_source(training: Training) -> GradientSource:
    """Return the source that a recipe's ``training.gradient`` names."""
    return backpropagation if training.gradient == "backpropagation" else zeroth_order(training.perturbation)
