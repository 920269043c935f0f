"""What crosses a cut: parcels of hidden states and gradients, through a codec whose error is measured."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mycel.errors import ParcelError
from mycel.wire.codecs import RAW, parse_codec
from mycel.wire.parcel import Limits, Parcel

MOST_NUMBERS = 1 << 27  # elements that one crossing may hold
MOST_HEADS = 64  # headers of frames that are remembered
LONGEST_HEAD = 1 << 14  # bytes
PLAIN = {"F32": np.float32, "I64": np.int64, "U8": np.uint8}


class Form:
    """A parcel that is sent again and again with other numbers: its header is written once for each set of shapes.

    Parameters
    ----------
    kind : str
        Of the parcel.
    header : mapping
        Not to be changed afterwards.
    """

    def __init__(self, kind: str, header: Mapping[str, Any]) -> None:
        self.kind, self.header = kind, header
        self._heads: dict[tuple[Any, ...], tuple[bytes, tuple[str, ...]]] = {}

    def frame(self, spec: str, tensors: Mapping[str, Tensor]) -> bytes:
        """Return what ``Parcel.to_bytes`` writes; ``spec`` is the codec that the header names."""
        key = (spec, *((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()))
        if (known := self._heads.get(key)) is not None:
            return b"".join((known[0], *(tensors[name].numpy().tobytes() for name in known[1])))
        frame = Parcel(self.kind, {**self.header, "codec": spec}, dict(tensors)).to_bytes()
        start = 8 + int.from_bytes(frame[:8], "little")
        listing = json.loads(frame[8:start])
        if len(self._heads) >= MOST_HEADS:
            self._heads.clear()
        order = sorted(tensors, key=lambda name: int(listing[name]["data_offsets"][0]))
        self._heads[key] = frame[:start], tuple(order)
        return frame


@dataclass(frozen=True)
class _Head:
    """What a frame's header says, after it was checked once: equal bytes before an equal length say the same."""

    kind: str
    header: dict[str, Any]
    length: int
    tensors: tuple[tuple[str, Any, tuple[int, ...], int, int], ...]

    def parcel(self, frame: bytes) -> Parcel:
        found = {
            name: torch.from_numpy(np.frombuffer(frame, kind, count, start).reshape(shape).copy())
            for name, kind, shape, count, start in self.tensors
        }
        return Parcel(self.kind, self.header, found)


_heads: OrderedDict[bytes, _Head] = OrderedDict()


class Boundary:
    """One side of a cut.

    Parameters
    ----------
    codec : str
        How floats cross: ``raw``, ``bf16``, ``int8``, ``topk(0.1)`` or a chain of these.

    Attributes
    ----------
    numbers, sent : int
        Elements that left here, and the bytes they took, headers included.
    error : float
        Largest relative error seen, |decoded - true| / |true| in the Euclidean norm; 0 for a lossless codec.
    """

    def __init__(self, codec: str = "raw") -> None:
        self.codec = parse_codec(codec)
        self.numbers = self.sent = 0
        self.error = 0.0

    def pack(self, kind: str, header: Mapping[str, Any], **tensors: Tensor) -> bytes:
        """Return a frame; the receiver answers with the codec that the header names."""
        parcel = Parcel(kind, {**header, "codec": self.codec.spec}, dict(tensors))
        frame = parcel.to_bytes(RAW if self.codec.lossless else self.codec)
        floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        self.numbers += sum(tensor.numel() for tensor in floats.values())
        self.sent += len(frame)
        if not self.codec.lossless:
            arrived = Parcel.from_bytes(frame).tensors
            for name, tensor in floats.items():
                norm = float(tensor.norm())
                if norm:
                    self.error = max(self.error, float((arrived[name] - tensor).norm()) / norm)
        return frame

    def fill(self, form: Form, **tensors: Tensor) -> bytes:
        """Return what ``pack`` returns, sooner where the codec leaves the numbers as they are."""
        if not self.codec.lossless:
            return self.pack(form.kind, form.header, **tensors)
        frame = form.frame(self.codec.spec, tensors)
        self.numbers += sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())
        self.sent += len(frame)
        return frame

    @staticmethod
    def unpack(frame: bytes, kinds: tuple[str, ...]) -> Parcel:
        """Parse a frame; ``ParcelError`` when it is unsound or of another kind. Its header is not to be changed."""
        start = 8 + int.from_bytes(frame[:8], "little")
        text = frame[8:start] if start <= LONGEST_HEAD else b""
        head = _heads.get(text)
        if head is not None and head.length == len(frame):
            _heads.move_to_end(text)
            parcel = head.parcel(frame)
        else:
            limits = Limits(frame_bytes=8 * MOST_NUMBERS + (1 << 20), elements=MOST_NUMBERS, tensors=64)
            parcel = Parcel.from_bytes(frame, limits)
            _remember(text, start, parcel, len(frame))
        if parcel.kind not in kinds:
            raise ParcelError(f"a parcel of the kind {parcel.kind[:40]!r} came where {' or '.join(kinds)} is expected")
        return parcel


def _remember(text: bytes, start: int, parcel: Parcel, length: int) -> None:
    """Keep the header of a sound frame whose tensors travelled as they are."""
    listing = json.loads(text) if text else {}
    if not text or not all(name in listing and listing[name]["dtype"] in PLAIN for name in parcel.tensors):
        return
    placed = tuple(
        (name, PLAIN[listing[name]["dtype"]], tuple(tensor.shape), tensor.numel(),
         start + int(listing[name]["data_offsets"][0]))
        for name, tensor in parcel.tensors.items()
    )  # fmt: skip
    _heads[text] = _Head(parcel.kind, parcel.header, length, placed)
    if len(_heads) > MOST_HEADS:
        _heads.popitem(last=False)


def sound(parcel: Parcel, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a parcel's float tensor after checking its shape and that every number is finite."""
    tensor = parcel.tensors.get(name)
    if tensor is None:
        raise ParcelError(f"the parcel holds no {name!r}")
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
        raise ParcelError(f"{name!r} is {tensor.dtype} of {tuple(tensor.shape)}, where float32 of {shape} is expected")
    if not torch.isfinite(tensor).all():
        raise ParcelError(f"{name!r} holds numbers that are not finite")
    return tensor
