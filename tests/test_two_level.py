"""Two-level planning and the event simulator: equal to trying everything, and to closed forms."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.decisions.timeline import Task, pipeline, simulate
from mycel.decisions.two_level import Operators, Sharding, Slicing, Way
from mycel.errors import RecipeError
from mycel.pretrain.alpa import least_sharding, least_slicing, random_operators, random_slices
from mycel.testing import check_decision


def test_ways_within_a_stage_equal_enumeration() -> None:
    chance = random.Random(1)
    ratios = check_decision(Sharding(), [random_operators(chance) for _ in range(120)], least_sharding, slack=1e-7)
    assert len(ratios) == 120


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 30))
def test_stages_and_their_devices_equal_enumeration_with_and_without_stopping_early(seed: int) -> None:
    seen = random_slices(random.Random(seed))
    best = least_slicing(seen)
    for plan in (Slicing(), Slicing(early=False)):
        if best == float("inf"):
            with pytest.raises(RecipeError, match="no division"):
                plan.decide(seen)
        else:
            check_decision(plan, [seen], lambda _: best)


def test_ways_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RecipeError, match="bytes a device"):
        Sharding().decide(Operators(((Way("whole", 1.0, 5.0),),), {}, 4.0))


@given(st.integers(1, 5), st.integers(1, 9), st.sampled_from(["gpipe", "1f1b"]))
def test_an_even_pipeline_takes_its_closed_form_and_keeps_its_bubble(stages: int, pieces: int, schedule: str) -> None:
    course = simulate(pipeline([1.0] * stages, [2.0] * stages, [0.0] * stages, pieces, schedule))
    assert course.seconds == pytest.approx(3.0 * (pieces + stages - 1))
    assert course.idle == pytest.approx((stages - 1) / (pieces + stages - 1))


@given(st.lists(st.floats(0.1, 3), min_size=1, max_size=5), st.integers(1, 8), st.sampled_from(["gpipe", "1f1b"]))
def test_no_pipeline_is_faster_than_its_slowest_stage_or_its_longest_way(
    times: list[float], pieces: int, schedule: str
) -> None:
    course = simulate(pipeline(times, times, [0.1] * len(times), pieces, schedule))
    assert course.seconds >= 2 * pieces * max(times) - 1e-9
    assert course.seconds >= 2 * sum(times) + 0.2 * (len(times) - 1) - 1e-9


def test_tasks_that_wait_for_each_other_are_named() -> None:
    with pytest.raises(RecipeError, match="wait for each other"):
        simulate([[Task("a", 1, (("b", 0),))], [Task("b", 1, (("a", 0),))]])
