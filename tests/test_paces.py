"""Paces are pure functions of a view; each is held to the laws of all, and to its own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.errors import RecipeError
from mycel.rounds.pace import Buffered, Pace, Sequential, Synchronous, View, parse_pace
from mycel.testing import check_pace

SIX = (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("text", ["synchronous", "sequential", "buffered(1)", "buffered(3)", "buffered(50)"])
def test_every_pace_obeys_the_laws(text: str) -> None:
    check_pace(text)


@pytest.mark.parametrize("quorum", [0.01, 0.5, 1.0])
def test_a_quorum_obeys_the_laws(quorum: float) -> None:
    check_pace(Synchronous(quorum))


class Twice(Sequential):
    """Asks whoever is out already."""

    def ask(self, view: View) -> Sequence[int]:
        return view.cohort[:1]


class Hasty(Synchronous):
    """Combines nothing."""

    def ready(self, view: View) -> bool:
        return True


class Idle(Synchronous):
    """Asks nobody after the first round."""

    def ask(self, view: View) -> Sequence[int]:
        return super().ask(view) if view.version == 0 else []


class Stranger(Synchronous):
    """Asks beyond the cohort."""

    def ask(self, view: View) -> Sequence[int]:
        return [*super().ask(view), 99]


class Stubborn(Synchronous):
    """Waits for refused nodes."""

    def ready(self, view: View) -> bool:
        return len(view.arrived) == len(view.cohort)


class Forgetful(Synchronous):
    """Answers differently each time it is asked."""

    def ask(self, view: View) -> Sequence[int]:
        self.__dict__["count"] = self.__dict__.get("count", 0) + 1
        return super().ask(view) if self.__dict__["count"] % 2 else []


@pytest.mark.parametrize(
    ("pace", "law"),
    [
        (Twice(), "is not asked"),
        (Hasty(), "nothing is combined"),
        (Idle(), "somebody left to ask"),
        (Stranger(), "only the cohort"),
        (Stubborn(), "so it is ready"),
        (Forgetful(), "is pure"),
    ],
)
def test_the_suite_refuses_broken_paces(pace: Pace, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_pace(pace)


@given(st.integers(1, 60), st.floats(0.01, 1.0), st.booleans())
def test_synchronous_waits_for_all_until_the_deadline_and_for_a_quorum_after(
    size: int, quorum: float, overdue: bool
) -> None:
    pace, cohort = Synchronous(quorum), tuple(range(size))
    least = min(count for count in range(size + 1) if count + 1e-9 >= quorum * size)
    for count in range(size + 1):
        view = View(0, cohort, cohort[count:], cohort[:count], overdue=overdue)
        enough = count == size or (overdue and count >= least)
        assert pace.ready(view) == (enough and count > 0)


def test_a_quorum_is_not_raised_by_rounding() -> None:
    cohort = tuple(range(100))  # 0.55 * 100 is 55.00000000000001
    assert Synchronous(0.55).ready(View(0, cohort, cohort[55:], cohort[:55], overdue=True))


def test_synchronous_asks_the_whole_cohort_together_and_lost_nodes_anew() -> None:
    assert list(Synchronous().ask(View(0, SIX))) == list(SIX)
    assert list(Synchronous().ask(View(0, SIX, (0, 1), (2,), (3,)))) == [4, 5]


def test_synchronous_goes_on_without_the_refused() -> None:
    assert Synchronous().ready(View(0, SIX, (), (0, 1), (2, 3, 4, 5)))
    assert not Synchronous().ready(View(0, SIX, (), (), SIX))


def test_buffered_combines_at_its_size_and_keeps_the_rest_at_work() -> None:
    pace = Buffered(2)
    assert pace.keeps
    assert not pace.ready(View(0, SIX, (1, 2, 3, 4, 5), (0,)))
    assert pace.ready(View(0, SIX, (2, 3, 4, 5), (0, 1)))
    assert list(pace.ask(View(1, SIX, (2, 3, 4, 5)))) == [0, 1]


def test_a_buffer_larger_than_the_cohort_combines_when_all_have_come() -> None:
    assert Buffered(9).ready(View(0, SIX, (), SIX))
    assert not Buffered(9).ready(View(0, SIX, (5,), SIX[:5]))


def test_sequential_visits_everyone_in_turn() -> None:
    visited = [Sequential().ask(View(version, SIX))[0] for version in range(12)]
    assert visited == [*SIX, *SIX]
    assert not Sequential().ask(View(0, SIX, (3,)))
    assert list(Sequential().ask(View(1, SIX, (), (), (1, 2)))) == [3]


@pytest.mark.parametrize("text", ["", "Synchronous", "buffered", "buffered()", "buffered(0)", "buffered(-1)", "async"])
def test_unknown_paces_are_refused_with_what_would_do(text: str) -> None:
    with pytest.raises(RecipeError, match=r"rounds.pace is .* 'sequential' or 'buffered\(K\)' with K of 1 or more"):
        parse_pace(text)
