"""Robust filters: what they make of honest rows, of few lies, and of rows in another order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from mycel.errors import RecipeError
from mycel.guard.filters import Evidence, parse_filter
from mycel.testing import check_filter

SPECS = [
    "median",
    "trimmed_mean(0.3)",
    "krum(0.3)",
    "multi_krum(0.3)",
    "norm_bound(1.5)",
    "geometric_median",
    "foolsgold",
    "fltrust",
]
HARD = [spec for spec in SPECS if spec not in {"foolsgold", "norm_bound(1.5)"}]


def evidence(rows: Tensor, weights: Tensor | None = None, reference: Tensor | None = None) -> Evidence:
    weights = torch.ones(len(rows)) if weights is None else weights
    return Evidence(rows, weights, rows.mean(0) if reference is None else reference, rows)


def outcome(spec: str, seen: Evidence) -> Tensor:
    verdict = parse_filter(spec).judge(seen)
    return verdict.centre.double() if verdict.centre is not None else verdict.shares @ seen.rows.double()


def honest(count: int, size: int = 40, seed: int = 1) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=source) + 0.3 * torch.randn(count, size, generator=source)


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(count=some.integers(3, 12), seed=some.integers(0, 1000))
def test_order_does_not_matter(spec: str, count: int, seed: int) -> None:
    rows, weights = honest(count, seed=seed), torch.arange(1.0, count + 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    reference = rows.mean(0)
    plain = outcome(spec, evidence(rows, weights, reference))
    turned = outcome(spec, evidence(rows[order], weights[order], reference))
    assert torch.allclose(plain, turned, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_filters_obey_their_contract(spec: str) -> None:
    check_filter(parse_filter(spec))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "foolsgold"])
def test_rows_that_agree_come_back(spec: str) -> None:
    """FoolsGold is the exception by design: rows that agree are what it takes for sybils."""
    row = honest(1)[0]
    assert torch.allclose(outcome(spec, evidence(row.expand(5, -1))), row.double(), atol=1e-5)


@pytest.mark.parametrize("spec", HARD)
@pytest.mark.parametrize("lie", [-10.0, 100.0, -1e6])
@pytest.mark.parametrize("liars", [1, 3])
def test_a_loud_minority_moves_nothing_far(spec: str, lie: float, liars: int) -> None:
    rows = honest(10)
    truth, spread = rows[liars:].mean(0), float((rows[liars:] - rows[liars:].mean(0)).norm(dim=1).max())
    rows[:liars] *= lie
    found = outcome(spec, evidence(rows, reference=truth))
    assert float((found - truth).norm()) < 1.5 * spread
    assert float((rows.mean(0) - truth).norm()) > 1.5 * spread  # where the plain mean ends up


def test_norm_bound_takes_the_loudness_away() -> None:
    rows = honest(10)
    rows[:2] *= -1000
    found = outcome("norm_bound(1.0)", evidence(rows))
    assert float(found.norm()) <= float(rows[2:].norm(dim=1).max())


def test_foolsgold_hears_sybils_as_one() -> None:
    source = torch.Generator().manual_seed(4)
    rows = torch.randn(8, 60, generator=source)
    rows[5:] = rows[5] + 1e-3 * torch.randn(3, 60, generator=source)
    shares = parse_filter("foolsgold").judge(evidence(rows)).shares
    assert float(shares[5:].sum()) < 0.05 * float(shares[:5].sum())


def test_krum_picks_one_row_and_multi_krum_the_rest() -> None:
    rows = honest(10)
    rows[:3] += 50
    one = parse_filter("krum(0.3)").judge(evidence(rows)).shares
    many = parse_filter("multi_krum(0.3)").judge(evidence(rows)).shares
    assert int((one > 0).sum()) == 1
    assert not bool(one[:3].any())
    assert (many > 0).tolist() == [False] * 3 + [True] * 7


def test_geometric_median_is_where_distances_balance() -> None:
    rows = honest(9)
    found = outcome("geometric_median", evidence(rows))
    away = found - rows.double()
    pull = (away / away.norm(dim=1, keepdim=True)).sum(0)
    assert float(pull.norm()) < 1e-3


def test_one_dimension_has_the_textbook_answers() -> None:
    rows = torch.tensor([[1.0], [2.0], [3.0], [4.0], [100.0]])
    assert float(outcome("median", evidence(rows))) == 3.0
    assert float(outcome("trimmed_mean(0.2)", evidence(rows))) == 3.0
    assert float(outcome("median", evidence(rows[:4]))) == 2.5


@pytest.mark.parametrize("spec", ["medain", "krum(0.6)", "trimmed_mean(0)", "norm_bound(-1)", "median(2)", ""])
def test_unknown_filters_are_refused(spec: str) -> None:
    with pytest.raises(RecipeError, match=r"guard\.filter"):
        parse_filter(spec)
