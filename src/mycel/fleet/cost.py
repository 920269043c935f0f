"""How many floating-point operations a piece of work takes.

Formulas (per token; P parameters met on the way forward, T of them trained):
forward 2P; back-propagation through frozen weights 2P more; gradients of trained weights 2T more.
Source: Kaplan et al. 2020, section 2.1, with the weight-gradient term kept apart for parameter-efficient training.
"""

from __future__ import annotations


def forward_flops(parameters: int, tokens: float) -> float:
    """Operations to evaluate ``tokens`` tokens."""
    return 2.0 * parameters * tokens


def training_flops(parameters: int, trained: int, tokens: float, gradient: str) -> float:
    """Operations to train on ``tokens`` tokens with a gradient source's name."""
    if gradient == "zeroth-order":
        return 2 * forward_flops(parameters, tokens)
    return (4.0 * parameters + 2.0 * trained) * tokens
