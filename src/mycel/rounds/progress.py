"""What a coordinator remembers between two rounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mycel.evaluate.metrics import Scores
from mycel.rounds.system import State


class Record(Protocol):
    """Writes one event of the run's log."""

    def __call__(self, event: str, **fields: Any) -> None:
        """Append the event."""


@dataclass
class Progress:
    """Everything the coordinator must remember between two rounds; a checkpoint holds exactly this."""

    state: State = field(default_factory=State)
    version: int = 0
    generation: int = 0
    started: bool = False
    delivered: bool = False
    scores: dict[int, dict[int, list[float]]] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)
    busy: dict[int, float] = field(default_factory=dict)  # until when nodes that work ahead are at it

    def loss(self, version: int) -> float | None:
        """Mean held-out loss of the state of ``version`` over the parties that scored it; None without tokens."""
        found = sum(read_scores(self.scores.get(version, {})).values(), Scores())
        return found.loss if found.tokens else None

    def close_round(self, answers: int, up: int, down: int, now: float) -> dict[str, Any]:
        """Enter a round that was combined, with the bytes sent ``up`` and ``down`` so far; return what is logged."""
        before = self.rounds[-1] if self.rounds else {"total_up": 0, "total_down": 0}
        seen = {
            "round": self.version,
            "bytes_up": up - before["total_up"],
            "bytes_down": down - before["total_down"],
            "virtual_seconds": now,
            "answers": answers,
            "dropped": sum(self.drops.values()),
        }
        self.rounds.append({**seen, "loss": None, "total_up": up, "total_down": down})
        return {**seen, "loss_before": self.loss(self.version - 1)}


def read_scores(found: Mapping[int, Sequence[float]]) -> dict[int, Scores]:
    """Return each node's scores from the three numbers it reported."""
    return {node: Scores(float(loss), int(tokens), int(correct)) for node, (loss, tokens, correct) in found.items()}
