"""What crossed in a run, for the audit: always a list of names, shapes and sizes, and on request the frames themselves.

``work/frames/frames.jsonl`` has a line for each crossing, up to a bound. Frames are kept only where
``guard.record_frames`` asks for it, each distinct one once: they hold what parties sent, so whoever can read the folder
can attack it.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mycel.data.tokens import TokenStore
from mycel.errors import RunError
from mycel.guard.audit import Audit, Private, digest_of, outline
from mycel.models.base import find_base, open_base
from mycel.run.checkpoint import homes_of, read_checkpoint
from mycel.run.folder import RunFolder, read_recipe, write_bytes, write_file, writing
from mycel.wire.parcel import Parcel, Tensors
from mycel.wire.shelf import Frame, write_frame

LISTING = "frames.jsonl"
MOST = 20_000  # crossings that are listed; beyond them a run says so
TOLD = 1 << 24  # characters of unlike outlines; those beyond, which only somebody hostile sends, are told as one
UNTOLD: dict[str, list[int]] = {"(too many unlike frames)": []}


@dataclass
class FrameRecorder:
    """Lists every frame that crosses.

    Parameters
    ----------
    folder : Path
        Where the list lies.
    keep : bool
        Whether frames are kept, under the names of their content; then all are listed.
    """

    folder: Path
    keep: bool
    _known: set[str] = field(default_factory=set)
    _outlines: dict[str, int] = field(default_factory=dict)
    _told: int = 0
    _listed: int = -1
    _writing: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, direction: str, node: int, kind: str, frame: Frame) -> None:
        """Take note of one frame."""
        with self._writing, writing(self.folder):
            if self._listed < 0:
                self._begin()
            if self._listed >= MOST and not self.keep:
                return
            line: dict[str, Any] = {"direction": direction, "node": node, "kind": kind, "bytes": len(frame)}
            tensors = outline(frame)
            mark = json.dumps(tensors)
            if mark not in self._outlines and self._told + len(mark) > TOLD:
                tensors, mark = UNTOLD, json.dumps(UNTOLD)
            if mark not in self._outlines:  # told once, and by its number from then on
                line["tensors"] = tensors
                self._told += len(mark)
            line["outline"] = self._outlines.setdefault(mark, len(self._outlines))
            if self.keep:
                line["sha256"] = self._store(frame)
            self._listed += 1
            with (self.folder / LISTING).open("a", encoding="utf-8") as listing:
                listing.write(json.dumps(line) + "\n")

    def _begin(self) -> None:
        """Go on from what a run that was stopped has listed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / LISTING
        if path.exists():  # a run that was killed may have left half a line
            content = path.read_bytes()
            write_bytes(path, content[: content.rfind(b"\n") + 1])
        lines = list_of(self.folder) if path.exists() else []
        for line in lines:
            if "tensors" in line:
                self._outlines[json.dumps(line["tensors"])] = int(line["outline"])
        self._told = sum(map(len, self._outlines))
        self._listed = len(lines)

    def _store(self, frame: Frame) -> str:
        name = digest_of(frame)
        if name not in self._known and not (self.folder / name).exists():
            write_file(self.folder / name, lambda path: write_frame(frame, path))
        self._known.add(name)
        return name


def list_of(folder: Path) -> list[dict[str, Any]]:
    """Return every crossing's line."""
    try:
        lines = [json.loads(line) for line in (folder / LISTING).read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(line, dict) and type(line["bytes"]) is int for line in lines):
            raise ValueError("a line says nothing of a frame")
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            f"{str(folder)!r} lists no frames ({error}): audit the folder of a run of this version, or run it again"
        ) from error
    return lines


def frames_of(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield each crossing's description and frame, checked against the name it was kept under."""
    for number, line in enumerate(list_of(folder)):
        try:
            frame = (folder / str(line["sha256"])).read_bytes()
        except (OSError, KeyError) as error:
            raise RunError(
                f"frame {number} in {str(folder)!r} was not kept ({error}): run the recipe with "
                "guard.record_frames=true to have frames looked through by content"
            ) from error
        if digest_of(frame) != line["sha256"]:
            raise RunError(f"frame {number} in {str(folder)!r} was changed since it crossed: the audit proves nothing")
        yield f"frame {number} ({line['kind']}, {line['direction']}, node {line['node']})", frame


def audit_run(path: Path) -> dict[str, Any]:
    """Say what crossed; where frames were kept, look through them for what the parties were to keep at home.

    Sought are every party's examples, as text and as tokens, and what simulated parties kept as personal state.
    """
    folder = RunFolder(path)
    recipe = read_recipe(path)
    if not recipe.guard.record_frames or not folder.tokens.exists():  # a federation's coordinator has no text to seek
        return _listed(list_of(folder.work / "frames"))
    store = TokenStore.open(folder.tokens)
    tokenizer = open_base(find_base(recipe.model.base)).tokenizer
    rows: list[list[int]] = []
    for party in range(len(store)):
        for table in (store.train(party), store.held_out(party)):
            rows += [table.ids[table.offsets[place] : table.offsets[place + 1]].tolist() for place in range(len(table))]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    audit = Audit(Private(texts, rows, _personal(folder)))
    for where, frame in frames_of(folder.work / "frames"):
        audit.look(frame, where)
    return audit.report()


def audit_for_result(path: Path) -> dict[str, Any]:
    """Return the audit as a result keeps it: a list's counts are left out, for a run that was resumed asked again."""
    found = audit_run(path)
    if "clean" in found:
        return found
    return {"looked": found["looked"], "kinds": sorted(found["kinds"]), "tensors": found["tensors"]}


def _listed(lines: list[dict[str, Any]]) -> dict[str, Any]:
    names: dict[str, list[int]] = {}
    for line in lines:
        for name, shape in line.get("tensors", {}).items():
            names.setdefault(name, shape)
    return {
        "looked": "at names, shapes and sizes",
        "frames": len(lines),
        "bytes": sum(line["bytes"] for line in lines),
        "kinds": dict(sorted(Counter(str(line["kind"]) for line in lines).items())),
        "tensors": dict(sorted(names.items())),
        "complete": len(lines) < MOST,
    }


def _personal(folder: RunFolder) -> Tensors:
    kept: Tensors = {}
    for node, frame in homes_of(read_checkpoint(folder.checkpoint("system"))).items():
        found = Parcel.from_bytes(frame).tensors if frame else {}
        kept |= {
            f"{name} of node {node}": value
            for name, value in found.items()
            if value.is_floating_point() and name.startswith("personal/")
        }
    return kept
