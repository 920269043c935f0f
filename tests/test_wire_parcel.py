"""Parcels: what goes in comes out, and nothing unsound comes in."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from mycel.errors import ParcelError
from mycel.wire.codecs import parse_codec
from mycel.wire.parcel import Limits, Parcel, check_name

torch.set_num_threads(1)
lawful = settings(deadline=None, derandomize=True)

SPECS = ["raw", "bf16", "int8(8)", "topk(0.2)", "seeds(4)", "zstd", "topk(0.2)+int8(8)+zstd"]
LIMITS = Limits(frame_bytes=1 << 20, elements=1 << 20, tensors=100)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_:-]{0,8}([./][A-Za-z0-9_:-]{1,8}){0,3}", fullmatch=True)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool]


def sample(spec: str = "raw") -> bytes:
    tensors = {"a.weight": torch.linspace(-1, 1, 60).reshape(6, 10), "count": torch.arange(3)}
    return Parcel("answer", {"loss": 1.5, "who": "é"}, tensors).to_bytes(parse_codec(spec))


def craft(envelope: Any, parts: dict[str, Tensor] | None = None) -> bytes:
    text = envelope if isinstance(envelope, str) else json.dumps(envelope)
    frame: bytes = save(parts or {}, metadata={"mycel": text})
    return frame


# What goes in comes out.


@lawful
@given(st.text(), st.dictionaries(st.text(), JSON, max_size=4))
def test_kind_and_header_come_back(kind: str, header: dict[str, Any]) -> None:
    arrived = Parcel.from_bytes(Parcel(kind, header).to_bytes())
    assert (arrived.kind, arrived.header, arrived.tensors) == (kind, header, {})


@lawful
@given(
    st.dictionaries(
        NAMES,
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    )
)
def test_tensors_come_back_to_the_bit(layout: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    source = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randint(-9, 9, tuple(shape), generator=source).to(dtype) for name, (dtype, shape) in layout.items()
    }
    arrived = Parcel.from_bytes(Parcel("k", {}, tensors).to_bytes()).tensors
    assert arrived.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert arrived[name].dtype == tensor.dtype
        assert arrived[name].shape == tensor.shape
        assert torch.equal(arrived[name], tensor)


@pytest.mark.parametrize("spec", SPECS)
def test_only_floats_pass_through_the_codec(spec: str) -> None:
    arrived = Parcel.from_bytes(sample(spec)).tensors
    assert torch.equal(arrived["count"], torch.arange(3))
    assert arrived["a.weight"].shape == (6, 10)
    assert arrived["a.weight"].dtype == torch.float32


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_parcel_is_the_same_bytes(spec: str) -> None:
    assert sample(spec) == sample(spec)


def test_a_frame_is_a_safetensors_document(tmp_path: Path) -> None:
    frame = sample()
    assert torch.equal(load(frame)["count"], torch.arange(3))
    (tmp_path / "frame.safetensors").write_bytes(frame)
    with safe_open(tmp_path / "frame.safetensors", framework="pt") as document:
        assert json.loads(document.metadata()["mycel"])["kind"] == "answer"
        assert sorted(document.keys()) == ["a.weight", "count"]


def test_views_and_tied_weights_travel() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": base, "tied": base, "turned": base.t(), "row": base[1], "wide": base[:1].expand(5, 4)}
    arrived = Parcel.from_bytes(Parcel("k", {}, tensors).to_bytes()).tensors
    assert all(torch.equal(arrived[name], tensors[name]) for name in tensors)


def test_what_arrives_can_be_written_to() -> None:
    for spec in SPECS:
        arrived = Parcel.from_bytes(sample(spec)).tensors["a.weight"]
        arrived.add_(1)


@pytest.mark.parametrize("header", [{"loss": math.nan}, {"loss": math.inf}, {"who": {1, 2}}, {"who": b"x"}])
def test_a_header_that_is_not_json_is_refused_by_the_sender(header: dict[str, Any]) -> None:
    with pytest.raises(ParcelError, match="'answer' parcel cannot be written"):
        Parcel("answer", header).to_bytes()


def test_the_sender_names_the_tensor_that_a_codec_cannot_carry() -> None:
    parcel = Parcel("k", {}, {"fine": torch.ones(4), "bad": torch.tensor([1.0, math.nan])})
    with pytest.raises(ParcelError, match=r"tensor 'bad' cannot be encoded.*NaN"):
        parcel.to_bytes(parse_codec("int8"))


# Nothing unsound comes in.


@pytest.mark.parametrize("spec", SPECS)
def test_every_truncation_is_refused(spec: str) -> None:
    frame = sample(spec)
    for length in range(len(frame)):
        with pytest.raises(ParcelError):
            Parcel.from_bytes(frame[:length], LIMITS)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/../b", "../a", "/etc/passwd", "a//b", "~/x", "a\\b", "a b", "a\n", "a|b", "é", "x" * 257, "-a"],
)
def test_names_that_climb_or_confuse_are_refused(name: str) -> None:
    with pytest.raises(ParcelError, match="name"):
        check_name(name)
    with pytest.raises(ParcelError):
        Parcel("k", {}, {name: torch.ones(1)}).to_bytes()
    with pytest.raises(ParcelError):
        Parcel.from_bytes(craft({"kind": "k"}, {name: torch.ones(1)}), LIMITS)
    with pytest.raises(ParcelError):
        Parcel.from_bytes(craft({"kind": "k", "codec": "raw", "shapes": {name: [1]}}), LIMITS)


@pytest.mark.parametrize(
    "envelope",
    [
        "[]",
        "null",
        "{}",
        '{"kind": 1}',
        '{"kind": "k", "header": []}',
        '{"kind": "k", "header": {"loss": NaN}}',
        '{"kind": "k", "header": {"loss": -Infinity}}',
        '{"kind": "k", "header": {"loss": 1e999}}',
        '{"kind": "k", "kind": "l"}',
        '{"kind": "k", "header": {"a": 1, "a": 2}}',
        '{"kind": "\\ud800"}',
        '{"kind": "k"',
        "[" * 100_000,
        '{"kind": "k", "header": {"big": ' + "9" * 5000 + "}}",
        '{"kind": "k", "shapes": []}',
        '{"kind": "k", "shapes": {"x": 3}, "codec": "raw"}',
        '{"kind": "k", "shapes": {"x": [-1]}, "codec": "raw"}',
        '{"kind": "k", "shapes": {"x": [true]}, "codec": "raw"}',
        '{"kind": "k", "shapes": {"x": [1.0]}, "codec": "raw"}',
        '{"kind": "k", "shapes": {"x": [1]}}',
        '{"kind": "k", "shapes": {"x": [1]}, "codec": 5}',
        '{"kind": "k", "shapes": {"x": [1]}, "codec": "gzip"}',
        '{"kind": "k", "shapes": {"x": [1]}, "codec": "raw"}',
        '{"kind": "k", "shapes": {"x": [' + "1," * 20 + '1]}, "codec": "raw"}',
    ],
)
def test_unsound_envelopes_are_refused(envelope: str) -> None:
    with pytest.raises(ParcelError):
        Parcel.from_bytes(craft(envelope), LIMITS)


def test_a_name_listed_twice_is_refused() -> None:
    entry = '"x":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    listing = '{"__metadata__":{"mycel":"{\\"kind\\":\\"k\\"}"},' + entry % (0, 4) + "," + entry % (4, 8) + "}"
    frame = struct.pack("<Q", len(listing)) + listing.encode() + bytes(8)
    with pytest.raises(ParcelError, match="twice"):
        Parcel.from_bytes(frame, LIMITS)


def test_a_tensor_both_plain_and_encoded_is_refused() -> None:
    envelope = {"kind": "k", "codec": "bf16", "shapes": {"x": [1]}}
    parts = {"x": torch.ones(1), "x|rounded": torch.ones(1, dtype=torch.bfloat16)}
    with pytest.raises(ParcelError, match="does not belong"):
        Parcel.from_bytes(craft(envelope, parts), LIMITS)


def test_limits_hold() -> None:
    frame = Parcel("k", {}, {f"t{index}": torch.ones(10) for index in range(5)}).to_bytes(parse_codec("bf16"))
    assert len(Parcel.from_bytes(frame, Limits(len(frame), 50, 5)).tensors) == 5
    for limits in (Limits(len(frame) - 1, 50, 5), Limits(len(frame), 49, 5), Limits(len(frame), 50, 4)):
        with pytest.raises(ParcelError, match="at most"):
            Parcel.from_bytes(frame, limits)
