"""The built-in tokeniser: byte-level BPE, learnt on public text, so that no text is ever out of vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mycel.models.sizes import CONTEXT, SPECIAL_TOKENS, VOCABULARY


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary of 2,048 entries, special tokens ``<pad>``, ``<bos>``, ``<eos>`` first."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], window: int) -> Tensor:
    """Tokenise ``texts``, end each with ``<eos>``, and cut the stream into rows of ``window`` tokens.

    Returns
    -------
    Tensor
        int64 of shape (rows, window); at least one row, the stream repeated where it is shorter.
    """
    ends = [tokenizer.eos_token_id]
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    stream = torch.tensor(list(chain.from_iterable(ids + ends for ids in encoded)), dtype=torch.int64)
    if len(stream) < window:
        stream = stream.repeat(-(-window // len(stream)))
    rows = len(stream) // window
    return stream[: rows * window].view(rows, window)
