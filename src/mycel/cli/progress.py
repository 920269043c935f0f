"""How a run shows life: bars on a terminal, lines where there is none."""

from __future__ import annotations

import threading
import time
from collections import Counter
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

LABELS = {
    "system": "federation",
    "local": "each party alone",
    "centralised": "centralised (upper bound)",
    "personal": "personal step",
}
EVERY = 5.0  # seconds between lines of one phase
LINES = 40  # most lines of one arm


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
        self._task(LABELS.get(name, name), total)

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
        self._bars.update(self._task(LABELS.get(arm, arm), entry["round"]), completed=entry["round"], note=note)


class LineProgress:
    """Prints a line now and then, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._said: dict[str, float] = {}
        self._every: dict[str, int] = {}

    def __enter__(self) -> LineProgress:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def _say(self, text: str) -> None:
        self._console.print(f"{time.monotonic() - self._started:6.1f} s  {text}", highlight=False)

    def phase(self, name: str, done: int, total: int) -> None:
        """Say how far a preparation is, at its beginning and end and every few seconds between."""
        now = time.monotonic()
        if done >= total or now - self._said.get(name, -EVERY) >= EVERY:
            self._said[name] = now if done < total else float("inf")
            self._say(f"{name}: {done} of {total}")

    def arm(self, name: str, total: int) -> None:
        """Say that an arm begins."""
        self._every[name] = max(1, total // LINES)
        self._say(f"{LABELS.get(name, name)}: begins, {total} rounds")

    def event(self, entry: dict[str, Any]) -> None:
        """Say that a round has been combined; of very many, only some."""
        if entry["event"] == "round" and entry["round"] % self._every.get(entry["arm"], 1) == 0:
            loss = entry.get("loss_before")
            tail = f", loss before it {loss:.3f}" if loss is not None else ""
            self._say(f"{LABELS.get(entry['arm'], entry['arm'])}: round {entry['round']} combined{tail}")


def show_progress(console: Console) -> LiveProgress | LineProgress:
    """Return bars on a terminal, lines elsewhere."""
    return LiveProgress(console) if console.is_terminal else LineProgress(console)
