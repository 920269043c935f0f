"""Where gradients come from: back-propagation, or two forward passes along a random direction.

A source fills ``.grad`` of the trained parameters from a closure that computes the loss; optimisers, regularisers
and systems do not know which one was used.

References
----------
Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes" (MeZO): the in-place two-point estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mycel.wire.randomness import direction

Closure = Callable[[], Tensor]
GradientSource = Callable[[Closure, Mapping[str, nn.Parameter], int], float]


def backpropagation(closure: Closure, parameters: Mapping[str, nn.Parameter], seed: int) -> float:
    """Exact gradient by reverse differentiation; ``seed`` is not used."""
    loss = closure()
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


@torch.no_grad()
def walk(parameters: Mapping[str, nn.Parameter], seed: int, scale: float) -> None:
    """Add ``scale * z(seed)`` in place, tensor by tensor, so that one tensor's direction is in memory at a time."""
    for index, parameter in enumerate(parameters.values()):
        parameter.add_(direction(seed + index, tuple(parameter.shape)), alpha=scale)


@torch.no_grad()
def two_point(
    closure: Closure, parameters: Mapping[str, nn.Parameter], seed: int, perturbation: float
) -> tuple[float, float]:
    """Return the slope along ``z(seed)`` and the mean of the two losses; nothing of the model's size is kept.

    The slope is ``[L(w + e z) - L(w - e z)] / 2e`` with ``e = perturbation``. The parameters go +e, -2e, +e in place,
    which brings them back to rounding only: whoever needs equal bits at two places rebuilds them from the start.
    """
    walk(parameters, seed, perturbation)
    above = float(closure())
    walk(parameters, seed, -2 * perturbation)
    below = float(closure())
    walk(parameters, seed, perturbation)
    return (above - below) / (2 * perturbation), (above + below) / 2


def zeroth_order(perturbation: float) -> GradientSource:
    """Return a source whose gradient estimate is ``slope * z(seed)``."""

    def source(closure: Closure, parameters: Mapping[str, nn.Parameter], seed: int) -> float:
        slope, loss = two_point(closure, parameters, seed, perturbation)
        for index, parameter in enumerate(parameters.values()):
            parameter.grad = direction(seed + index, tuple(parameter.shape)).mul_(slope)
        return loss

    return source
