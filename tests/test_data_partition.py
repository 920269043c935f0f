from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mycel.data.partition import partition
from mycel.errors import DataError

LABELS = [f"label{index % 6}" for index in range(1200)]
SPREADING = ["iid", "dirichlet(0.01)", "dirichlet(0.3)", "dirichlet(100)", "quantity(0.01)", "quantity(5)"]


def shares(held: list[list[int]], labels: list[str]) -> NDArray[np.float64]:
    """Share of each label that each party holds: (parties, labels)."""
    names = sorted(set(labels))
    counts = np.array(
        [[Counter(labels[index] for index in part)[name] for name in names] for part in held], dtype=np.float64
    )
    divided: NDArray[np.float64] = counts / counts.sum(axis=0)
    return divided


@settings(max_examples=80, deadline=None)
@given(
    codes=st.lists(st.integers(0, 4), min_size=2, max_size=60),
    spec=st.sampled_from(SPREADING),
    parties=st.integers(1, 60),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_example_is_held_once_and_no_party_is_empty(codes: list[int], spec: str, parties: int, seed: int) -> None:
    labels = ["first", "second", *map(str, codes)]
    parties = min(parties, len(labels))
    held = partition(labels, spec, parties, seed)
    assert len(held) == parties
    assert all(held)
    assert sorted(index for part in held for index in part) == list(range(len(labels)))
    assert held == partition(labels, spec, parties, seed)


@pytest.mark.parametrize("spec", SPREADING)
def test_another_seed_is_another_partition(spec: str) -> None:
    assert partition(LABELS, spec, 6, 1) != partition(LABELS, spec, 6, 2)


def test_iid_sizes_differ_by_one_at_most() -> None:
    sizes = {len(part) for part in partition(LABELS, "iid", 7, 3)}
    assert max(sizes) - min(sizes) <= 1


def test_a_large_dirichlet_is_nearly_iid_and_a_small_one_concentrated() -> None:
    even = shares(partition(LABELS, "dirichlet(100000)", 6, 5), LABELS)
    assert np.abs(even - 1 / 6).max() < 0.02
    skewed = shares(partition(LABELS, "dirichlet(0.01)", 6, 5), LABELS)
    assert skewed.max(axis=0).mean() > 0.9
    middle = shares(partition(LABELS, "dirichlet(1)", 6, 5), LABELS)
    assert even.std() < middle.std() < skewed.std()


def test_quantity_skews_sizes_and_leaves_labels_alike() -> None:
    held = partition(LABELS, "quantity(0.5)", 4, 2)
    sizes = np.array([len(part) for part in held])
    assert sizes.max() > 2 * sizes.min()
    largest = max(held, key=len)
    counts = Counter(LABELS[index] for index in largest)
    assert max(counts.values()) < 1.5 * min(counts.values())
    even = [len(part) for part in partition(LABELS, "quantity(100000)", 4, 2)]
    assert max(even) - min(even) < 15


def test_by_domain_gives_each_label_a_party_and_pooled_gives_one_everything() -> None:
    held = partition(["b", "a", "b", "c"], "by-domain", 3, 0)
    assert held == [[0, 2], [1], [3]]
    assert partition(["b", "a", "b"], "pooled", 6, 0) == [[0, 1, 2]]


@pytest.mark.parametrize("parties", [2, 4])
def test_by_domain_with_another_number_of_labels_is_refused(parties: int) -> None:
    with pytest.raises(DataError, match=r"the examples have 3 labels \('b', 'a', 'c'\): set data\.count = 3"):
        partition(["b", "a", "b", "c", "c"], "by-domain", parties, 0)


@pytest.mark.parametrize("spec", ["by-size", "dirichlet", "dirichlet()", "dirichlet(-1)", "iid(2)", "", "quantity(x)"])
def test_an_unknown_partition_is_refused_with_the_known_ones(spec: str) -> None:
    with pytest.raises(DataError, match=r"data\.parties is .*(which is no partition: use \"by-domain\"|A must be)"):
        partition(LABELS, spec, 6, 0)


@pytest.mark.parametrize("skew", ["0", "1e-9", "1e300", "1e999", "1.2.3", "e"])
def test_a_skew_out_of_range_is_refused(skew: str) -> None:
    with pytest.raises(DataError, match=r"A must be a number between 0\.001 and 1,000,000"):
        partition(LABELS, f"dirichlet({skew})", 6, 0)


def test_more_parties_than_examples_and_none_at_all_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.count asks for 4 parties and there are 3 examples"):
        partition(["a", "b", "c"], "iid", 4, 0)
    with pytest.raises(DataError, match="there are no examples to spread"):
        partition([], "iid", 1, 0)


def test_label_skew_without_labels_is_refused() -> None:
    with pytest.raises(DataError, match=r"every example has the label '': give examples a label, or use \"quantity"):
        partition(["", "", ""], "dirichlet(0.5)", 2, 0)
