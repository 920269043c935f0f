"""The order in which a pre-training run sees its rows: a pure function of the seed and the sample's number.

Sample ``i`` of a table of ``n`` rows is row ``permutation(seed, i // n)[i % n]``. Every row comes once in an epoch, and
a run that is resumed at any step goes on with the very next sample, without replaying what came before.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mycel.data.table import Batch, TokenTable
from mycel.errors import DataError


def sample_rows(rows: int, first: int, count: int, seed: int) -> NDArray[np.int64]:
    """Rows of the samples ``first`` to before ``first + count`` of an endless stream over ``rows`` rows."""
    if rows < 1:
        raise DataError("a stream of samples needs at least one row")
    picked: list[NDArray[np.int64]] = []
    while count > 0:
        epoch, place = divmod(first, rows)
        order = np.random.default_rng([seed, epoch]).permutation(rows)[place : place + count]
        picked.append(order)
        first, count = first + len(order), count - len(order)
    return np.concatenate(picked) if picked else np.empty(0, dtype=np.int64)


def stream_batches(
    table: TokenTable, batch_size: int, first: int, steps: int, seed: int, pad_id: int
) -> Iterator[Batch]:
    """Yield the causal batches of the steps ``first`` to before ``first + steps``.

    Parameters
    ----------
    table : TokenTable
        Rows, packed or not.
    batch_size : int
        Rows of a step.
    first : int
        Steps taken before, by this run or by the one that it resumes.
    """
    rows = sample_rows(len(table), first * batch_size, steps * batch_size, seed)
    for step in range(steps):
        yield table.batch(rows[step * batch_size : (step + 1) * batch_size].tolist(), pad_id)
