"""A parcel that waits in a file says what it would say in memory, and is refused where it would be refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mycel.errors import ParcelError
from mycel.wire.codecs import parse_codec
from mycel.wire.parcel import Parcel
from mycel.wire.shelf import Kept, Shelf
from mycel.wire.waiting import Waiting
from test_wire_parcel import LIMITS, SPECS, sample


def shelved(frame: bytes, folder: Path) -> Kept:
    return Shelf(budget=0, folder=folder).keep(frame)


def read(frame: bytes, folder: Path) -> tuple[str, dict[str, object], dict[str, Tensor]] | None:
    """What a frame on disk holds, or None where it is refused."""
    try:
        waiting = Waiting.of(shelved(frame, folder), LIMITS)
        return waiting.kind, waiting.header, dict(waiting.tensors)
    except ParcelError:
        return None


@pytest.mark.parametrize("spec", SPECS)
def test_its_tensors_are_those_of_the_parcel(spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {"update/b": torch.randn(6, 5), "update/a": torch.randn(40), "keys/k": torch.arange(3)}
    frame = Parcel("answer", {"samples": 3}, tensors).to_bytes(parse_codec(spec))
    whole, waiting = Parcel.from_bytes(frame), Waiting.of(shelved(frame, tmp_path), LIMITS)
    assert (waiting.kind, waiting.header) == (whole.kind, whole.header)
    assert list(waiting.tensors) == list(whole.tensors)
    assert all(torch.equal(waiting.tensors[name], tensor) for name, tensor in whole.tensors.items())
    assert list(waiting.tensors.under("update/")) == ["a", "b"]
    del waiting
    assert not list(tmp_path.iterdir())


def test_a_parcel_written_to_a_file_is_the_frame_to_the_byte(tmp_path: Path) -> None:
    parcel = Parcel("work", {"version": 1}, {"shared/w": torch.randn(3, 4), "shared/v": torch.randn(2).half()})
    kept = Shelf(budget=0, folder=tmp_path).file(parcel.to_file, parcel.size)
    assert bytes(kept) == parcel.to_bytes()
    assert kept[7:30] == parcel.to_bytes()[7:30]


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_refused_in_memory_is_refused_on_disk(tmp_path: Path, data: st.DataObject) -> None:
    frame = bytearray(sample())
    for _ in range(data.draw(st.integers(0, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(frame[: data.draw(st.sampled_from([len(frame), len(frame) // 2, len(frame) - 1]))])
    found = read(damaged, tmp_path)
    try:
        whole = Parcel.from_bytes(damaged, LIMITS)
    except ParcelError:
        assert found is None
        return
    assert found is not None
    assert found[:2] == (whole.kind, whole.header)
    assert found[2].keys() == whole.tensors.keys()
    assert all(_same(found[2][name], tensor) for name, tensor in whole.tensors.items())


def _same(one: Tensor, other: Tensor) -> bool:
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(*flat)
