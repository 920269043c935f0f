"""``mycel compare``: runs side by side."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from mycel.report import compare, compare_rows, write_comparison


def compare_command(folders: list[Path], out: Path, as_json: bool) -> None:
    """Print a table of runs and write the page."""
    if as_json:
        print(json.dumps(compare_rows(folders), indent=2))
        return
    console = Console()
    console.print(compare(folders))
    console.print(f"page  {write_comparison(folders, out)}")
