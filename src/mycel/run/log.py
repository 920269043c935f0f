"""The event log: one JSON object a line, one writer, never rewritten."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mycel.run.folder import writing

Listener = Callable[[dict[str, Any]], None]


class EventLog:
    """Appends events and tells a listener of each.

    A line cut short by a crash or a full disk is removed when the log is opened again, so the log always parses.
    """

    def __init__(self, path: Path, listener: Listener | None = None) -> None:
        self.path = path
        self._listener = listener
        self._lock = threading.Lock()
        self._number = self._mend()
        with writing(path):
            self._file = path.open("ab", buffering=0)

    def _mend(self) -> int:
        if not self.path.exists():
            return 0
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(self.path, len(whole))
        return whole.count(b"\n")

    def record(self, event: str, arm: str, **fields: Any) -> None:
        """Append one event; ``n`` counts events from 0."""
        with self._lock:
            entry = {"n": self._number, "event": event, "arm": arm, **fields}
            self._append(json.dumps(entry, allow_nan=False).encode() + b"\n")
            self._number += 1
        if self._listener:
            self._listener(entry)

    def _append(self, line: bytes) -> None:
        with writing(self.path):
            written = self._file.write(line)
            if written != len(line):  # a disk that fills up takes the beginning of a line without complaint
                self._file.truncate(self._file.tell() - written)
                raise OSError(errno.ENOSPC, "short write")

    def close(self) -> None:
        """Bring the log to the disk."""
        with writing(self.path):
            os.fsync(self._file.fileno())
        self._file.close()
