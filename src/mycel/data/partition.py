"""Spread examples over parties, alike or unlike on purpose.

    by-domain      one party per label
    dirichlet(A)   label skew: each label is dealt in shares drawn from Dirichlet(A) (Hsu et al., arXiv:1909.06335)
    quantity(A)    size skew: the sizes are shares drawn from Dirichlet(A)
    iid            equal sizes, at random
    pooled         one party holds everything

A small A is unlike, a large A tends to ``iid``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from mycel.errors import DataError

KNOWN = '"by-domain", "dirichlet(A)", "quantity(A)", "iid" or "pooled", where A is a number such as 0.3'
SKEW = re.compile(r"(dirichlet|quantity)\(\s*([0-9.eE+-]+)\s*\)")
LEAST, MOST = 1e-3, 1e6

Indices = NDArray[np.int64]


def partition(labels: Sequence[str], spec: str, parties: int, seed: int) -> list[list[int]]:
    """Say which examples each party holds; every example is held exactly once and no party is empty.

    Parameters
    ----------
    labels : sequence of str
        The label of each example.
    spec : str
        One of the partitions above; ``pooled`` makes one party, whatever ``parties`` says.
    parties : int
        How many parties there are.
    seed : int
        The same seed gives the same partition.

    Returns
    -------
    list of list of int
        Indices of each party's examples, ascending. ``by-domain`` keeps the order in which labels first occur.

    Raises
    ------
    DataError
        The partition is unknown, or these examples cannot be spread so.
    """
    rule, skew = parse_partition(spec)
    if not labels:
        raise DataError("there are no examples to spread over parties: name a data.source that has some")
    if rule == "pooled":
        return [list(range(len(labels)))]
    if not 1 <= parties <= len(labels):
        raise DataError(
            f"data.count asks for {parties} parties and there are {len(labels)} examples: each party needs one"
        )
    if rule == "by-domain":
        return _by_domain(labels, parties)
    held = _RULES[rule](labels, parties, skew, np.random.default_rng(seed))
    _fill_empty(held)
    return [sorted(int(index) for index in indices) for indices in held]


def parse_partition(spec: str) -> tuple[str, float]:
    """Split a partition's text into its rule and its skew ``A`` (0 where there is none)."""
    if spec in ("by-domain", "iid", "pooled"):
        return spec, 0.0
    match = SKEW.fullmatch(spec.strip())
    if match is None:
        raise DataError(f"data.parties is {spec!r}, which is no partition: use {KNOWN}")
    try:
        skew = float(match[2])
    except ValueError:
        skew = 0.0
    if not LEAST <= skew <= MOST:
        raise DataError(f"data.parties is {spec!r}: A must be a number between {LEAST:g} and {MOST:,.0f}")
    return match[1], skew


def _by_domain(labels: Sequence[str], parties: int) -> list[list[int]]:
    held: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        held.setdefault(label, []).append(index)
    if len(held) != parties:
        named = ", ".join(repr(label) for label in list(held)[:6]) + (", ..." if len(held) > 6 else "")
        raise DataError(
            f'data.parties is "by-domain" and data.count {parties}, but the examples have {len(held)} labels '
            f"({named}): set data.count = {len(held)}, or use another partition"
        )
    return list(held.values())


def _iid(labels: Sequence[str], parties: int, skew: float, random: Generator) -> list[Indices]:
    return np.array_split(random.permutation(len(labels)), parties)


def _quantity(labels: Sequence[str], parties: int, skew: float, random: Generator) -> list[Indices]:
    return _deal(random.permutation(len(labels)), random.dirichlet(np.full(parties, skew)))


def _dirichlet(labels: Sequence[str], parties: int, skew: float, random: Generator) -> list[Indices]:
    names, codes = np.unique(np.asarray(labels), return_inverse=True)
    if len(names) < 2:
        raise DataError(
            f'data.parties is "dirichlet({skew:g})", a skew of labels, but every example has the label '
            f'{str(names[0])!r}: give examples a label, or use "quantity({skew:g})"'
        )
    dealt = [
        _deal(random.permutation(np.flatnonzero(codes == code)), random.dirichlet(np.full(parties, skew)))
        for code in range(len(names))
    ]
    return [np.concatenate(shares) for shares in zip(*dealt, strict=True)]


def _deal(indices: Indices, shares: NDArray[np.float64]) -> list[Indices]:
    cuts = np.rint(np.cumsum(shares)[:-1] * len(indices)).astype(np.int64).tolist()
    return np.split(indices, [min(cut, len(indices)) for cut in cuts])


def _fill_empty(held: list[Indices]) -> None:
    """Give each empty party one example of the party that then holds most."""
    for party, indices in enumerate(held):
        if len(indices) == 0:
            richest = max(range(len(held)), key=lambda other: len(held[other]))
            held[party], held[richest] = held[richest][-1:], held[richest][:-1]


_RULES: dict[str, Callable[[Sequence[str], int, float, Generator], list[Indices]]] = {
    "iid": _iid,
    "quantity": _quantity,
    "dirichlet": _dirichlet,
}
