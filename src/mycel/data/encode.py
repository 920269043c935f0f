"""From examples to token ids: prompt, response and end of sequence, cut to length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from mycel.data.examples import Example
from mycel.errors import DataError, ModelError

CHUNK = 1024  # examples tokenised in one call
PROMPT_SHARE = 0.25  # of the length, kept for the prompt's end when the response alone would fill it

Ids = NDArray[np.int32]


def encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> tuple[Ids, NDArray[np.int64], Ids, int]:
    """Return flat ids, the length of each example, the length of each prompt, and the end-of-sequence id."""
    end_id = tokenizer.eos_token_id
    if not isinstance(end_id, int):
        raise ModelError(f"the tokeniser {tokenizer.name_or_path!r} has no end-of-sequence token: give it one")
    begin = _beginning(tokenizer)
    pieces: list[Ids] = []
    lengths = np.zeros(len(examples), dtype=np.int64)
    prompts = np.zeros(len(examples), dtype=np.int32)
    for start in range(0, len(examples), CHUNK):
        chunk = examples[start : start + CHUNK]
        flat: list[int] = []
        for number, (prompt, response) in enumerate(_pairs(chunk, tokenizer), start):
            if not response:
                text = examples[number].response[:40]
                raise DataError(f"example {number + 1}: the response {text!r} has no token in the vocabulary")
            prompt, response = _cut(begin, prompt, [*response, end_id], max_length)
            flat += prompt
            flat += response
            prompts[number] = len(prompt)
            lengths[number] = len(prompt) + len(response)
        pieces.append(np.array(flat, dtype=np.int32))
    return np.concatenate(pieces) if pieces else np.empty(0, np.int32), lengths, prompts, end_id


def _beginning(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The beginning-of-sequence token, if this tokeniser starts texts with one."""
    ids = list(tokenizer("")["input_ids"])
    begins = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return ids[:1] if begins else []


def _pairs(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], list[int]]]:
    texts = [example.prompt for example in examples] + [example.response for example in examples]
    ids = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    return list(zip(ids[: len(examples)], ids[len(examples) :], strict=True))


def _cut(begin: list[int], prompt: list[int], response: list[int], max_length: int) -> tuple[list[int], list[int]]:
    """Cut the prompt from its left, then the response from its right."""
    room = max_length - len(begin)
    kept = min(len(prompt), max(room - len(response), int(PROMPT_SHARE * room)))
    return begin + prompt[len(prompt) - kept :], response[: room - kept]
