"""What a dead rank costs, by way of recovery: ``python benchmarks/recovery.py [--json] [--work SECONDS]``.

Four real rank processes, one killed by SIGKILL in the middle of a step. Lost are the seconds from the death until the
torn step is done, less half a step. Named baseline: all are killed, started again and read the last checkpoint on disk
(processes are forked, so the seconds in which Python and PyTorch start come on top of it in a real restart).
"""

from __future__ import annotations

from typing import Any

from common import arguments, show
from mycel.pretrain.drill import Outcome, drilled
from mycel.pretrain.drill_rank import Drill

STEPS, STEP, EVERY = 9, 7, 4
SHAPE = (6, 64, 8, 32)
WAYS = {
    "restart from disk": ("restart", 4, 1),
    "gemini, peers' memory": ("gemini", 4, 1),
    "gemini, two pipelines": ("gemini", 4, 2),
    "bamboo, shadow": ("bamboo", 4, 1),
    "oobleck, templates": ("oobleck", 5, 1),
}


def row(name: str, work: float, repeats: int = 3) -> dict[str, Any]:
    """Kill rank 2 in the middle of its way back, several times; the median counts."""
    system, ranks, pipelines = WAYS[name]
    every = EVERY if system == "restart" else 0
    plain = Drill(system, ranks=ranks, steps=STEPS, shape=SHAPE, pipelines=pipelines, work=work, save_every=every)
    torn = Drill(**{**vars(plain), "deaths": ((STEP, 2, "backward", 2),)})
    undisturbed: Outcome = drilled(plain)
    found = sorted((drilled(torn) for _ in range(repeats)), key=lambda outcome: outcome.lost(undisturbed))
    middle = found[repeats // 2]
    return {
        "way": name,
        "ranks": ranks,
        "step s": undisturbed.step_seconds(),
        "lost s": middle.lost(undisturbed),
        "lost steps": middle.lost_steps,
        "of it, meeting again s": max(middle.seconds, default=0.0),
        "processes that stayed": middle.survivors,
        "largest difference": max(outcome.apart(undisturbed) for outcome in found),
        "MB copied a step": undisturbed.sent / STEPS / 1e6,
    }


def main() -> None:
    """Measure and print."""
    options = arguments(
        __doc__ or "",
        work={"type": float, "default": 0.01, "help": "seconds of a piece's forward on a rank's own device"},
    )
    rows = [row(name, options.work) for name in WAYS]
    baseline = rows[0]["lost s"]
    show(
        f"rank 2 killed at step {STEP} of {STEPS}; checkpoints on disk every {EVERY} steps",
        [{**each, "of the baseline": each["lost s"] / baseline} for each in rows],
        options.json,
    )


if __name__ == "__main__":
    main()
