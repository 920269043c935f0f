"""``mycel audit``: what crossed the wire in a run, and whether anything did that was to stay home."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from mycel.run.frames import audit_run


def audit_command(folder: Path, as_json: bool) -> None:
    """Print the audit; the exit status is 1 when something was found."""
    found = audit_run(folder)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        console = Console()
        table = Table(title=f"{found['frames']:,} frames, {found['bytes']:,} bytes", title_justify="left")
        table.add_column("tensor")
        table.add_column("shape")
        for name, shape in found["tensors"].items():
            table.add_row(name, str(shape))
        console.print(table)
        console.print(f"kinds: {', '.join(f'{kind} {count}' for kind, count in found['kinds'].items())}")
        if "sought" in found:
            sought = found["sought"]
            verdict = "nothing of them crossed" if found["clean"] else f"{len(found['findings'])} findings"
            console.print(f"sought {sought['texts']:,} texts and {sought['token rows']:,} rows of tokens: {verdict}")
        else:
            listed = "" if found["complete"] else "; only the first frames are listed"
            console.print(
                f"looked {found['looked']} only{listed}: with guard.record_frames=true frames are kept, and looked "
                "through for the parties' texts, tokens and personal state"
            )
        for finding in found.get("findings", []):
            console.print(f"  {finding}", markup=False)
    if not found.get("clean", True):
        raise typer.Exit(1)
