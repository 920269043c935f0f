"""``mycel systems``: the catalogue, from metadata alone."""

from __future__ import annotations

import json

from mycel.catalog import ENTRIES


def systems_command(as_json: bool) -> None:
    """Print every system."""
    if as_json:
        print(json.dumps([entry.public() for entry in ENTRIES], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(ENTRIES)} systems", title_justify="left")
    for column, justify in (("system", "left"), ("no.", "right"), ("stage", "left"), ("way", "left")):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("claim that is measured")
    for entry in ENTRIES:
        table.add_row(entry.name, str(entry.number or "-"), entry.stage, entry.way, entry.claim)
    Console().print(table)
