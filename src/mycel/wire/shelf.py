"""Where frames wait: in memory while there is room, beyond it in files that vanish when nobody needs them any more."""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from mycel.errors import EngineError

IN_MEMORY = 1 << 25  # bytes
PIECE = 1 << 22
SUFFIX = ".frame"


class Kept:
    """A frame that waits; ``bytes(kept)`` reads it, ``kept[start:stop]`` a part of it, ``len(kept)`` is its length.

    Its room is given back with it.
    """

    def __init__(self, place: bytes | Path, length: int) -> None:
        self._place = place
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __bytes__(self) -> bytes:
        return self._place if isinstance(self._place, bytes) else self._place.read_bytes()

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._length)
        if isinstance(self._place, bytes):
            return self._place[start:stop]
        with self._place.open("rb") as file:
            file.seek(start)
            return file.read(max(stop - start, 0))

    @property
    def path(self) -> Path | None:
        """The file in which it waits, if it does."""
        return self._place if isinstance(self._place, Path) else None


Frame = bytes | Kept


def pieces_of(frame: Frame) -> Iterator[bytes]:
    """Yield a frame's bytes in pieces, so that one which waits in a file is never whole in memory."""
    for start in range(0, len(frame), PIECE):
        yield frame[start : start + PIECE]


@dataclass
class Shelf:
    """Keeps frames.

    Parameters
    ----------
    budget : int
        Bytes that wait in memory; frames beyond it wait in files.
    folder : Path or None
        Where the files lie; by default where the operating system keeps temporary ones.
    """

    budget: int = IN_MEMORY
    folder: Path | None = None
    held: int = 0
    _changing: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def keep(self, frame: Frame) -> Kept:
        """Put a frame away; one that waits already stays where it is."""
        if isinstance(frame, Kept):
            return frame
        with self._changing:
            room = self.held + len(frame) <= self.budget
            self.held += len(frame) if room else 0
        if room:
            kept = Kept(frame, len(frame))
            weakref.finalize(kept, self._give_back, len(frame)).atexit = False
        else:
            kept = self.file(lambda path: write_frame(frame, path), len(frame))
        return kept

    def file(self, write: Callable[[Path], object], length: int) -> Kept:
        """Put a frame of about ``length`` bytes into a file that ``write`` fills."""
        where = self.folder or Path(tempfile.gettempdir())
        path = None
        try:
            descriptor, name = tempfile.mkstemp(prefix="mycel-", suffix=SUFFIX, dir=where)
            os.close(descriptor)
            path = Path(name)
            write(path)
        except (OSError, SafetensorError) as error:
            if path is not None:
                path.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or error
            raise EngineError(
                f"a frame of {length:,} bytes cannot be set aside in {where}: {reason}; "
                "make room, and `--resume` goes on from the last round"
            ) from error
        kept = Kept(path, path.stat().st_size)
        weakref.finalize(kept, path.unlink, missing_ok=True)
        return kept

    def _give_back(self, length: int) -> None:
        with self._changing:
            self.held -= length


def write_frame(frame: Frame, path: Path) -> None:
    """Copy a frame into a file."""
    with path.open("wb") as file:
        for piece in pieces_of(frame):
            file.write(piece)
