"""Tables, verdicts and words follow the losses they are made from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.errors import RunError
from mycel.report import bytes_line, summary_table
from mycel.report.curves import spread
from mycel.report.source import Result
from mycel.report.tables import summary_rows
from mycel.report.wording import bytes_text, clean_name, verdict
from report_runs import PARTIES, synthetic, terminal


@given(path=st.integers(0, 400), value=st.sampled_from([None, -1, "x", [], {}, 1e400, True]))
def test_any_field_of_a_wrong_kind_is_refused_or_understood(path: int, value: Any) -> None:
    result = synthetic(("a", "b"), rounds=2)
    places = list(_leaves(result))
    container, key = places[path % len(places)]
    container[key] = value
    try:
        outcome = terminal(summary_table(result)) + bytes_line(result)
    except RunError as error:
        outcome = str(error)
    assert "damaged at" in outcome or "mixture" in outcome


def _leaves(content: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield content, key
        if isinstance(value, dict | list) and key != "recipe":
            yield from _leaves(value)


@given(
    local=st.floats(1, 5),
    federated=st.floats(1, 5),
    centralised=st.floats(1, 5),
)
def test_the_verdict_follows_the_losses(local: float, federated: float, centralised: float) -> None:
    result = synthetic(("a", "b"), rounds=2)
    result["final"]["mixture"] = {
        "base": 6.0,
        "local_only_mean": local,
        "federated": federated,
        "centralised": centralised,
    }
    judged = verdict(Result.model_validate(result))
    assert judged.beat_local == (federated < local)
    assert (judged.gap_closed is None) == (centralised >= local)
    if judged.gap_closed is not None:
        assert local - judged.gap_closed * (local - centralised) == pytest.approx(federated, abs=1e-6)
    if abs(federated - local) > 0.001:
        assert (": better than training alone" in judged.sentence) == (federated < local)
        assert (": worse than training alone" in judged.sentence) == (federated > local)


def test_only_arms_that_keep_data_at_home_are_marked() -> None:
    result = synthetic()
    for row in summary_rows(Result.model_validate(result)):
        home = {arm: row.losses[arm] for arm in ("base", "local_only", "federated", "personal") if row.losses[arm]}
        assert row.best == {min(home, key=lambda arm: home[arm] or 0.0)}


def test_the_terminal_table_prints_every_party_and_the_arms_that_were_run() -> None:
    result = synthetic()
    for scores in result["final"]["per_party"].values():
        scores["centralised"] = None
    result["final"]["mixture"].pop("centralised")
    result["final"]["own"].pop("centralised_mean")
    shown = terminal(summary_table(result))
    assert all(name in shown for name in PARTIES)
    assert "centralised" not in shown
    for scores in result["final"]["per_party"].values():
        assert f"{scores['federated']:.3f}" in shown


def test_the_line_of_bytes_counts_both_ways_and_what_was_dropped() -> None:
    result = synthetic()
    assert bytes_line(result) == "wire: 19.8 MB up, 19.6 MB down (4.93 MB a round); 1 answer dropped (1 lost)"
    result["dropped"]["lost"] = 0
    assert bytes_line(result).endswith("no answer dropped")


@given(
    wanted=st.lists(st.floats(0, 200), min_size=1, max_size=8),
)
def test_labels_are_apart_in_order_and_below_the_top(wanted: list[float]) -> None:
    placed = spread(wanted, 14.0, 200.0)
    ranked = sorted(range(len(wanted)), key=lambda index: (wanted[index], index))
    heights = [placed[index] for index in ranked]
    assert all(high - low >= 14.0 - 1e-6 for low, high in itertools.pairwise(heights))
    assert max(placed) <= 200.0
    if all(b - a >= 14.0 for a, b in itertools.pairwise(sorted(wanted))):
        assert placed == pytest.approx(wanted)


@given(st.text(), st.integers(2, 40))
def test_a_clean_name_is_one_short_printable_line(text: str, limit: int) -> None:
    cleaned = clean_name(text, limit)
    assert len(cleaned) <= limit
    assert cleaned.isprintable()
    assert clean_name(cleaned, limit) == cleaned


@given(st.integers(0, 10**15))
def test_bytes_in_words_are_right_to_half_a_percent(count: int) -> None:
    number, unit = bytes_text(count).split()
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(number) * scale == pytest.approx(count, rel=0.006)
