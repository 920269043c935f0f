"""What a door writes down of every request, for its report: when and how much, never what was said."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import TextIO

from mycel.errors import RunError
from mycel.generation.streaming import Spans

JOURNAL = "requests.jsonl"


class Journal:
    """Appends a line for each finished choice.

    Parameters
    ----------
    folder : Path
        Made when missing; the journal goes on where one is there.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = (folder / JOURNAL).open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise RunError(
                f"the journal in {folder} cannot be written ({error.strerror}): choose another --log"
            ) from error
        self._lock = threading.Lock()
        # Spans are on the monotonic clock; the report shows the time of day.
        self._offset = time.time() - time.monotonic()

    def note(self, arrived: float, prompt: int, spans: Spans, whole: bool) -> None:
        """Write one request: moments in seconds, tokens of prompt and answer, whether the client stayed."""
        line = {
            "arrived": round(arrived + self._offset, 6),
            "first": round(spans.first - arrived, 6) if spans.first else None,
            "last": round(spans.last - arrived, 6) if spans.last else None,
            "prompt": prompt,
            "generated": spans.tokens,
            "whole": whole,
        }
        with self._lock:
            self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Write no more."""
        self._file.close()
