"""How much of a pipeline's time is waited away: a trace of what each rank computed, and what theory says of it.

P ranks, v stages a rank, M pieces; f, b, w the times of a stage's forward, of its gradient for what entered, and of its
gradient for its weights. A rank's span runs from its first piece of work to the end of its last; the bubble is the
share of the longest span that is not work:

    gpipe, 1f1b                   (P - 1) / (M + P - 1)                        Narayanan et al. 2021
    interleaved, breadth_first    (P - 1) / (v M + P - 1)                      the same; Lamy-Poirier 2023
    zero_bubble, v = 1            (P-1)(f+b-w) / (M (f+b+w) + (P-1)(f+b-w))    Qi et al. 2024, ZB-H1
    zbv, f = b = w, M >= 2 P      0                                            Qi et al. 2024, section 6
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage


class Action(NamedTuple):
    """A piece of work: "forward", "backward", "input" or "weight" of one stage for one piece, and when."""

    kind: str
    stage: int
    piece: int
    start: float
    end: float


@dataclass
class Trace:
    """What one rank computed, in order.

    Attributes
    ----------
    work : float
        Seconds that a forward takes besides its computing, and each half of a way back, as on a device of its own.
    """

    work: float = 0.0
    actions: list[Action] = field(default_factory=list)

    def note(self, kind: str, stage: int, piece: int, start: float) -> None:
        """Add a piece of work that began at ``start`` and is done."""
        if self.work:
            time.sleep(self.work * (2 if kind == "backward" else 1))
        self.actions.append(Action(kind, stage, piece, start, time.perf_counter()))


class TimedStage(PipelineStage):
    """A stage of ``torch.distributed.pipelining`` that keeps a trace of its work."""

    def __init__(
        self, module: nn.Module, place: int, stages: int, device: Any, group: dist.ProcessGroup, trace: Trace
    ) -> None:
        super().__init__(module, place, stages, device, group=group)
        self._trace = trace

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Compute forward."""
        start = time.perf_counter()
        found = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self._trace.note("forward", self.stage_index, fwd_chunk_id, start)
        return found

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Compute the way back, or its first half: the gradient of what entered."""
        start = time.perf_counter()
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        self._trace.note("backward" if full_backward else "input", self.stage_index, bwd_chunk_id, start)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Compute the gradient of the weights."""
        start = time.perf_counter()
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self._trace.note("weight", self.stage_index, bwd_chunk_id, start)


def bubble(traces: Sequence[Sequence[Action]]) -> float:
    """Share of the longest span that its rank did not work, of all ranks' traces of one step."""
    spans = [trace[-1].end - trace[0].start for trace in traces]
    busy = [sum(action.end - action.start for action in trace) for trace in traces]
    longest = max(spans)
    return 1.0 - sum(busy) / len(busy) / longest


def replayed(traces: Sequence[Sequence[Action]], costs: dict[str, float]) -> list[list[Action]]:
    """Return the traces as they would be if each kind of work took its cost and messages took nothing."""
    waiting = [list(trace) for trace in traces]
    made: list[list[Action]] = [[] for _ in traces]
    done: dict[tuple[str, int, int], float] = {}
    stages = 1 + max(action.stage for trace in traces for action in trace)
    while any(waiting):
        moved = False
        for rank, queue in enumerate(waiting):
            while queue and all(each in done for each in _before(queue[0], stages)):
                action = queue.pop(0)
                ready = [done[each] for each in _before(action, stages)]
                start = max([*ready, made[rank][-1].end if made[rank] else 0.0])
                end = start + costs[action.kind]
                made[rank].append(action._replace(start=start, end=end))
                done[_kind(action.kind), action.stage, action.piece] = end
                moved = True
        if not moved:
            raise ValueError("the traces wait for each other: they are not of one step")
    return made


def _kind(kind: str) -> str:
    return "back" if kind in {"backward", "input"} else kind


def _before(action: Action, stages: int) -> list[tuple[str, int, int]]:
    """Work of which an action needs the outcome."""
    kind, stage, piece = _kind(action.kind), action.stage, action.piece
    if kind == "forward":
        return [("forward", stage - 1, piece)] if stage else []
    if kind == "weight":
        return [("back", stage, piece)]
    return [("forward", stage, piece), *([("back", stage + 1, piece)] if stage < stages - 1 else [])]


def expected(schedule: str, ranks: int, pieces: int, chunks: int = 1) -> float:
    """Bubble by theory, where a forward and each half of a way back take as long as each other."""
    if schedule == "zbv":
        return 0.0
    if schedule == "zero_bubble":
        return (ranks - 1) / (3 * pieces * chunks + ranks - 1)
    return (ranks - 1) / (chunks * pieces + ranks - 1)
