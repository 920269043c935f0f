"""How a federation stands, as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show_standing(found: dict[str, Any], console: Console) -> None:
    """Print parties, leases, round, bytes and deadlines."""
    run, traffic = found["run"], found["gate"].get("traffic", {})
    lock = "TLS, known parties only" if found["secure"] else "plain text, anyone"
    console.print(f"[bold]{found['address']}[/bold]  ({lock})")
    if run:
        console.print(f"{run['system']}: round {run['round']} of {run['rounds']}  {run['folder']}")
    table = Table("party", "frames up", "frames down", "socket in", "socket out", "lease", "deadline")
    for name in dict.fromkeys([*found["parties"], *run.get("parties", {})]):
        counted, seen = run.get("parties", {}).get(name, {}), traffic.get(name, {})
        lease = run.get("leases", {}).get(name)
        deadline = lease["deadline_in_seconds"] if lease else None
        table.add_row(
            name,
            f"{counted.get('up', 0):,}",
            f"{counted.get('down', 0):,}",
            f"{sum(seen.get('received', {}).values()):,}",
            f"{sum(seen.get('sent', {}).values()):,}",
            f"{lease['for_seconds']:.1f} s" if lease else "-",
            f"in {deadline:.1f} s" if deadline is not None else "to be learnt" if lease else "-",
        )
    console.print(table)
    for title, counts in (
        ("dropped", run.get("dropped", {})),
        ("refused at the gate", found["gate"].get("refused", {})),
    ):
        for reason, count in counts.items():
            console.print(f"{title}: {count} x {reason}")
