"""A run's folder when the disk is full, the log is torn, or two runs want it."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mycel.errors import RunError
from mycel.run.execute import run_recipe
from mycel.run.folder import RunFolder
from mycel.run.log import EventLog
from small_runs import events_of, small_recipe, without_seconds


@contextmanager
def full_disk(at: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``at`` bytes, as if the disk were full there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [3_000, 6_000, 16_000, 100_000])
def test_a_full_disk_is_a_sentence_and_nothing_is_lost(tmp_path: Path, room: int) -> None:
    """The tokens, the log, the first checkpoint, and the model do not fit, one after another."""
    recipe = small_recipe(tmp_path / "data", {"rounds.count": 6})
    whole = run_recipe(recipe, tmp_path / "whole")
    out = tmp_path / "run"
    with (
        full_disk(room),
        pytest.raises(RunError, match=r"cannot be written: the disk is full.*run again with --resume"),
    ):
        run_recipe(recipe, out)
    assert not (out / "result.json").exists()
    events_of(out)
    assert not [path for path in (out / "work").iterdir() if str(os.getpid()) in path.name]
    result = run_recipe(recipe, out, resume=True)
    assert without_seconds(result) == without_seconds(whole)


def test_a_log_on_a_full_disk_has_whole_lines_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)

    def fill() -> None:
        for number in range(100):
            log.record("ask", "system", text="x" * number)

    with full_disk(1000), pytest.raises(RunError, match="the disk is full"):
        fill()
    kept = events_of(tmp_path)
    assert 0 < len(kept) < 100
    log.record("ask", "system")
    log.close()
    assert [event["n"] for event in events_of(tmp_path)] == list(range(len(kept) + 1))


def test_a_torn_last_line_is_mended_when_the_log_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.record("ask", "system")
    log.close()
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut])
        log = EventLog(path)
        log.record("ask", "system")
        log.close()
        assert [event["n"] for event in events_of(tmp_path)] == [0, 1]


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "data")
    with (
        RunFolder(tmp_path / "run").held(recipe, False),
        pytest.raises(RunError, match="another run is writing to"),
        RunFolder(tmp_path / "run").held(recipe, True),
    ):
        pass
    with RunFolder(tmp_path / "run").held(recipe, True):
        pass
