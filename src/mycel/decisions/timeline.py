"""What an order of work on several places takes, event by event: the simulator that schedules are held against.

Every place works through its own list in order; a task starts when its place is free and all that it waits for has
arrived. Nothing is estimated but the tasks' own seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mycel.errors import RecipeError


@dataclass(frozen=True)
class Task:
    """One piece of work.

    Attributes
    ----------
    seconds : float
        While its place is busy with it.
    after : tuple of (str, float)
        Tasks whose results it needs, and the seconds that each result travels.
    """

    name: str
    seconds: float
    after: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Course:
    """When every task ended, and how busy each place was."""

    ends: dict[str, float]
    busy: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Until the last task ended."""
        return max(self.ends.values(), default=0.0)

    @property
    def idle(self) -> float:
        """Share of the places' time in which nothing was done."""
        return 1 - sum(self.busy) / (len(self.busy) * self.seconds) if self.seconds else 0.0


def simulate(places: Sequence[Sequence[Task]]) -> Course:
    """Return when everything ends.

    Raises
    ------
    RecipeError
        When tasks wait for each other, or for one that is nowhere.
    """
    ends: dict[str, float] = {}
    free, at = [0.0] * len(places), [0] * len(places)
    left = sum(len(tasks) for tasks in places)
    while left:
        moved = 0
        for index, tasks in enumerate(places):
            while at[index] < len(tasks) and all(name in ends for name, _ in tasks[at[index]].after):
                task = tasks[at[index]]
                start = max([free[index], *(ends[name] + travel for name, travel in task.after)])
                ends[task.name] = free[index] = start + task.seconds
                at[index] += 1
                moved += 1
        if not moved:
            stuck = [tasks[place].name for tasks, place in zip(places, at, strict=True) if place < len(tasks)]
            raise RecipeError(f"the tasks {', '.join(stuck[:4])} wait for each other or for none that is there")
        left -= moved
    return Course(ends, tuple(sum(task.seconds for task in tasks) for tasks in places))


def pipeline(
    forward: Sequence[float],
    backward: Sequence[float],
    travel: Sequence[float],
    pieces: int,
    schedule: str = "1f1b",
) -> list[list[Task]]:
    """Return the tasks of a pipeline's step.

    Parameters
    ----------
    forward, backward : sequence of float
        Seconds of each stage for one micro-batch.
    travel : sequence of float
        Seconds of a message from each stage to the next, and of its gradient back.
    schedule : {"gpipe", "1f1b"}
        All forwards first, or one back for one forward once the pipe is full.
    """
    stages = len(forward)
    places = []
    for stage in range(stages):
        order = orders(stage, stages, pieces, schedule)
        tasks = []
        for way, piece in order:
            after: list[tuple[str, float]] = []
            if way == "forward" and stage:
                after.append((f"forward {stage - 1} {piece}", travel[stage - 1]))
            if way == "backward" and stage < stages - 1:
                after.append((f"backward {stage + 1} {piece}", travel[stage]))
            if way == "backward" and stage == stages - 1:
                after.append((f"forward {stage} {piece}", 0.0))
            seconds = (forward if way == "forward" else backward)[stage]
            tasks.append(Task(f"{way} {stage} {piece}", seconds, tuple(after)))
        places.append(tasks)
    return places


def orders(stage: int, stages: int, pieces: int, schedule: str) -> list[tuple[str, int]]:
    """Return the order in which a stage passes micro-batches forward and back."""
    ahead = pieces if schedule == "gpipe" else min(pieces, stages - stage)
    found = [("forward", piece) for piece in range(ahead)]
    for piece in range(pieces):
        found.append(("backward", piece))
        if piece + ahead < pieces:
            found.append(("forward", piece + ahead))
    return found
