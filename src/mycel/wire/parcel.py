"""What travels: named tensors and a JSON header, as one safetensors document.

A frame is ``safetensors`` bytes whose metadata holds the header, so any tool of that format can open it and
no frame can carry code. A codec replaces each float tensor ``name`` by parts ``name|part``; the header then
keeps the codec's spec and the shapes. ``len(frame)`` is the only byte count ever reported.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from safetensors.torch import save_file
from torch import Tensor

from mycel.errors import ParcelError, RecipeError
from mycel.wire.codec import Codec
from mycel.wire.codecs import RAW, parse_codec
from mycel.wire.shelf import Frame

Tensors = dict[str, Tensor]
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/\-]{0,255}")
HEADER_LIMIT = 1 << 20
_UNWRITABLE = (SafetensorError, ValueError, TypeError, KeyError, RecursionError)


@dataclass(frozen=True)
class Limits:
    """What a receiver accepts, checked before memory is taken.

    Attributes
    ----------
    frame_bytes : int
        Longest frame.
    elements : int
        Most elements over all decoded tensors.
    tensors : int
        Most tensors (parts included) in one frame.
    """

    frame_bytes: int = 1 << 31
    elements: int = 1 << 31
    tensors: int = 100_000


@dataclass(frozen=True)
class Parcel:
    """Named tensors with a JSON header; ``kind`` says what the receiver is to do with it."""

    kind: str
    header: dict[str, Any] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)

    def to_bytes(self, codec: Codec = RAW) -> bytes:
        """Serialise; float tensors pass through ``codec``, others travel as they are."""
        parts, metadata = self._laid_out(codec)
        try:
            frame: bytes = save_tensors(parts, metadata)
        except _UNWRITABLE as error:
            raise self._unwritable(error) from error
        return frame

    def to_file(self, path: Path) -> None:
        """Write the frame that ``to_bytes`` returns to a file, without holding a copy of it.

        Raises
        ------
        SafetensorError
            The file cannot be written: whoever chose the place knows what would help.
        """
        parts, metadata = self._laid_out(RAW)
        save_file(parts, path, metadata)

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def _laid_out(self, codec: Codec) -> tuple[Tensors, dict[str, str]]:
        envelope: dict[str, Any] = {"kind": self.kind, **({"header": self.header} if self.header else {})}
        parts: Tensors = {}
        shapes: dict[str, list[int]] = {}
        for name, tensor in self.tensors.items():
            check_name(name)
            if codec is RAW or not tensor.is_floating_point():
                parts[name] = tensor.detach()
            else:
                shapes[name] = list(tensor.shape)
                parts.update({f"{name}|{part}": value for part, value in _encode_one(codec, name, tensor)})
        if shapes:
            envelope |= {"codec": codec.spec, "shapes": shapes}
        try:
            return _apart(parts), {"mycel": json.dumps(envelope, separators=(",", ":"), allow_nan=False)}
        except _UNWRITABLE as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> ParcelError:
        return ParcelError(f"the {self.kind!r} parcel cannot be written: {error}")

    @classmethod
    def from_bytes(cls, frame: bytes, limits: Limits | None = None) -> Parcel:
        """Parse and check a frame; anything unsound raises ``ParcelError`` before memory is taken for it."""
        limits = limits or Limits()
        envelope = read_envelope(frame, limits)
        try:
            parts = load_tensors(frame)
        except (SafetensorError, ValueError, RuntimeError, LookupError, TypeError, OverflowError) as error:
            raise ParcelError(f"the frame's tensors are damaged: {error}; ask for it again") from error
        tensors = _decode(parts, envelope, limits)
        # The reader hands tensors over in an order that is another each time; whoever sums over names would see it.
        return cls(envelope["kind"], envelope.get("header", {}), dict(sorted(tensors.items())))


def check_name(name: str) -> None:
    """Refuse a tensor name that is empty, too long, or could climb out of a folder."""
    if not NAME.fullmatch(name) or ".." in name or "//" in name:
        raise ParcelError(f"tensor name {name[:80]!r} is not allowed: letters, digits, '_', '.', ':', '-' and '/' only")


def _encode_one(codec: Codec, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
    try:
        return codec.encode(tensor.detach().to("cpu", torch.float32)).items()
    except ParcelError as error:
        raise ParcelError(f"tensor {name!r} cannot be encoded: {error}") from error


def _apart(parts: Tensors) -> Tensors:
    """Make parts contiguous, each in memory of its own: the format refuses what tied weights share."""
    seen: set[int] = set()
    apart: Tensors = {}
    for name, part in parts.items():
        contiguous = part.contiguous()
        address = contiguous.untyped_storage().data_ptr()
        apart[name] = contiguous.clone() if address in seen else contiguous
        seen.add(address)
    return apart


def read_envelope(frame: Frame, limits: Limits) -> dict[str, Any]:
    """Read what a frame says of itself, and check it, before anything else of it is read."""
    if len(frame) > limits.frame_bytes:
        raise ParcelError(f"the frame has {len(frame):,} bytes and at most {limits.frame_bytes:,} are accepted")
    if len(frame) < 8:
        raise ParcelError(f"the frame is truncated: {len(frame)} bytes where at least 8 are needed")
    (length,) = struct.unpack("<Q", frame[:8])
    if length > min(HEADER_LIMIT + 512 * limits.tensors, len(frame) - 8):
        raise ParcelError(
            f"the frame's header claims {length:,} bytes and {len(frame) - 8:,} follow: truncated or lying"
        )
    try:
        listing = _strict_json(frame[8 : 8 + length].decode())
        envelope = _strict_json(listing["__metadata__"]["mycel"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ParcelError(f"the frame's header is not that of a parcel: {str(error)[:80]}") from error
    if not isinstance(envelope, dict) or not isinstance(envelope.get("kind"), str):
        raise ParcelError("the frame's header names no kind")
    if not isinstance(envelope.get("header", {}), dict):
        raise ParcelError("the parcel's header is not a table")
    if len(listing) - 1 > limits.tensors:
        raise ParcelError(f"the frame lists {len(listing) - 1:,} tensors and at most {limits.tensors:,} are accepted")
    return envelope


def _strict_json(text: str) -> Any:
    """Parse JSON that can be written back: no NaN, no infinity, no name twice, no half of a character."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    def finite(number: str) -> float:
        value = float(number)
        return value if math.isfinite(value) else refuse(number)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        return table if len(table) == len(pairs) else refuse("a table with one name twice")

    value = json.loads(text, parse_constant=refuse, parse_float=finite, object_pairs_hook=once)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _decode(parts: Tensors, envelope: dict[str, Any], limits: Limits) -> Tensors:
    owners = sort_parts(parts, envelope, limits)
    return {name: decode_one(name, {part: parts[part] for part in own}, envelope) for name, own in owners.items()}


def sort_parts(parts: Iterable[str], envelope: dict[str, Any], limits: Limits) -> dict[str, list[str]]:
    """Return which parts each tensor is made of; names and shapes that are unsound are refused."""
    owners: dict[str, list[str]] = {name: [] for name in _shapes(envelope, limits)}
    encoded = set(owners)
    for name in parts:
        owner, bar, _ = name.partition("|")
        check_name(owner)
        if bool(bar) != (owner in encoded):
            raise ParcelError(f"part {name[:80]!r} does not belong to the tensors that the header names")
        owners.setdefault(owner, []).append(name)
    return owners


def decode_one(name: str, parts: Tensors, envelope: dict[str, Any]) -> Tensor:
    """Return the tensor that ``parts`` are the parts of."""
    shape = envelope.get("shapes", {}).get(name)
    if shape is None:
        return parts[name]
    encoded = {part.partition("|")[2]: value for part, value in parts.items()}
    return _decode_one(_codec(envelope), name, encoded, tuple(shape))


def _codec(envelope: dict[str, Any]) -> Codec:
    spec = envelope.get("codec")
    if not isinstance(spec, str):
        raise ParcelError(f"the frame's header names no codec: found {str(spec)[:60]!r}")
    try:
        return parse_codec(spec)
    except RecipeError as error:
        raise ParcelError(f"the frame's codec cannot be used: {error}") from error


def _decode_one(codec: Codec, name: str, parts: Tensors, shape: tuple[int, ...]) -> Tensor:
    try:
        tensor = codec.decode(parts, shape)
    except (ParcelError, LookupError, ValueError, RuntimeError, TypeError) as error:
        raise ParcelError(f"tensor {name!r} cannot be decoded with {codec.spec!r}: {error}") from error
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
        raise ParcelError(f"tensor {name!r} decoded to {tuple(tensor.shape)}, where its header says {shape}")
    return tensor


def _shapes(envelope: dict[str, Any], limits: Limits) -> dict[str, tuple[int, ...]]:
    found = envelope.get("shapes", {})
    if not isinstance(found, dict):
        raise ParcelError("the parcel's shapes are not a table")
    shapes: dict[str, tuple[int, ...]] = {}
    total = 0
    for name, shape in found.items():
        check_name(name)
        if not isinstance(shape, list) or len(shape) > 16:
            raise ParcelError(f"tensor {name!r} has the shape {str(shape)[:60]}: not a list of at most 16 sizes")
        if not all(type(size) is int and 0 <= size < 1 << 40 for size in shape):
            raise ParcelError(f"tensor {name!r} has the shape {str(shape)[:60]}: not a list of sizes")
        total += math.prod(shape)
        if total > limits.elements:
            raise ParcelError(
                f"tensor {name!r} claims the shape {str(shape)[:60]}: "
                f"at most {limits.elements:,} elements in all are accepted"
            )
        shapes[name] = tuple(shape)
    return shapes
