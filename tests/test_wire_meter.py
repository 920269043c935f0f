"""The byte ledger."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.errors import RunError
from mycel.wire.codecs import parse_codec
from mycel.wire.meter import Direction, Meter
from mycel.wire.parcel import Parcel

lawful = settings(deadline=None, derandomize=True)
Entry = tuple[int, Direction, str, int]
ENTRIES = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from(["up", "down"]),
        st.sampled_from(["train", "evaluate"]),
        st.integers(0, 1 << 40),
    )
)


def filled(entries: list[Entry]) -> Meter:
    meter = Meter()
    for entry in entries:
        meter.count(*entry)
    return meter


@lawful
@given(ENTRIES)
def test_totals_are_sums_over_what_is_named(entries: list[Entry]) -> None:
    meter = filled(entries)
    assert meter.total() == sum(entry[3] for entry in entries)
    assert meter.frames() == len(entries)
    assert meter.total() == meter.total("up") + meter.total("down")
    assert meter.total() == sum(meter.total(node=node) for node in range(4))
    chosen = [size for node, way, why, size in entries if (node, way, why) == (1, "up", "train")]
    assert meter.total("up", node=1, purpose="train") == sum(chosen)
    assert meter.frames("up", node=1, purpose="train") == len(chosen)


@lawful
@given(ENTRIES, ENTRIES)
def test_a_restored_ledger_goes_on_as_if_never_stopped(before: list[Entry], after: list[Entry]) -> None:
    resumed = filled([(0, "up", "forgotten", 1)])
    resumed.restore(json.loads(json.dumps(filled(before).snapshot())))
    for entry in after:
        resumed.count(*entry)
    assert resumed.snapshot() == filled(before + after).snapshot()


@lawful
@given(st.permutations([(0, "up", "train", 3), (1, "up", "train", 4), (0, "down", "train", 5)]))
def test_order_does_not_show(entries: list[Entry]) -> None:
    assert filled(entries).snapshot() == [
        [0, "down", "train", 5, 1],
        [0, "up", "train", 3, 1],
        [1, "up", "train", 4, 1],
    ]


def test_it_counts_the_length_of_real_frames() -> None:
    meter, lengths = Meter(), 0
    for spec in ("raw", "int8", "topk(0.1)+int8+zstd"):
        frame = Parcel("answer", {"loss": 0.5}, {"w": torch.linspace(0, 1, 999)}).to_bytes(parse_codec(spec))
        meter.count(0, "up", "train", len(frame))
        lengths += len(frame)
    assert meter.total() == lengths
    assert meter.frames() == 3


def test_nonsense_is_refused() -> None:
    meter = Meter()
    with pytest.raises(ValueError, match="sideways"):
        meter.count(0, "sideways", "train", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="-1 bytes"):
        meter.count(0, "up", "train", -1)
    assert meter.snapshot() == []


@pytest.mark.parametrize(
    "row",
    [
        [],
        5,
        "updownup",
        [0, "up", "train", 3],
        [0, "up", "train", -3, 1],
        [0, "aside", "train", 3, 1],
        [0, "up", 1, 3, 1],
    ],
)
def test_a_damaged_snapshot_is_refused_and_changes_nothing(row: Any) -> None:
    meter = filled([(0, "up", "train", 3)])
    with pytest.raises(RunError, match="damaged"):
        meter.restore([[1, "up", "train", 1, 1], row])
    assert meter.total() == 3
