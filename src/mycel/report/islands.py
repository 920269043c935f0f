"""Ways to pre-train the same islands side by side: a table, and loss against steps, bytes and virtual time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from mycel.report.curves import Cost, Curve, curve_plot
from mycel.report.source import Result, Way, as_result, finite
from mycel.report.style import RUNS, Plot
from mycel.report.wording import bytes_text, clean_name, loss_text, seconds_text

COSTS: tuple[Cost, ...] = ("steps", "bytes", "time")


def ways(result: Result) -> dict[str, Way]:
    """Return the arms that have a curve of their own; none in a run that compares no ways to pre-train."""
    return {name: arm for name, arm in result.arms.items() if arm.curve}


def ways_plots(result: Result) -> list[Plot]:
    """Draw every arm's loss against steps, bytes and virtual time; no plot where there is nothing to compare."""
    arms = ways(result)
    if not arms:
        return []
    seeds = f"Seed {result.seed}."
    return [
        curve_plot(
            [_curve(name, arm, cost, color) for (name, arm), color in zip(arms.items(), RUNS, strict=False)],
            cost,
            seeds,
        )
        for cost in COSTS
    ]


def _curve(name: str, arm: Way, cost: Cost, color: str) -> Curve:
    spent = {"steps": "steps", "bytes": "bytes", "time": "virtual_seconds"}[cost]
    known = [(getattr(point, spent), loss) for point in arm.curve if (loss := finite(point.loss)) is not None]
    return Curve(name, color, tuple(float(x) for x, _ in known), tuple(y for _, y in known))


def ways_table(result: Mapping[str, Any] | Result) -> Table | None:
    """Return a terminal table of the arms, or None where a run compares no ways to pre-train."""
    arms = ways(as_result(result))
    if not arms:
        return None
    table = Table(box=SIMPLE_HEAD, title="As many tokens, trained in other ways", title_justify="left")
    table.add_column("arm")
    for column in ("loss", "sent", "virtual time"):
        table.add_column(column, justify="right")
    for name, arm in arms.items():
        row = (loss_text(finite(arm.loss)), bytes_text(arm.bytes), seconds_text(arm.virtual_seconds))
        table.add_row(clean_name(name), *row)
    return table
