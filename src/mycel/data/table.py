"""Tokens of many examples in one flat table, mapped from a file that processes share.

Shapes: B examples in a batch, T tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mycel.data.encode import encode
from mycel.data.examples import Example
from mycel.errors import DataError

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """What one step trains on.

    Attributes
    ----------
    input_ids : Tensor
        int64, (B, T).
    attention_mask : Tensor
        int64, (B, T), 0 where padded.
    labels : Tensor
        int64, (B, T), or (B, T of the longest response) for seq2seq; -100 where nothing is to be predicted.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def tokens(self) -> int:
        """How many tokens are to be predicted."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True)
class TokenTable:
    """Examples as tokens, flat: a view that slices share and processes may map from one file.

    Attributes
    ----------
    ids : Tensor
        int32, every token of every example, prompt first.
    offsets : Tensor
        int64, (examples + 1): where each example starts in ``ids``, and where the last ends.
    prompts : Tensor
        int32, (examples): how many of an example's tokens are its prompt.
    end_id : int
        The end-of-sequence token.
    """

    ids: Tensor
    offsets: Tensor
    prompts: Tensor
    end_id: int

    @classmethod
    def from_examples(
        cls, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int
    ) -> TokenTable:
        """Tokenise examples as prompt, response, end of sequence, in at most ``max_length`` tokens each.

        Where that is too little the prompt loses its start, down to a quarter of ``max_length``, then the response
        its end; a response that was cut has no end-of-sequence token.

        Raises
        ------
        DataError
            A response has no token in this vocabulary.
        ModelError
            The tokeniser has no end-of-sequence token.
        """
        ids, lengths, prompts, end_id = encode(examples, tokenizer, max_length)
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        torch.cumsum(torch.from_numpy(lengths), 0, out=offsets[1:])
        return cls(torch.from_numpy(ids), offsets, torch.from_numpy(prompts), end_id)

    def __len__(self) -> int:
        return len(self.prompts)

    def lengths(self) -> Tensor:
        """Tokens of each example, prompt included: int64, (examples)."""
        return self.offsets[1:] - self.offsets[:-1]

    def slice(self, start: int, stop: int) -> TokenTable:
        """View of the examples from ``start`` to before ``stop``; nothing is copied."""
        if not 0 <= start <= stop <= len(self):
            raise DataError(f"a table of {len(self)} examples has no part from {start} to {stop}")
        return TokenTable(self.ids, self.offsets[start : stop + 1], self.prompts[start:stop], self.end_id)

    def batch(self, indices: Sequence[int], pad_id: int, objective: str = "causal") -> Batch:
        """Gather examples into a batch padded on the right to its longest.

        Parameters
        ----------
        indices : sequence of int
            Which examples, each in ``[0, len(self))``.
        pad_id : int
            What stands in ``input_ids`` where there is no token.
        objective : {"causal", "seq2seq"}
            ``causal``: prompt and response follow each other, and the labels are the response in place. The first
            token of a text without prompt is no label, for nothing predicts it.
            ``seq2seq``: the prompt and its end go in, and the labels are the response and its end.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        if len(chosen) == 0 or int(chosen.min()) < 0 or int(chosen.max()) >= len(self):
            raise DataError(f"a batch needs indices between 0 and {len(self) - 1}")
        start, stop = self.offsets[chosen], self.offsets[chosen + 1]
        response = start + self.prompts[chosen]
        if objective == "causal":
            ids, inside = self._rows(start, stop, pad_id)
            place = torch.arange(ids.shape[1]) + start[:, None]
            learnt = inside & (place >= torch.maximum(response, start + 1)[:, None])
            return Batch(ids, inside.long(), torch.where(learnt, ids, IGNORED))
        # The end-of-sequence token that closes the prompt takes the place of the first one past it.
        ids, inside = self._rows(start, response + 1, pad_id)
        ids[torch.arange(len(chosen)), response - start] = self.end_id
        return Batch(ids, inside.long(), self._rows(response, stop, IGNORED)[0])

    def _rows(self, start: Tensor, stop: Tensor, fill: int) -> tuple[Tensor, Tensor]:
        place = torch.arange(int((stop - start).max())) + start[:, None]
        inside = place < stop[:, None]
        ids = self.ids[place.clamp_(max=len(self.ids) - 1)].long()
        return torch.where(inside, ids, fill), inside

    def save(self, path: Path) -> None:
        """Write the table as one safetensors file."""
        save_table(self, path, {})

    @classmethod
    def open(cls, path: Path) -> TokenTable:
        """Map a table from its file; processes that open it share its memory.

        Raises
        ------
        DataError
            The file is missing or is not a sound table.
        """
        return open_table(path)[0]


def save_table(table: TokenTable, path: Path, metadata: dict[str, str]) -> None:
    """Write a table and a few texts beside it as one safetensors file, whole or not at all."""
    first, last = int(table.offsets[0]), int(table.offsets[-1])
    tensors = {"ids": table.ids[first:last], "offsets": table.offsets - first, "prompts": table.prompts}
    part = path.with_name(path.name + ".part")
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, part, metadata | {"end_id": str(table.end_id)}
    )
    part.replace(path)


def open_table(path: Path) -> tuple[TokenTable, dict[str, str]]:
    """Map a table and read the texts beside it; ``DataError`` when anything in the file is unsound."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            ids, offsets, prompts = (file.get_tensor(name) for name in ("ids", "offsets", "prompts"))
        table = TokenTable(ids, offsets, prompts, int(metadata["end_id"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path} is not a table of tokens ({error}): make it again") from error
    fault = _fault(table)
    if fault:
        raise DataError(f"{path} is a damaged table of tokens: {fault}; make it again")
    return table, metadata


def _fault(table: TokenTable) -> str:
    """Say what is unsound about a table, or nothing."""
    ids, offsets, prompts = table.ids, table.offsets, table.prompts
    found = [(tensor.dtype, tensor.dim()) for tensor in (ids, offsets, prompts)]
    if found != [(torch.int32, 1), (torch.int64, 1), (torch.int32, 1)]:
        return f"its tensors are {found}"
    if len(offsets) != len(prompts) + 1 or int(offsets[0]) != 0 or int(offsets[-1]) != len(ids):
        return f"sizes disagree: {len(ids)} ids, {len(offsets)} offsets, {len(prompts)} prompts"
    if len(prompts) and (int(prompts.min()) < 0 or not bool((table.lengths() > prompts).all())):
        return "offsets do not rise, or an example has no response"
    if len(ids) and min(int(ids.min()), table.end_id) < 0:
        return "a token is negative"
    return ""
