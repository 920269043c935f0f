"""Frames of a run kept for the audit, and the audit itself: ``work/frames`` holds each distinct frame once."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mycel.data.tokens import TokenStore
from mycel.errors import RunError
from mycel.guard.audit import Audit, Private, digest_of
from mycel.models.base import find_base, open_base
from mycel.run.checkpoint import homes_of, read_checkpoint
from mycel.run.folder import RunFolder, read_recipe, write_bytes, writing
from mycel.wire.parcel import Parcel, Tensors

LISTING = "frames.jsonl"


@dataclass
class FrameRecorder:
    """Writes every frame that crosses, under the name of its content, and one line for each crossing."""

    folder: Path
    _known: set[str] = field(default_factory=set)
    _writing: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, direction: str, node: int, kind: str, frame: bytes) -> None:
        """Keep one frame."""
        name = digest_of(frame)
        with self._writing, writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if name not in self._known and not (self.folder / name).exists():
                write_bytes(self.folder / name, frame)
            self._known.add(name)
            line = json.dumps({"direction": direction, "node": node, "kind": kind, "sha256": name})
            with (self.folder / LISTING).open("a", encoding="utf-8") as listing:
                listing.write(line + "\n")


def frames_of(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield each crossing's description and frame, checked against the name it was kept under."""
    try:
        lines = [json.loads(line) for line in (folder / LISTING).read_text(encoding="utf-8").splitlines()]
        for number, line in enumerate(lines):
            frame = (folder / str(line["sha256"])).read_bytes()
            if digest_of(frame) != line["sha256"]:
                raise RunError(
                    f"frame {number} in {str(folder)!r} was changed since it crossed: the audit proves nothing"
                )
            yield f"frame {number} ({line['kind']}, {line['direction']}, node {line['node']})", frame
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{str(folder)!r} holds no recorded frames ({error}): run the recipe with guard.record_frames=true"
        ) from error


def audit_run(path: Path) -> dict[str, Any]:
    """Look through every recorded frame of a run for what its parties were to keep at home.

    Sought are every party's examples, as text and as tokens, and what simulated parties kept as personal state.
    """
    folder = RunFolder(path)
    recipe = read_recipe(path)
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
