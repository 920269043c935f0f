"""Speculative decoding: guess several tokens cheaply, verify them in one step, keep the target's distribution.

Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"; Chen et al. 2023. A guess
``x ~ q`` is kept with probability ``min(1, p(x) / q(x))``; at the first that is not, the token is drawn from
``max(p - q, 0)`` made to sum to one; if all are kept, one more token is drawn from the target. Then every token is
distributed as ``p``, whatever ``q`` is. Under greedy decoding ``p`` is all on one token, and the result is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mycel.generation.sampling import Sampler, pick


@dataclass(frozen=True)
class Proposal:
    """Guessed tokens, and the distributions they were drawn from, (tokens, vocabulary); None: each was certain."""

    tokens: tuple[int, ...]
    probabilities: Tensor | None = None

    def first(self, most: int) -> Proposal:
        """Return the first guesses alone."""
        rows = self.probabilities
        return Proposal(self.tokens[: max(0, most)], None if rows is None else rows[: max(0, most)])


class Drafter(Protocol):
    """Guesses how a sequence goes on."""

    def propose(self, sequence: int, tokens: Sequence[int], most: int, sampler: Sampler) -> Proposal:
        """Return up to ``most`` tokens that may follow ``tokens``."""

    def forget(self, sequence: int) -> None:
        """Drop what is kept for a sequence."""


def residual(target: Tensor, draft: Tensor) -> Tensor:
    """Return what is drawn from after a guess was refused."""
    left = (target.double() - draft.double()).clamp_min(0.0)
    total = left.sum()
    return left / total if float(total) > 0 else target.double()


def keep_probability(target: Tensor, draft: Tensor, token: int) -> float:
    """Return the probability with which a guess is kept."""
    guessed = float(draft[token])
    return min(1.0, float(target[token]) / guessed) if guessed > 0 else 0.0


def verify(proposal: Proposal, targets: Sequence[Tensor], sampler: Sampler) -> list[int]:
    """Return the tokens that are kept and one of the target's own.

    Parameters
    ----------
    proposal : Proposal
        The guesses.
    targets : sequence of Tensor
        The target's distribution at each guess and after the last: one more than guesses.
    sampler : Sampler
        The request's randomness.
    """
    kept: list[int] = []
    for index, token in enumerate(proposal.tokens):
        target = targets[index]
        draft = _row(proposal, index, target)
        if sampler.uniform() < keep_probability(target, draft, token):
            kept.append(token)
        else:
            return [*kept, pick(residual(target, draft), sampler.uniform())]
    return [*kept, pick(targets[len(kept)], sampler.uniform())]


def _row(proposal: Proposal, index: int, target: Tensor) -> Tensor:
    if proposal.probabilities is not None:
        return proposal.probabilities[index]
    certain = torch.zeros_like(target)
    certain[proposal.tokens[index]] = 1.0
    return certain
