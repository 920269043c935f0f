"""What crosses a cut: parcels of hidden states and gradients, through a codec whose error is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mycel.errors import ParcelError
from mycel.wire.codecs import RAW, parse_codec
from mycel.wire.parcel import Limits, Parcel

MOST_NUMBERS = 1 << 27  # elements that one crossing may hold


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

    @staticmethod
    def unpack(frame: bytes, kinds: tuple[str, ...], limit: int = MOST_NUMBERS) -> Parcel:
        """Parse a frame; ``ParcelError`` when it is unsound or of another kind."""
        parcel = Parcel.from_bytes(frame, Limits(frame_bytes=8 * limit + (1 << 20), elements=limit, tensors=64))
        if parcel.kind not in kinds:
            raise ParcelError(f"a parcel of the kind {parcel.kind[:40]!r} came where {' or '.join(kinds)} is expected")
        return parcel


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
