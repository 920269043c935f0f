"""A party's own process, as messages meet it: it keeps what stays at home, and repeats an answer when asked again.

On disk lie, for each job: what the party keeps between rounds, and its last answer under the hash of the brief that it
answers. Both are replaced together, so a brief that comes twice - the coordinator was killed, the line was cut, the
lease had ended - is answered with the same bytes, and a party that was killed itself goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from mycel.engines.line import Control
from mycel.errors import EngineError, MycelError

LARGEST = 1 << 28  # bytes of an answer that may be asked for at once
logger = logging.getLogger("mycel.party")


class PartyHost(Protocol):
    """What works at a party."""

    def describe(self, arm: str, job: str, node: int) -> Control:
        """Say what the coordinator may know of the party, or refuse the job."""

    def handle(self, arm: str, node: int, frame: bytes, home: bytes) -> tuple[bytes, bytes]:
        """Carry out one brief."""


class Resident:
    """Answers messages, one at a time.

    Parameters
    ----------
    name : str
        What the party calls itself.
    folder : Path
        Where what stays at home lies; its owner's alone.
    """

    def __init__(self, host: PartyHost, name: str, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._host, self._name, self._folder, self._clock = host, name, folder, clock
        self._open: set[str] = set()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def reply(self, control: Control, frame: bytes) -> tuple[Control, bytes]:
        """Answer one message; whatever fails becomes a sentence in this party's log and a refusal."""
        try:
            return self._reply(control, frame)
        except MycelError as error:
            logger.warning("refused: %s", error)
            return {"refusal": str(error)}, b""
        except Exception:  # the trace may hold what is private: it stays here
            logger.exception("the work failed")
            return {"refusal": "the work failed at the party; its own log says why"}, b""

    def _reply(self, control: Control, frame: bytes) -> tuple[Control, bytes]:
        if control["verb"] == "name":
            return {"name": self._name}, b""
        verb, job, node = str(control["verb"]), str(control["job"]), int(control["node"])
        arm = hashlib.sha256(f"{node}\0{job}".encode()).hexdigest()[:24]
        if arm not in self._open:
            about = self._host.describe(arm, job, node)
            self._open.add(arm)
            if verb == "describe":
                return about, b""
        if verb == "describe":
            return self._host.describe(arm, job, node), b""
        place = self._folder / arm
        place.mkdir(mode=0o700, exist_ok=True)
        if verb == "more":
            return self._part(place, control, 0.0)
        incoming = place / "brief"
        if verb == "part" or int(control["offset"]):
            _extend(incoming, int(control["offset"]), frame)
        if verb == "part":
            return {}, b""
        if int(control["offset"]):
            frame = incoming.read_bytes()
            incoming.unlink()
        began = self._clock()
        self._work(place, arm, node, frame)
        return self._part(place, {**control, "offset": 0}, self._clock() - began)

    def _work(self, place: Path, arm: str, node: int, frame: bytes) -> None:
        key = hashlib.sha256(frame).hexdigest()
        kept = _read(place)
        if kept.get("brief") == key:
            return
        home = (place / kept["home"]).read_bytes() if kept.get("home") else b""
        answer, changed = self._host.handle(arm, node, frame, home)
        fresh = {"brief": key, "answer": f"answer-{key[:16]}", "home": f"home-{key[:16]}" if changed else ""}
        _write(place / fresh["answer"], answer)
        if changed:
            _write(place / fresh["home"], changed)
        _write(place / "kept.json", json.dumps(fresh).encode())
        for name in ("answer", "home"):
            if kept.get(name) and kept[name] != fresh[name]:
                (place / kept[name]).unlink(missing_ok=True)

    def _part(self, place: Path, control: Control, seconds: float) -> tuple[Control, bytes]:
        """Return an answer of up to ``size`` bytes whole, and of a longer one a piece."""
        kept, (offset, size, piece) = _read(place), (int(control[key]) for key in ("offset", "size", "piece"))
        if not kept or not offset >= 0 or not 0 < piece <= size <= LARGEST:
            raise EngineError("a part was asked for of an answer that is not there")
        path = place / kept["answer"]
        total = path.stat().st_size
        with path.open("rb") as file:
            file.seek(offset)
            part = file.read(size if total <= size else piece)
        return {"total": total, "seconds": seconds}, part


def _read(place: Path) -> dict[str, str]:
    path = place / "kept.json"
    if not path.exists():
        return {}
    found: dict[str, str] = json.loads(path.read_text())
    return found


def _extend(path: Path, offset: int, part: bytes) -> None:
    """Add a part of a brief where the one before ended; the first begins anew."""
    with path.open("r+b" if offset and path.exists() else "wb") as file:
        if offset > path.stat().st_size:
            raise EngineError("a part of the brief is missing: ask again from its beginning")
        file.truncate(offset)
        file.seek(offset)
        file.write(part)


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        file.write(content)
    temporary.replace(path)
