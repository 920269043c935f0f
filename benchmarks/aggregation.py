"""What combining adapters of ranks 1 to 32 loses, and what it leaves: ``python benchmarks/aggregation.py [--json]``.

Six parties hold ranks 1, 2, 4, 8, 16 and 32. Every system runs the same rounds on the same data; the aggregation error
of a round is the distance between what the parties' trained models compute with and what the common model computes
with afterwards, relative to the former. Plain averaging pads the factors with zeros. LoRA-A2 takes the ranks as
budgets within rank 32; in FLASC all hold rank 32 and a party sends the share of entries that its rank is of it, to a
server that takes the mean change as it is. FFA-LoRA's error grows with the rounds although its changes add up exactly:
a party of low rank computes with fewer columns than the common model has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import arguments, show
from mycel.models.base import find_base
from mycel.report.style import SETTINGS, axes, light
from mycel.rounds.effective import aggregation_errors
from mycel.rounds.laboratory import Laboratory, laboratory

RANKS = [1, 2, 4, 8, 16, 32]
SHARES = [rank / max(RANKS) for rank in RANKS]
ARMS: dict[str, dict[str, Any]] = {
    "fedavg": {"trainable.rank": RANKS},
    "ffa_lora": {"trainable.rank": RANKS},
    "flexlora": {"trainable.rank": RANKS},
    "flora_stacking": {"trainable.rank": RANKS},
    "lora_a2": {"trainable.rank": RANKS},
    "flasc": {
        "trainable.rank": max(RANKS),
        "knobs": {"upload": SHARES, "server": "sgd", "server_rate": 1.0},
    },
}
LABELS = {
    "fedavg": "FedAvg, padded with zeros",
    "ffa_lora": "FFA-LoRA",
    "flexlora": "FlexLoRA",
    "flora_stacking": "FLoRA, stacked",
    "lora_a2": "LoRA-A2",
    "flasc": "FLASC, sparse at rank 32",
}
FLOOR = 1e-8  # of the error axis: single precision reaches no lower


def measure(lab: Laboratory, name: str, rounds: int) -> dict[str, Any]:
    """Run one arm; errors first and last, loss of the delivered models, bytes of local work."""
    recipe = lab.recipe(name, {**ARMS[name], "rounds.count": rounds, "rounds.evaluate_every": rounds})
    errors = aggregation_errors(lab.world(recipe), rounds)
    finished = lab.run(recipe)
    return {
        "system": name,
        "first error": errors[0],
        "last error": errors[-1],
        "loss": finished.loss(),
        "loss before": finished.loss(0),
        "upload bytes": finished.meter.total("up", purpose="work"),
        "download bytes": finished.meter.total("down", purpose="work"),
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw errors and losses side by side, one line of dots per system."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(10, 3.6), dpi=72, facecolor=light("paper"))
        errors = axes(figure, 190, 290, 46, 48)
        losses = axes(figure, 480, 24, 46, 48)
        places = range(len(rows), 0, -1)
        for place, row in zip(places, rows, strict=True):
            first, last = (max(row[key], FLOOR) for key in ("first error", "last error"))
            errors.plot([first, last], [place, place], color=light("line"), linewidth=2, zorder=1)
            errors.plot([first], [place], "o", color=light("paper"), markeredgecolor=light("federated"), markersize=8)
            errors.plot([last], [place], "o", color=light("federated"), markersize=8)
            losses.plot([row["loss"]], [place], "o", color=light("local_only"), markersize=8)
            losses.annotate(
                f"{row['loss']:.3f}", (row["loss"], place), (8, -4), textcoords="offset points", fontsize=10
            )
        errors.set_xscale("log")
        errors.set_xlim(FLOOR / 2, 10)
        errors.set_xticks([1e-8, 1e-6, 1e-4, 1e-2, 1], ["1e-8", "1e-6", "1e-4", "1e-2", "1"])
        errors.minorticks_off()
        errors.set_yticks(list(places), [LABELS[row["system"]] for row in rows])
        errors.set_xlabel("aggregation error; hollow: first round, full: last")
        losses.axvline(rows[0]["loss before"], color=light("base"), linewidth=1, linestyle="--")
        losses.set_yticks([])
        losses.set_xlabel("loss, nats per token; dashed: untuned")
        losses.margins(x=0.2)
        for panel in (errors, losses):
            panel.set_ylim(0.4, len(rows) + 0.6)
        figure.text(0.02, 0.93, "Six parties of ranks 1, 2, 4, 8, 16 and 32", fontsize=12, color=light("ink"))
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    """Measure every arm and print a table, or JSON; draw on request."""
    options = arguments(
        __doc__ or "",
        plot={"type": Path, "metavar": "FILE.svg", "help": "also draw errors and losses"},
        base={"default": "micro", "help": "base model"},
        rounds={"type": int, "default": 4, "help": "rounds per arm"},
        workers={"type": int, "default": -1, "help": "worker processes; 0: none; -1: one per core"},
    )
    find_base(options.base)
    with laboratory(workers=options.workers, base=options.base) as lab:
        rows = [measure(lab, name, options.rounds) for name in ARMS]
    shown = rows
    if not options.json:
        shown = [{key: f"{value:.1e}" if "error" in key else value for key, value in row.items()} for row in rows]
    show(f"Ranks {RANKS} mixed, base {options.base}, {options.rounds} rounds", shown, options.json)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
