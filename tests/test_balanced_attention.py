"""Causal attention shared out evenly over ranks: that of one process, and nobody does much more than the others."""

from __future__ import annotations

from typing import Any

import pytest

from mycel.collectives.balanced_attention import steps_of, work_of
from mycel.collectives.together import together
from mycel.pretrain.distflashattn import costs, deviation


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_outcome_and_gradients_are_those_of_full_attention(ranks: int) -> None:
    assert max(together(ranks, lambda device: deviation(device, length=12))) < 1e-12


@pytest.mark.slow
def test_a_block_that_is_computed_again_sends_nothing_again() -> None:
    found: list[dict[str, Any]] = together(4, costs)
    assert max(each["apart"] for each in found) < 1e-12
    assert all(each["balanced_again_bytes"] == each["balanced_bytes"] for each in found)
    assert all(each["gathered_again_bytes"] > each["gathered_bytes"] for each in found)


@pytest.mark.parametrize("ranks", range(1, 12))
def test_every_pair_is_computed_once_and_evenly(ranks: int) -> None:
    work = [work_of(rank, ranks) for rank in range(ranks)]
    pairs = sorted(pair for each in work for pair in each)
    assert pairs == sorted((query, key) for query in range(ranks) for key in range(query))
    assert max(map(len, work)) == steps_of(ranks)
    assert max(map(len, work)) - min(map(len, work)) <= (ranks % 2 == 0)
