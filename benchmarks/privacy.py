"""What privacy costs in use: ``python benchmarks/privacy.py [--json] [--plot FILE.svg] [--seeds 1,2,3]``.

The quickstart's six parties and their examples, tuned with example-level privacy at three prices and at none, on three
seeds. What DP-SGD asks for differs from what the quickstart does: large batches and few steps, FFA-LoRA of rank 4 and
not LoRA of rank 16, plain SGD. All arms but the last are alike in that, so the curve shows what noise does, and its
last point what the quickstart's own way of training does with as little of it: a party trains on 240 examples, or 4 x 7
batches of 8, where the quickstart takes 640 (37.5 and 35 %). Learning rates were chosen on seed 9.
``--epsilons 8`` measures one price alone.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from common import arguments, show
from mycel.models.base import find_base
from mycel.recipe import load_recipe
from mycel.recipe.schema import Recipe
from mycel.report.style import SETTINGS, axes, light
from mycel.rounds.laboratory import Laboratory, laboratory

ROUNDS, BATCH = 6, 40
PRIVATE: dict[str, Any] = {
    "system": "private_ffa_lora",
    "trainable.rank": 4,
    "training.optimizer": "sgd",
    "training.clip_norm": 0.0,
    "training.batch_size": BATCH,
    "rounds.count": ROUNDS,
    "rounds.local_steps": 1,
    "guard.private": "example",
    "guard.clip_norm": 0.3,
    "guard.replayable": True,
}
RATES = {2.0: 5.0, 8.0: 15.0, 32.0: 20.0, float("inf"): 20.0}
BARELY = 1e-6  # noise that is none: bounded gradients alone


def recipe(epsilon: float | None, seed: int, base: str) -> Recipe:
    """Return the quickstart's parties with privacy at a price, without noise (infinity) or without a guard (None)."""
    start = load_recipe("quickstart", []).replace(
        {"compare": [], "seed": seed, "model.base": base, "rounds.evaluate_every": 100}
    )
    if epsilon is None:
        return start.replace(
            {"rounds.count": 4, "rounds.local_steps": ROUNDS * BATCH // (4 * start.training.batch_size)}
        )
    price = {"guard.epsilon": epsilon} if epsilon < float("inf") else {"guard.noise": BARELY}
    return start.replace({**PRIVATE, **price, "training.learning_rate": RATES[epsilon]})


def measure(lab: Laboratory, epsilon: float | None, seeds: list[int], base: str) -> dict[str, Any]:
    """Run one arm on every seed."""
    runs = [lab.run(recipe(epsilon, seed, base)) for seed in seeds]
    losses = [run.loss() for run in runs]
    fall = [run.loss(0) - loss for run, loss in zip(runs, losses, strict=True)]
    private = epsilon is not None and epsilon < float("inf")
    return {
        "arm": f"epsilon {epsilon:g}" if private else "bounded, no noise" if epsilon else "no guard, 4 x 7 steps",
        "epsilon": max(run.guard["epsilon"] for run in runs) if private else 0.0,
        **{f"loss, seed {seed}": loss for seed, loss in zip(seeds, losses, strict=True)},
        "mean loss": fmean(losses),
        "deviation": stdev(losses) if len(losses) > 1 else 0.0,
        "untuned": fmean(run.loss(0) for run in runs),
        "mean fall": fmean(fall),
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss against epsilon, a dot for each seed."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(7, 3.6), dpi=72, facecolor=light("paper"))
        panel = axes(figure, 66, 24, 46, 48)
        for place, row in enumerate(rows):
            dots = [value for key, value in row.items() if key.startswith("loss, seed")]
            panel.plot([place] * len(dots), dots, "o", color=light("download"), markersize=7)
        panel.plot(range(len(rows)), [row["mean loss"] for row in rows], color=light("federated"), linewidth=2)
        panel.axhline(rows[0]["untuned"], color=light("base"), linewidth=1, linestyle="--")
        panel.set_xticks(range(len(rows)), [row["arm"].replace(": ", ":\n").replace(", ", ",\n") for row in rows])
        panel.set_ylabel("loss, nats per token")
        panel.margins(x=0.1, y=0.15)
        figure.text(0.02, 0.93, "Utility against epsilon; dashed: untuned", fontsize=12, color=light("ink"))
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    """Measure every price and print a table, or JSON; draw on request."""
    options = arguments(
        __doc__ or "",
        plot={"type": Path, "metavar": "FILE.svg", "help": "also draw the curve"},
        epsilons={"default": "2,8,32,inf,none", "help": "prices, with commas between; inf: no noise; none: no guard"},
        seeds={"default": "1,2,3", "help": "seeds, with commas between"},
        base={"default": "tiny", "help": "base model"},
        workers={"type": int, "default": -1, "help": "worker processes; 0: none; -1: one per core"},
    )
    find_base(options.base)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    prices = [None if price == "none" else float(price) for price in options.epsilons.split(",")]
    with laboratory(workers=options.workers, base=options.base) as lab:
        rows = [measure(lab, price, seeds, options.base) for price in prices]
    show(f"The quickstart's parties, base {options.base}, delta 1e-5", rows, options.json)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
