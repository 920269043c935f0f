"""Pipelines' schedules: ranks really run them, and their order waits as little as theory says."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from mycel.collectives.bubbles import Action, bubble, expected, replayed
from mycel.collectives.together import together
from mycel.decisions.cost import NOMINAL, Work, computing, memory_of, traffic
from mycel.decisions.graph import graph_of
from mycel.decisions.layout import check_layout, rank_of, stages_of
from mycel.decisions.stages import ends, sides, waited
from mycel.errors import EngineError, RecipeError
from mycel.models.sizes import SIZES
from mycel.pretrain.breadth_first import scheduled
from mycel.recipe.schema import Layout

CASES = [
    ("gpipe", 4, 1),
    ("1f1b", 8, 1),
    ("interleaved", 4, 2),
    ("breadth_first", 4, 2),
    ("zero_bubble", 8, 1),
    ("zbv", 8, 2),
]
COSTS = {"forward": 1.0, "input": 1.0, "weight": 1.0, "backward": 2.0}


def layout_of(schedule: str, pieces: int, chunks: int) -> Layout:
    return Layout.model_validate({"pipeline": 4, "micro_batches": pieces, "schedule": schedule, "chunks": chunks})


def _all(device: torch.device) -> list[Any]:
    return [scheduled(layout_of(*case), 8, 0.0, device) for case in CASES]


@pytest.fixture(scope="module")
def ranks() -> list[list[Any]]:
    return together(4, _all)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_schedule_waits_as_its_formula_says_at_the_gradients_of_one_process(
    ranks: list[list[Any]], case: tuple[str, int, int]
) -> None:
    found = [rank[CASES.index(case)] for rank in ranks]
    assert max(each["apart"] for each in found) < 1e-12
    traces = [[Action(*action) for action in each["trace"]] for each in found]
    schedule, pieces, chunks = case
    assert all(len([a for a in trace if a.kind == "forward"]) == pieces * chunks for trace in traces)
    assert bubble(replayed(traces, COSTS)) == pytest.approx(expected(schedule, 4, pieces, chunks), abs=1e-9)


def test_traces_of_two_steps_do_not_fit_together() -> None:
    with pytest.raises(ValueError, match="wait for each other"):
        replayed([[Action("forward", 1, 0, 0, 0)], [Action("backward", 0, 0, 0, 0)]], COSTS)


def test_every_stage_has_one_rank() -> None:
    for schedule, chunks in (("gpipe", 1), ("interleaved", 3), ("zbv", 2)):
        layout = Layout.model_validate({"pipeline": 4, "schedule": schedule, "chunks": chunks})
        held = [stage for rank in range(4) for stage in stages_of(layout, rank)]
        assert sorted(held) == list(range(4 * chunks))
        assert all(stage in stages_of(layout, rank_of(layout, stage)) for stage in held)


def test_the_cost_model_waits_as_the_formula_says() -> None:
    for schedule, pieces, chunks in [*CASES, ("zero_bubble", 8, 2), ("interleaved", 8, 2), ("gpipe", 1, 1)]:
        layout = Layout.model_validate(
            {"pipeline": 4, "micro_batches": pieces, "schedule": schedule, "chunks": chunks, "recompute": True}
        )
        seconds = computing([2.0] * 4, pieces, 1, NOMINAL, waited(layout))
        assert 1 - 2.0 * pieces / seconds == pytest.approx(expected(schedule, 4, pieces, chunks), abs=1e-9)


def test_a_rank_of_a_looped_pipeline_is_foretold_with_all_its_stages() -> None:
    config = SIZES["tiny"].config()
    config.tie_word_embeddings = False
    work = Work(graph_of(config, 32), 8)
    looped = Layout.model_validate({"pipeline": 2, "micro_batches": 4, "schedule": "zbv", "chunks": 2})
    once = Layout(pipeline=2, micro_batches=4)
    first, second = (memory_of(work, looped, (1, 1, 1, 1), place, NOMINAL) for place in (0, 1))
    plain = [memory_of(work, once, (2, 2), place, NOMINAL) for place in (0, 1)]
    assert first + second == pytest.approx(sum(plain))  # the same blocks and tables, otherwise shared out
    assert [ends(looped, place) for place in (0, 1)] == [(True, True), (False, False)]
    assert [sides(looped, place) for place in (0, 1)] == [2, 2]  # there and back; the turn is inside the last rank
    sent = sum(traffic(work, looped, (1, 1, 1, 1), place)[0] for place in (0, 1))
    assert sent == 2 * sum(traffic(work, once, (2, 2), place)[0] for place in (0, 1))


@pytest.mark.parametrize(
    ("schedule", "pieces", "chunks", "sentence"),
    [
        ("gpipe", 4, 2, "the schedule gpipe takes 1 stages a rank"),
        ("zbv", 4, 1, "the schedule zbv takes 2 stages a rank"),
        ("zbv", 1, 2, "fewer than the 2 stages that the schedule zbv keeps busy"),
        ("interleaved", 5, 1, "cannot take in equal rounds over 2 ranks: try 4"),
        ("breadth_first", 2, 4, "which makes 8 stages"),
    ],
)
def test_a_schedule_that_has_no_order_is_refused(schedule: str, pieces: int, chunks: int, sentence: str) -> None:
    layout = Layout.model_validate({"pipeline": 2, "micro_batches": pieces, "schedule": schedule, "chunks": chunks})
    with pytest.raises(RecipeError, match=sentence):
        check_layout(layout, 2, SIZES["tiny"].config(), batch_size=20, length=32)


def _fails(device: torch.device) -> None:
    raise RecipeError(f"no {device}")


def test_a_rank_that_fails_is_reported() -> None:
    with pytest.raises(EngineError, match=r"rank [01] failed: RecipeError: no cpu"):
        together(2, _fails)
    assert together(2, partial(str)) == ["cpu", "cpu"]
