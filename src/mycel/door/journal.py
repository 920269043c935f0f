"""What a door writes down of every request, for its report: when and how much, never what was said."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from mycel.errors import RunError
from mycel.generation.request import Spans

JOURNAL, OLDER = "requests.jsonl", "requests.1.jsonl"
MOST_BYTES = 64 << 20
logger = logging.getLogger("mycel.door")


class Journal:
    """Appends a line for each finished choice.

    Parameters
    ----------
    folder : Path
        Made when missing; the journal goes on where one is there.
    most : int
        Bytes after which a new file is begun; the one before it is kept, older ones are not.
    """

    def __init__(self, folder: Path, most: int = MOST_BYTES) -> None:
        self._path, self._most = folder / JOURNAL, most
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise RunError(
                f"the journal in {folder} cannot be written ({error.strerror}): choose another --log"
            ) from error
        self._lock = threading.Lock()
        self._refused: Counter[int] = Counter()
        self._refused_at = 0.0
        # Spans are on the monotonic clock; the report shows the time of day.
        self._offset = time.time() - time.monotonic()

    def note(self, prompt: int, spans: Spans, whole: bool) -> None:
        """Write one request: moments in seconds, tokens of prompt and answer, whether the client stayed."""
        arrived = spans.arrived
        line: dict[str, object] = {
            "arrived": round(arrived + self._offset, 6),
            "first": round(spans.first - arrived, 6) if spans.first else None,
            "last": round(spans.last - arrived, 6) if spans.last else None,
            "prompt": prompt,
            "generated": spans.tokens,
            "whole": whole,
            "spans": {name: round(seconds, 6) for name, seconds in spans.shares().items()},
        }
        self._write(line)

    def event(self, kind: str, **facts: object) -> None:
        """Write that something happened: who holds what, what was lost, what failed."""
        self._write({"at": round(time.time(), 6), "event": kind, **facts})

    def refused(self, status: int) -> None:
        """Count an answer that was none; a line is written at most once a second."""
        with self._lock:
            self._refused[status] += 1
        if time.monotonic() >= self._refused_at + 1.0:
            self._write_refused()

    def _write_refused(self) -> None:
        with self._lock:
            counts, self._refused = self._refused, Counter()
            self._refused_at = time.monotonic()
        for status, count in counts.items():
            self.event("refused", status=status, count=count)

    def _write(self, line: dict[str, object]) -> None:
        with self._lock:
            if self._file.closed:
                return
            try:
                self._size += self._file.write(json.dumps(line) + "\n")
                if self._size > self._most:
                    self._file.close()
                    self._path.replace(self._path.with_name(OLDER))
                    self._open()
            except OSError as error:  # a full disk: requests are answered all the same
                logger.error("the journal %s ends here, for it cannot be written: %s", self._path, error.strerror)
                self._end()

    def _open(self) -> None:
        self._file: TextIO = self._path.open("a", encoding="utf-8", buffering=1)
        self._size = self._path.stat().st_size

    def close(self) -> None:
        """Write no more."""
        self._write_refused()
        with self._lock:
            self._end()

    def _end(self) -> None:
        with suppress(OSError):  # of what could not be written, closing tries again
            self._file.close()
