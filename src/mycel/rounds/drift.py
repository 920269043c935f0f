"""How far parties pull apart within a round: what proximal terms and control variates are there to lessen.

For the changes ``d_k`` that the answers of one round carry, the agreement is the mean cosine over pairs, and the
length the mean of ``|d_k|``. Parties that pull the same way agree by 1; under unlike data FedAvg's agree less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING

from mycel.wire.algebra import cosine, norm
from mycel.wire.parcel import Tensors

if TYPE_CHECKING:
    from mycel.rounds.coordinator import Coordinator


@dataclass
class Drift:
    """Watches a run, and notes the agreement and the mean length of the answers' changes, a figure per round."""

    agreements: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)

    def __call__(self, coordinator: Coordinator) -> None:
        """Take note of a round that has just been combined."""
        if coordinator.progress.version > len(self.agreements):
            changes = [answer.tensors() for answer in coordinator.latest]
            self.agreements.append(agreement(changes))
            self.lengths.append(fmean(norm(change) for change in changes))


def agreement(changes: Sequence[Tensors]) -> float:
    """Mean cosine over all pairs of changes; 1 for a single one."""
    pairs = list(combinations(changes, 2))
    return fmean(cosine(left, right) for left, right in pairs) if pairs else 1.0
