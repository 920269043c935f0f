"""A frame that comes in parts: one part stays in memory, several are put together in a file."""

from __future__ import annotations

import os
import tempfile
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mycel.wire.shelf import SUFFIX, Frame, Kept


@dataclass
class Gathered:
    """What has come of an answer: a single part in memory, several in a file."""

    length: int = 0
    first: bytes = b""
    path: Path | None = None
    end: weakref.finalize[..., Gathered] | None = None

    def add(self, part: bytes) -> None:
        """Put down the next part."""
        if not self.length:
            self.first = part
        else:
            if self.path is None:
                sweep(Path(tempfile.gettempdir()))
                descriptor, name = tempfile.mkstemp(prefix=f"mycel-{os.getpid()}-", suffix=SUFFIX)
                os.close(descriptor)
                self.path = Path(name)
                self.end = weakref.finalize(self, self.path.unlink, missing_ok=True)
                self.path.write_bytes(self.first)
                self.first = b""
            with self.path.open("ab") as file:
                file.write(part)
        self.length += len(part)

    def frame(self) -> Frame:
        """Return the whole answer, or where it waits."""
        if self.path is None:
            return self.first
        kept = Kept(self.path, self.length)
        if self.end is not None:
            self.end.detach()
        weakref.finalize(kept, self.path.unlink, missing_ok=True)
        return kept


def sweep(folder: Path) -> None:
    """Remove what processes left there that were killed: each file says whose it is."""
    for path in folder.glob(f"mycel-*-*{SUFFIX}"):
        owner = path.name.split("-")[1]
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists():
            with suppress(OSError):  # another's user's, or gone already
                path.unlink()
