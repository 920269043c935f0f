"""``mycel claims``: paper says, measured here, verdict."""

from __future__ import annotations

import json
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from mycel.catalog import ENTRIES, Entry, entry


def claims_command(names: list[str], as_json: bool) -> None:
    """Measure the claims of the named systems, or of all."""
    wanted = [entry(name) for name in names] or list(ENTRIES)
    messages = Console(stderr=True)
    rows = []
    with messages.status("loading libraries") as status:
        from mycel.models.base import find_base
        from mycel.rounds.laboratory import laboratory
        from mycel.rounds.registry import load_claim

        find_base("tiny", lambda phase, done, total: status.update(f"{phase} {done}/{total}"))
        with laboratory() as lab:
            for index, about in enumerate(wanted):
                status.update(f"{about.name} ({index + 1} of {len(wanted)})")
                started = time.monotonic()
                found = load_claim(about)(lab)
                row = _row(about, found.measured, found.holds, found.figures, time.monotonic() - started)
                messages.print(f"{'holds' if found.holds else 'does not hold'}  {about.name}: {found.measured}")
                rows.append(row)
    if as_json:
        print(json.dumps(rows, indent=2, allow_nan=False))
    else:
        Console().print(_table(rows))


def _row(about: Entry, measured: str, holds: bool, figures: dict[str, float], seconds: float) -> dict[str, Any]:
    return {
        "name": about.name,
        "number": about.number,
        "claim": about.claim,
        "measured": measured,
        "holds": holds,
        "figures": figures,
        "seconds": round(seconds, 2),
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    held = sum(row["holds"] for row in rows)
    table = Table(title=f"{held} of {len(rows)} claims hold at this scale", title_justify="left", show_lines=True)
    for column in ("system", "paper says", "measured here", "verdict"):
        table.add_column(column)
    for row in rows:
        verdict = "[green]holds[/green]" if row["holds"] else "[red]does not hold here[/red]"
        table.add_row(row["name"], row["claim"], row["measured"], verdict)
    return table
