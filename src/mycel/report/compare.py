"""Several runs side by side: one table, and one page with their curves laid over each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mycel.errors import RunError
from mycel.report.curves import COSTS, curve, curve_plot
from mycel.report.page import flatten, render, write_page
from mycel.report.source import Result, finite, read_result
from mycel.report.style import RUNS
from mycel.report.tables import plain_table
from mycel.report.wording import bytes_text, clean_name, loss_text, seconds_text, verdict

NOTE = (
    "loss in nats per token, lower is better; * lowest. alone, pooled: local-only and centralised training; "
    "gap: how far the run went from the one to the other"
)
"""What the terminal says below its table."""


def compare_rows(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Read what several runs reached and what it cost them.

    Parameters
    ----------
    folders
        Finished runs.

    Returns
    -------
    list[dict]
        A row per run, in the order given: ``run`` (a name unique among them), ``title``, ``system``,
        ``seed``, ``rounds``, ``parties``, ``loss``, ``perplexity``, ``base``, ``local_only``, ``federated``,
        ``centralised`` (nats per token), ``gap_closed`` (share), ``bytes_up``, ``bytes_down``,
        ``virtual_seconds``, ``seconds``, ``dropped``, ``recipe_sha256`` and ``state_sha256``.

    Raises
    ------
    RunError
        No folder was given, or one holds no sound result.
    """
    return [_row(name, result) for name, result in _read(folders)]


def compare(folders: Sequence[Path]) -> Table:
    """Make the terminal's table of several runs; the lowest final loss is bold and starred.

    Raises
    ------
    RunError
        No folder was given, or one holds no sound result.
    """
    rows = compare_rows(folders)
    best = _best(rows)
    table = plain_table("Runs compared", NOTE)
    for heading in ("run", "system"):
        table.add_column(heading, overflow="fold")
    for heading in ("seed", "loss", "alone", "pooled", "gap", "up", "down", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        gap = "–" if row["gap_closed"] is None else f"{row['gap_closed']:.0%}"
        marked = index in best
        table.add_row(
            Text(clean_name(row["run"], 28)),
            Text(clean_name(row["system"], 20)),
            str(row["seed"]),
            Text(loss_text(row["loss"]) + ("*" if marked else " "), style="bold green" if marked else ""),
            loss_text(row["local_only"]),
            loss_text(row["centralised"]),
            gap,
            bytes_text(row["bytes_up"]),
            bytes_text(row["bytes_down"]),
            seconds_text(row["virtual_seconds"]),
        )
    return table


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write one page that compares several runs.

    Parameters
    ----------
    folders
        Finished runs.
    out
        The page to write, or an existing folder, which then gets ``comparison.html``.

    Raises
    ------
    RunError
        No folder was given, one holds no sound result, or the page cannot be written.
    """
    runs = _read(folders)
    rows = [_row(name, result) for name, result in runs]
    colors = [RUNS[index % len(RUNS)] for index in range(len(runs))]
    seeds = sorted({result.seed for _, result in runs})
    note = f"Seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}."
    plots = [
        curve_plot(
            [curve(run, cost, name, color) for (name, run), color in zip(runs, colors, strict=True)],
            cost,
            note,
        )
        for cost in COSTS
    ]
    text = render(
        "compare.html",
        title="Runs compared",
        rows=rows,
        best=_best(rows),
        colors=[color.replace("_", "-") for color in colors],
        sentence=_sentence(rows),
        plots=plots,
        differences=_differences([result for _, result in runs]),
    )
    out = Path(out)
    return write_page(out / "comparison.html" if out.is_dir() else out, text)


def _read(folders: Sequence[Path]) -> list[tuple[str, Result]]:
    if not folders:
        raise RunError("folders is empty: name at least one run folder to compare")
    paths = [Path(folder).resolve() for folder in folders]
    shared = Counter(path.name for path in paths)
    names = [path.name if shared[path.name] == 1 else f"{path.parent.name}/{path.name}" for path in paths]
    again = Counter(names)
    if doubled := next((name for name, number in again.items() if number > 1), None):
        names = [f"{name} ({index + 1})" if name == doubled else name for index, name in enumerate(names)]
    return [(name, read_result(path)) for name, path in zip(names, paths, strict=True)]


def _row(name: str, result: Result) -> dict[str, Any]:
    mixture, dropped = result.final.mixture, result.dropped
    return {
        "run": name,
        "title": result.title,
        "system": result.system,
        "seed": result.seed,
        "rounds": len(result.rounds),
        "parties": len(result.parties),
        "loss": result.final.loss,
        "perplexity": result.final.perplexity,
        "base": mixture.base,
        "local_only": mixture.local_only_mean,
        "federated": mixture.federated,
        "centralised": mixture.centralised,
        "gap_closed": verdict(result).gap_closed,
        "bytes_up": result.bytes.up,
        "bytes_down": result.bytes.down,
        "virtual_seconds": result.virtual_seconds,
        "seconds": result.seconds,
        "dropped": dropped.late + dropped.invalid + dropped.lost,
        "recipe_sha256": str(result.recipe.get("sha256", "")),
        "state_sha256": result.state_sha256,
    }


def _best(rows: Sequence[dict[str, Any]]) -> set[int]:
    losses = {index: row["loss"] for index, row in enumerate(rows) if finite(row["loss"]) is not None}
    return {index for index, loss in losses.items() if loss == min(losses.values())} if len(losses) > 1 else set()


def _sentence(rows: Sequence[dict[str, Any]]) -> str:
    best = _best(rows)
    if len(best) != 1:
        return "No single run reached the lowest loss."
    row = rows[min(best)]
    rest = [other for index, other in enumerate(rows) if index not in best and finite(other["loss"]) is not None]
    second = min(rest, key=lambda other: float(other["loss"]))
    sent = row["bytes_up"] + row["bytes_down"]
    return (
        f"{clean_name(row['run'])} reached the lowest loss, {loss_text(row['loss'])}, "
        f"with {bytes_text(sent)} sent; {clean_name(second['run'])} came next with "
        f"{loss_text(second['loss'])} and {bytes_text(second['bytes_up'] + second['bytes_down'])}."
    )


def _differences(results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    """List the settings in which recipes differ, with each run's value."""
    recipes = [{key: value for key, value in flatten(result.recipe).items() if key != "sha256"} for result in results]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    values = {key: [str(recipe.get(key, "–")) for recipe in recipes] for key in keys}
    return [(key, found) for key, found in values.items() if len(set(found)) > 1]
