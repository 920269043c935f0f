"""Every party's tokens in one file that all processes of a run share, and the batches made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from mycel.data.packing import pack_examples, table_of
from mycel.data.parties import PartyData
from mycel.data.table import Batch, TokenTable, open_table, save_table
from mycel.errors import DataError

__all__ = ["Batch", "TokenStore", "TokenTable", "batches"]

WINDOW = 4  # batches within which examples are put together by length


@dataclass(frozen=True)
class TokenStore:
    """Training and held-out tokens of every party: first all training sets, then all held-out sets.

    Attributes
    ----------
    names : tuple of str
        The parties.
    table : TokenTable
        Everything.
    bounds : tuple of int
        Where each training set starts, then where each held-out set starts, then where all ends.
    """

    names: tuple[str, ...]
    table: TokenTable
    bounds: tuple[int, ...]

    @classmethod
    def build(
        cls, parties: Sequence[PartyData], tokenizer: PreTrainedTokenizerFast, max_length: int, pack: bool = False
    ) -> TokenStore:
        """Tokenise what every party holds, each example in at most ``max_length`` tokens, or packed in such rows."""
        parts: list[list[Any]] = [party.train for party in parties] + [party.held_out for party in parties]
        if pack:
            names = [party.name for party in parties]
            whose = [f"party {name!r}" for name in names] + [f"the held-out set of party {name!r}" for name in names]
            parts = [pack_examples(part, tokenizer, max_length, who) for part, who in zip(parts, whose, strict=True)]
            table = table_of(list(chain.from_iterable(parts)), int(tokenizer.eos_token_id))
        else:
            table = TokenTable.from_examples(list(chain.from_iterable(parts)), tokenizer, max_length)
        bounds = tuple(accumulate((len(part) for part in parts), initial=0))
        return cls(tuple(party.name for party in parties), table, bounds)

    def __len__(self) -> int:
        return len(self.names)

    def train(self, party: int) -> TokenTable:
        """What a party trains on: a view."""
        return self._part(party, 0)

    def held_out(self, party: int) -> TokenTable:
        """What a party is measured by: a view."""
        return self._part(party, len(self))

    def pooled(self) -> TokenTable:
        """Every party's training set together: a view."""
        return self.table.slice(0, self.bounds[len(self)])

    def _part(self, party: int, first: int) -> TokenTable:
        if not 0 <= party < len(self):
            raise DataError(f"there is no party {party}: the store holds parties 0 to {len(self) - 1}")
        return self.table.slice(self.bounds[first + party], self.bounds[first + party + 1])

    def save(self, path: Path) -> None:
        """Write everything as one safetensors file."""
        save_table(self.table, path, {"names": json.dumps(self.names), "bounds": json.dumps(self.bounds)})

    @classmethod
    def open(cls, path: Path) -> TokenStore:
        """Map a store from its file.

        Raises
        ------
        DataError
            The file is missing or is not a sound store.
        """
        table, metadata = open_table(path)
        try:
            names, bounds = json.loads(metadata["names"]), json.loads(metadata["bounds"])
        except (KeyError, ValueError, RecursionError) as error:
            raise DataError(f"{path} holds tokens but names no parties: make it again") from error
        if not _sound(names, bounds, len(table)):
            raise DataError(f"{path} is damaged: its parties do not fit its {len(table)} examples; make it again")
        return cls(tuple(names), table, tuple(bounds))


def _sound(names: object, bounds: object, examples: int) -> bool:
    """Whether names and bounds, as read from a file, divide so many examples."""
    if not isinstance(names, list) or not isinstance(bounds, list) or len(bounds) != 2 * len(names) + 1:
        return False
    if not all(isinstance(name, str) for name in names) or not all(type(bound) is int for bound in bounds):
        return False
    return bounds[0] == 0 and bounds[-1] == examples and all(low <= high for low, high in pairwise(bounds))


def batches(table: TokenTable, batch_size: int, steps: int, seed: int, pad_id: int, objective: str) -> Iterator[Batch]:
    """Make ``steps`` batches of exactly ``batch_size`` examples, epoch after epoch, each reshuffled.

    Every example comes once before any comes again. Within a window of ``WINDOW`` batches, examples of like length
    share a batch, to save padding, and the batches come in random order, so that the chance to come at a given
    step is the same for all.
    """
    if len(table) == 0:
        raise DataError("a table without examples makes no batches")
    random = np.random.default_rng(seed)
    lengths = table.lengths().numpy()
    waiting = np.empty(0, dtype=np.int64)
    while steps > 0:
        count = min(WINDOW, steps)
        while len(waiting) < count * batch_size:
            waiting = np.concatenate([waiting, random.permutation(len(table))])
        window, waiting = waiting[: count * batch_size], waiting[count * batch_size :]
        rows = window[np.argsort(lengths[window], kind="stable")].reshape(count, batch_size)
        for row in random.permutation(count):
            yield table.batch(rows[row].tolist(), pad_id, objective)
        steps -= count
