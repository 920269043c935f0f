"""What crossed the wire, by content: names, shapes and sizes, and that nothing marked as staying home is among it.

A frame is looked through three ways: its bytes as they are, its tensors after the codecs, and its header's text. What
stays home is given as texts and as tensors; of each a fingerprint is sought: runs of a text's bytes, and runs of a
tensor's numbers, as floats of any width and as token ids of any width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mycel.errors import ParcelError
from mycel.wire.parcel import Limits, Parcel, check_name
from mycel.wire.shelf import Frame, pieces_of

TEXT_RUN = 24  # bytes in a row of one text that nobody sends by chance
TOKEN_RUN = 8  # token ids in a row
FLOAT_RUN = 8  # numbers in a row
WIDTHS = (np.int16, np.int32, np.int64, np.uint16)
OUTLINED = 1 << 22  # bytes of a header that are read for an outline
TOLD = 4096  # tensors that an outline names


@dataclass(frozen=True)
class Private:
    """What must stay home.

    Attributes
    ----------
    texts : sequence of str
        Examples, prompts, personal data.
    tokens : sequence of sequence of int
        The same as token ids.
    tensors : mapping
        A party's personal state, by name.
    """

    texts: Sequence[str] = ()
    tokens: Sequence[Sequence[int]] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Audit:
    """Looks frames through, one after another, and adds up what it saw."""

    private: Private
    frames: int = 0
    size: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[int]] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    unreadable: int = 0

    def __post_init__(self) -> None:
        self._marks = {mark: what for what, mark in _marks(self.private)}
        self._lengths = sorted({len(mark) for mark in self._marks})
        self._floats = {
            name: tensor.detach().reshape(-1)[:FLOAT_RUN].double()
            for name, tensor in self.private.tensors.items()
            if tensor.numel() >= FLOAT_RUN and bool(tensor.any())
        }

    def look(self, frame: bytes, where: str, limits: Limits | None = None) -> None:
        """Look one frame through; ``where`` names it in what is found."""
        self.frames += 1
        self.size += len(frame)
        self._seek(frame, where)
        try:
            parcel = Parcel.from_bytes(frame, limits)
            header = json.dumps(parcel.header, ensure_ascii=False).encode()
        except (ParcelError, RecursionError):  # what is nested as deep as can just be read may be too deep to write
            self.unreadable += 1
            return
        self.kinds[parcel.kind] = self.kinds.get(parcel.kind, 0) + 1
        self._seek(header, f"{where}, header")
        for name, tensor in parcel.tensors.items():
            self.names.setdefault(name, list(tensor.shape))
            self._seek_tensor(tensor, f"{where}, tensor {name!r}")

    def _seek(self, content: bytes, where: str) -> None:
        for length in self._lengths:
            marks = {mark for mark in self._marks if len(mark) == length}
            # Whatever is hidden begins at some byte: every mark is sought as it is.
            self.findings += [f"{self._marks[mark]} in {where}" for mark in marks if mark in content]

    def _seek_tensor(self, tensor: Tensor, where: str) -> None:
        flat = tensor.detach().reshape(-1)
        if not flat.is_floating_point():
            if flat.dtype == torch.uint8:
                self._seek(flat.numpy().tobytes(), where)
            else:
                self._seek(flat.to(torch.int32).numpy().tobytes(), where)
            return
        self._seek(flat.to(torch.float32).round().to(torch.int32).numpy().tobytes(), where)  # ids sent as numbers
        values = flat.double()
        for name, start in self._floats.items():
            for place in torch.nonzero(
                (values[: len(values) - FLOAT_RUN + 1] - start[0]).abs() <= _slack(start)
            ).flatten():
                run = values[int(place) : int(place) + FLOAT_RUN]
                if bool(((run - start).abs() <= _slack(start)).all()):
                    self.findings.append(f"the personal tensor {name!r} in {where}")
                    break

    def report(self) -> dict[str, Any]:
        """Everything seen, JSON."""
        return {
            "looked": "through the content",
            "frames": self.frames,
            "bytes": self.size,
            "kinds": dict(sorted(self.kinds.items())),
            "tensors": dict(sorted(self.names.items())),
            "sought": {"texts": len(self.private.texts), "token rows": len(self.private.tokens)},
            "unreadable": self.unreadable,
            "findings": self.findings[:100],
            "clean": not self.findings and not self.unreadable,
        }


def outline(frame: Frame) -> dict[str, list[int]]:
    """Return names and shapes of a frame's tensors, as they were before the codecs, from its header alone.

    The frame was checked by nobody: what no parcel of sensible size would say is told as ``(unreadable)``.
    """
    unreadable = {"(unreadable)": [len(frame)]}
    try:
        length = int.from_bytes(frame[:8], "little")
        if length > OUTLINED:
            return unreadable
        listing = json.loads(frame[8 : 8 + length])
        coded = json.loads(listing.pop("__metadata__")["mycel"]).get("shapes", {})
        plain = {name: part["shape"] for name, part in listing.items() if name.partition("|")[0] not in coded}
        found = dict(sorted((coded | plain).items()))
        for name, shape in found.items():
            check_name(name)
            if type(shape) is not list or len(shape) > 16 or not all(_is_size(size) for size in shape):
                return unreadable
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, ParcelError):
        return unreadable
    return found if len(found) <= TOLD else unreadable


def _is_size(size: object) -> bool:
    return type(size) is int and 0 <= size < 1 << 40


def digest_of(frame: Frame) -> str:
    """Name of a frame by its content."""
    found = hashlib.sha256()
    for piece in pieces_of(frame):
        found.update(piece)
    return found.hexdigest()


def _marks(private: Private) -> Iterator[tuple[str, bytes]]:
    for number, text in enumerate(private.texts):
        content = text.encode()
        for start in _starts(len(content), TEXT_RUN):
            yield f"text {number}", content[start : start + TEXT_RUN]
    for number, row in enumerate(private.tokens):
        for start in _starts(len(row), TOKEN_RUN):
            run = row[start : start + TOKEN_RUN]
            if len(set(run)) > 2:
                for width in WIDTHS:
                    yield f"tokens of example {number}", np.asarray(run).astype(width).tobytes()


def _starts(length: int, run: int) -> Iterable[int]:
    """Beginning, middle and end: whoever sends a text sends one of them."""
    return sorted({0, max((length - run) // 2, 0), length - run}) if length >= run else ()


def _slack(start: Tensor) -> float:
    """What an 8-bit codec may move a number by."""
    return float(start.abs().max()) / 100
