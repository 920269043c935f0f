"""Documents joined end to end and cut into rows of one length, so that no step computes on padding.

Each document is closed by the end-of-sequence token; a row may hold the end of one document and the start of the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from mycel.data.examples import Example
from mycel.data.table import TokenTable
from mycel.errors import DataError, ModelError

CHUNK = 512  # documents tokenised in one call

Ids = NDArray[np.int32]


def packed_rows(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, length: int) -> Iterator[Ids]:
    """Yield rows of exactly ``length`` tokens as soon as enough documents were read; what is left at the end is lost.

    Memory is that of one chunk of documents, however long the stream.
    """
    end_id = tokenizer.eos_token_id
    if not isinstance(end_id, int):
        raise ModelError(f"the tokeniser {tokenizer.name_or_path!r} has no end-of-sequence token: give it one")
    waiting = np.empty(0, dtype=np.int32)
    for chunk in _chunks(texts):
        encoded = tokenizer(chunk, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        pieces = [np.array([*ids, end_id], dtype=np.int32) for ids in encoded if ids]
        waiting = np.concatenate([waiting, *pieces])
        whole = len(waiting) // length
        yield from waiting[: whole * length].reshape(whole, length)
        waiting = waiting[whole * length :]


def pack_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, length: int, whose: str
) -> list[Ids]:
    """Return the packed rows of a party's examples.

    Raises
    ------
    DataError
        All of its text together is shorter than one row.
    """
    rows = list(packed_rows((example.prompt + example.response for example in examples), tokenizer, length))
    if not rows:
        raise DataError(
            f"{whose} holds {len(examples)} documents, together shorter than one row of {length} tokens: "
            "give it more text, or lower data.max_length"
        )
    return rows


def table_of(rows: Sequence[Ids], end_id: int) -> TokenTable:
    """Lay rows out as a table in which every token but a row's first is to be predicted."""
    lengths = torch.tensor([0, *(len(row) for row in rows)])
    ids = torch.from_numpy(np.concatenate(rows) if rows else np.empty(0, np.int32))
    return TokenTable(ids, torch.cumsum(lengths, 0), torch.zeros(len(rows), dtype=torch.int32), end_id)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for text in texts:
        chunk.append(text)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
