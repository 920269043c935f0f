"""Training a built-in base on public text: well under a minute on two cores, once per machine.

The corpus is the part of the Python standard library that no private domain of the built-in data uses, so a party's
examples are new to the base, while their format is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
    get_cosine_schedule_with_warmup,
)

from mycel.data.examples import Example
from mycel.data.library import public_examples, public_text
from mycel.data.tokens import TokenTable
from mycel.models.base import Base, Progress, save_model
from mycel.models.sizes import Size
from mycel.models.vocabulary import pack, train_tokenizer

# Raised whenever a change below makes another model of the same corpus.
RECIPE_VERSION = 1
SEED = 20
# Each worker takes its share of every batch on one thread: one meeting point per step instead of one per operation,
# which keeps its pace on a busy machine, and the same order of summation on any.
WORKERS = 2
TOKENISER_CHARACTERS = 1_500_000
CHARACTERS_PER_TOKEN = 4
EXAMPLE_SHARE = 0.5  # of the rows: instructions, as a party's examples are written
WARMUP_SHARE = 0.05
TICK = 0.25  # seconds between reports while something long runs in the background

Inputs = dict[str, Tensor]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Corpus:
    """What a base is trained on: pieces of running text, and instructions with their answers."""

    texts: list[str]
    examples: list[Example]

    @classmethod
    def public(cls) -> Corpus:
        """Read the public part of the built-in corpus."""
        return cls(list(public_text()), public_examples())


def train_base(size: Size, folder: Path, progress: Progress, corpus: Corpus | None = None) -> None:
    """Train a base of this size and write it to ``folder`` in Hugging Face's format.

    Parameters
    ----------
    size : Size
        Shape and budget.
    folder : Path
        Where to write.
    progress : callable
        Called with (phase, done, total) at least twice a second.
    corpus : Corpus, optional
        What to train on; the public corpus by default.
    """
    read = corpus or _attended("reading the public corpus", progress, Corpus.public)
    with _reproducible():
        learn = partial(train_tokenizer, _first(read.texts, TOKENISER_CHARACTERS))
        tokenizer = _attended("learning the tokeniser", progress, learn)
        family = T5ForConditionalGeneration if size.family == "t5" else LlamaForCausalLM
        model = family(size.config())
        prepare = partial(_seq2seq_inputs if size.family == "t5" else _causal_inputs, size, tokenizer, read)
        inputs = _attended("tokenising", progress, prepare)
        _optimise(model, size, inputs, progress)
    save_model(Base(model.eval(), tokenizer, Path(), size.name), folder)


def _optimise(model: PreTrainedModel, size: Size, inputs: Iterator[Inputs], progress: Progress) -> None:
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=size.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP_SHARE * size.steps) + 1, size.steps + 1)
    model.train()
    with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as workers:
        for step in range(size.steps):
            progress("training the base", step, size.steps)
            batch = next(inputs)
            parts = [
                {name: rows[start::WORKERS].contiguous() for name, rows in batch.items()} for start in range(WORKERS)
            ]
            gradients = list(workers.map(partial(_gradients, model, weights), parts))
            for weight, *pieces in zip(weights, *gradients, strict=True):
                weight.grad = torch.stack(pieces).mean(0)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
    progress("training the base", size.steps, size.steps)


def _gradients(model: PreTrainedModel, weights: list[Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(model(**inputs).loss, weights)


def _causal_inputs(size: Size, tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> Iterator[Inputs]:
    """Packed rows, of running text and of instructions in a fixed proportion."""
    told = round(EXAMPLE_SHARE * size.batch_size)
    examples = [example.prompt + example.response for example in corpus.examples]
    shuffled = [examples[index] for index in torch.randperm(len(examples)).tolist()]
    read = _first(corpus.texts, size.steps * size.batch_size * size.window * CHARACTERS_PER_TOKEN)
    instructions = _endless(pack(tokenizer, shuffled, size.window), told)
    running = _endless(pack(tokenizer, read, size.window), size.batch_size - told)

    def batches() -> Iterator[Inputs]:
        while True:
            rows = torch.cat([next(running), next(instructions)])
            yield {"input_ids": rows, "labels": rows}

    return batches()


def _seq2seq_inputs(size: Size, tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> Iterator[Inputs]:
    """In turn: rows of running text to be continued, and instructions to be answered."""
    read = _first(corpus.texts, size.steps * size.batch_size * size.window * CHARACTERS_PER_TOKEN)
    running = _endless(pack(tokenizer, read, size.window), size.batch_size)
    table = TokenTable.from_examples(corpus.examples, tokenizer, size.window)
    chosen = _endless(torch.arange(len(corpus.examples)), size.batch_size)
    pad_id = int(tokenizer.pad_token_id)

    def batches() -> Iterator[Inputs]:
        while True:
            rows = next(running)
            cut = size.window // 2
            yield {"input_ids": rows[:, :cut], "labels": rows[:, cut:].contiguous()}
            batch = table.batch(next(chosen).tolist(), pad_id, "seq2seq")
            yield {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}

    return batches()


def _endless(rows: Tensor, count: int) -> Iterator[Tensor]:
    """Take ``count`` rows at a time, each once before any comes again."""
    order = torch.randperm(len(rows))
    while True:
        while len(order) < count:
            order = torch.cat([order, torch.randperm(len(rows))])
        yield rows[order[:count]]
        order = order[count:]


def _first(texts: list[str], characters: int) -> list[str]:
    left = characters

    def within(text: str) -> bool:
        nonlocal left
        left -= len(text)
        return left + len(text) > 0

    return list(takewhile(within, texts))


def _attended(phase: str, progress: Progress, work: Callable[[], Result]) -> Result:
    """Run something that cannot report by itself, and report while it runs."""
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(work)
        while True:
            progress(phase, 0, 1)
            try:
                result = future.result(timeout=TICK)
            except NotYet:
                continue
            progress(phase, 1, 1)
            return result


@contextmanager
def _reproducible() -> Iterator[None]:
    """Fix the seed and compute on one thread inside the block, and put both back."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
