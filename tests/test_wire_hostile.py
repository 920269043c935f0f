"""Hostile frames: what they claim costs nothing, and ParcelError is all that they raise."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mycel.errors import ParcelError
from mycel.wire.codecs import parse_codec
from mycel.wire.parcel import Parcel
from test_wire_parcel import DTYPES, JSON, LIMITS, SPECS, craft, lawful, sample

MEBIBYTE = 1 << 20


def encoded(spec: str, shape: list[int], parts: dict[str, Tensor]) -> bytes:
    named = {f"x|{name}": part for name, part in parts.items()}
    return craft({"kind": "k", "codec": spec, "shapes": {"x": shape}}, named)


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """Reset the process's high-water mark, then hold it to ``limit`` bytes above where it stands."""
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    yield
    taken = high_water() - before
    assert taken < limit, f"{taken / MEBIBYTE:.0f} MiB were taken"


def high_water() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.parametrize("length", [0, 1, 7, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_lying_header_lengths_are_refused(length: int) -> None:
    frame = sample()
    with memory_below(8 * MEBIBYTE), pytest.raises(ParcelError):
        Parcel.from_bytes(struct.pack("<Q", length) + frame[8:], LIMITS)


# Nor does it cost memory to find out.


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [[1 << 39], [1 << 20, 1 << 20], [(1 << 40) - 1] * 16])
def test_absurd_shapes_are_refused_before_memory_is_taken(spec: str, shape: list[int]) -> None:
    frame = encoded(spec, shape, parse_codec(spec).encode(torch.linspace(0, 1, 40)))
    with memory_below(8 * MEBIBYTE), pytest.raises(ParcelError):
        Parcel.from_bytes(frame)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "seeds(4)"])
def test_parts_must_fill_an_allowed_shape_before_memory_is_taken(spec: str) -> None:
    frame = encoded(spec, [1 << 29], parse_codec(spec).encode(torch.linspace(0, 1, 40)))
    with memory_below(8 * MEBIBYTE), pytest.raises(ParcelError, match="tensor 'x' cannot be decoded"):
        Parcel.from_bytes(frame)


@pytest.mark.parametrize("spec", ["seeds(4)", "topk(1e-9)"])
def test_a_codec_that_makes_much_of_little_is_held_by_the_limits(spec: str) -> None:
    frame = encoded(spec, [1 << 29], parse_codec(spec).encode(torch.linspace(0, 1, 40)))
    with memory_below(8 * MEBIBYTE), pytest.raises(ParcelError, match="1,048,576 elements"):
        Parcel.from_bytes(frame, LIMITS)


def bomb(claimed: int | None, size: int = 256 * MEBIBYTE) -> Tensor:
    """Bytes that unfold to ``size`` zeros and announce ``claimed`` of them, or nothing when None."""
    packed = bytearray(zstandard.ZstdCompressor(write_content_size=claimed is not None).compress(bytes(size)))
    if claimed is not None:
        # Four bytes of content size follow the frame's descriptor, and its window where there is one.
        assert packed[4] >> 6 == 2
        place = 5 if packed[4] & 32 else 6
        packed[place : place + 4] = struct.pack("<I", claimed)
    return torch.frombuffer(packed, dtype=torch.uint8)


@pytest.mark.parametrize("claimed", [None, 256 * MEBIBYTE, 4000, 0])
def test_bombs_do_not_go_off(claimed: int | None) -> None:
    frame = encoded("zstd", [1000], {"values": bomb(claimed)})
    assert len(frame) < MEBIBYTE
    with memory_below(8 * MEBIBYTE), pytest.raises(ParcelError, match="values"):
        Parcel.from_bytes(frame)


def test_a_window_larger_than_any_of_ours_is_refused() -> None:
    descriptor, window_of_64_mebibytes = b"\x80", bytes([16 << 3])
    frame = b"\x28\xb5\x2f\xfd" + descriptor + window_of_64_mebibytes + struct.pack("<I", 4000)
    part = torch.tensor(list(frame), dtype=torch.uint8)
    with pytest.raises(ParcelError, match="too much memory"):
        Parcel.from_bytes(encoded("zstd", [1000], {"values": part}), LIMITS)


@pytest.mark.parametrize("payload", [b"", b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd", b"noise" * 9])
def test_what_is_not_zstandard_is_refused(payload: bytes) -> None:
    part = torch.tensor(list(payload), dtype=torch.uint8)
    with pytest.raises(ParcelError):
        Parcel.from_bytes(encoded("zstd", [10], {"values": part}), LIMITS)


# And whatever comes, ParcelError is all that is raised.


def survives(frame: bytes) -> None:
    try:
        parcel = Parcel.from_bytes(frame, LIMITS)
    except ParcelError:
        return
    json.dumps(parcel.header, allow_nan=False, ensure_ascii=False).encode()
    assert sum(tensor.numel() for tensor in parcel.tensors.values()) <= LIMITS.elements + 8 * len(frame)


@settings(lawful, max_examples=300)
@given(st.binary(max_size=300))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(ParcelError):
        Parcel.from_bytes(noise, LIMITS)
    survives(struct.pack("<Q", len(noise)) + noise)


@settings(lawful, max_examples=600)
@given(st.sampled_from(SPECS), st.data())
def test_mutations_raise_nothing_else(spec: str, data: st.DataObject) -> None:
    frame = bytearray(sample(spec))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(frame) - 1))
        piece = data.draw(st.binary(max_size=3) | st.sampled_from([b"9", b"-", b'"', b"[", b"1e9", b"\\u"]))
        width = len(piece) if data.draw(st.booleans()) else data.draw(st.integers(0, 3))
        frame[place : place + width] = piece
    header = frame[8:].find(b"}}}")
    if data.draw(st.booleans()) and header > 0:
        frame[:8] = struct.pack("<Q", header + 3)
    with memory_below(64 * MEBIBYTE):
        survives(bytes(frame))


@settings(lawful, max_examples=300)
@given(st.sampled_from(SPECS), st.dictionaries(st.sampled_from(["kind", "header", "codec", "shapes"]), JSON), st.data())
def test_any_envelope_raises_nothing_else(spec: str, changes: dict[str, Any], data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(-1, 70), max_size=4))
    parts = parse_codec(spec).encode(torch.linspace(-1, 1, 60))
    dropped = data.draw(st.sets(st.sampled_from(sorted(parts))))
    retyped = data.draw(st.sampled_from([None, *DTYPES]))
    named = {
        f"x|{name}": part if retyped is None else part.to(retyped)
        for name, part in parts.items()
        if name not in dropped
    }
    envelope = {"kind": "k", "codec": spec, "shapes": {"x": shape}} | changes
    survives(craft(envelope, named))
