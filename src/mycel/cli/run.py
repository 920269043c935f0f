"""``mycel run``: live progress on standard error, a table or JSON on standard output."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from mycel.recipe import load_recipe

LABELS = {
    "system": "federation",
    "local": "each party alone",
    "centralised": "centralised (upper bound)",
    "personal": "personal step",
}


class LiveProgress:
    """Shows phases and arms as bars, with loss and bytes beside the federation's."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._bytes: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __enter__(self) -> LiveProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def _task(self, name: str, total: int) -> TaskID:
        with self._lock:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=total, note="")
            return self._tasks[name]

    def phase(self, name: str, done: int, total: int) -> None:
        """Move a preparation's bar."""
        self._bars.update(self._task(name, total), completed=done, total=total)

    def arm(self, name: str, total: int) -> None:
        """Show an arm's bar."""
        self._task(LABELS[name], total)

    def event(self, entry: dict[str, Any]) -> None:
        """Move an arm's bar when a round has been combined."""
        arm = entry["arm"]
        if entry["event"] != "round":
            return
        self._bytes[arm] += entry["bytes_up"] + entry["bytes_down"]
        loss = entry.get("loss_before")
        note = f"loss {loss:.3f}" if loss is not None else ""
        if arm == "system":
            note += f"  {self._bytes[arm] / 1e6:.1f} MB sent"
        self._bars.update(self._task(LABELS[arm], entry["round"]), completed=entry["round"], note=note)


def run_command(name: str, overrides: list[str], out: Path | None, resume: bool, as_json: bool) -> None:
    """Run a recipe for a person or a script."""
    recipe = load_recipe(name, overrides)
    folder = out or Path("runs") / f"{Path(name.partition(':')[0]).stem}-{recipe.seed}"
    messages = Console(stderr=True)
    messages.print(f"[bold]{recipe.title or recipe.system}[/bold]  (system {recipe.system}, seed {recipe.seed})")
    with LiveProgress(messages) as watcher:
        watcher.phase("loading libraries", 0, 1)
        from mycel.run.execute import run_recipe

        watcher.phase("loading libraries", 1, 1)
        result = run_recipe(recipe, folder, resume, watcher)
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
        return
    from mycel.report import bytes_line, summary_table

    console = Console()
    console.print(summary_table(result))
    console.print(bytes_line(result))
    console.print(f"run folder  {folder}\nreport      {folder / 'report.html'}\nmodel       {folder / 'model'}")
    console.print("\nNext:")
    console.print(
        f"  mycel run {name} seed={recipe.seed + 1} wire.codec=int8   [dim]# another seed, a quarter of the bytes[/dim]"
    )
    console.print("  mycel claims fedavg flora_stacking        [dim]# what papers claim, measured here[/dim]")
    console.print(f"  mycel compare {folder} OTHER_RUN           [dim]# two runs side by side[/dim]")
