"""How good a model is: held-out loss and accuracy, generated text, and its overlap with references."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from mycel.data.tokens import TokenTable

IGNORED_LABEL = -100
GENERATION_BATCH = 32


@dataclass(frozen=True)
class Scores:
    """Sums over held-out tokens; sums of several parties add up to those of their union.

    Attributes
    ----------
    loss_sum : float
        Negative log-likelihood in nats.
    tokens, correct : int
        Response tokens scored, and those whose most likely prediction was right.
    """

    loss_sum: float = 0.0
    tokens: int = 0
    correct: int = 0

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood in nats per token; NaN without tokens."""
        return self.loss_sum / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """``exp(loss)``, infinite where that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def token_accuracy(self) -> float:
        """Share of tokens predicted right; NaN without tokens."""
        return self.correct / self.tokens if self.tokens else math.nan

    def __add__(self, other: Scores) -> Scores:
        return Scores(self.loss_sum + other.loss_sum, self.tokens + other.tokens, self.correct + other.correct)


def held_out(
    model: PreTrainedModel, table: TokenTable, *, pad_id: int, objective: str = "causal", batch_size: int = 16
) -> Scores:
    """Score ``model`` on every example of ``table``, teacher-forced.

    Parameters
    ----------
    model : PreTrainedModel
        With whatever trainable is active.
    table : TokenTable
        Held-out examples.
    pad_id : int
        Padding id.
    objective : {"causal", "seq2seq"}
        Whether labels continue the input or are the decoder's own.
    batch_size : int
        Examples per batch; changes speed only.
    """
    # Alike lengths together save padding; the order of the sum does not matter to what is measured.
    order = numpy.argsort(numpy.asarray(table.lengths()), kind="stable").tolist()
    total = Scores()
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            batch = table.batch(order[start : start + batch_size], pad_id, objective)
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            if objective == "seq2seq":
                logits, labels = model(**inputs, labels=batch.labels).logits, batch.labels
            else:
                logits, labels = model(**inputs, use_cache=False).logits[:, :-1], batch.labels[:, 1:]
            total += _score(logits, labels)
    return total


def generate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Continue every prompt greedily, batched with padding on the left; returns only what was generated.

    Parameters
    ----------
    model, tokenizer
        The model and its tokeniser.
    prompts : sequence of str
        Where to start.
    max_new_tokens : int
        Most tokens generated per prompt.
    """
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )
    texts: list[str] = []
    for start in range(0, len(prompts), GENERATION_BATCH):
        inputs = _encode(model, tokenizer, prompts[start : start + GENERATION_BATCH])
        with torch.no_grad():
            made: Any = model.generate(**inputs, generation_config=settings)
        begin = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        texts += tokenizer.batch_decode(made[:, begin:], skip_special_tokens=True)
    return texts


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean ROUGE-L F1, between 0 and 1."""
    _check_pairs(predictions, references)
    # Its imports cost over a second and half of a process's own memory: only who scores text pays.
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    scores = [
        scorer.score(reference, prediction)["rougeL"].fmeasure
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return float(sum(scores) / len(scores))


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of predictions equal to their reference, case and runs of whitespace aside."""
    _check_pairs(predictions, references)
    pairs = zip(predictions, references, strict=True)
    return sum(_plain(prediction) == _plain(reference) for prediction, reference in pairs) / len(references)


def _encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> dict[str, Tensor]:
    closed = model.config.is_encoder_decoder
    # An encoder-decoder is trained on prompts that end with the end of sequence; not every tokeniser adds it.
    # Nothing at all cannot be continued: an empty prompt starts as a text does.
    start = tokenizer.bos_token or tokenizer.eos_token
    texts = [prompt + tokenizer.eos_token if closed else prompt or start for prompt in prompts]
    encoded = tokenizer(texts, add_special_tokens=not closed, padding=True, padding_side="left", return_tensors="pt")
    return {key: encoded[key] for key in ("input_ids", "attention_mask")}


def _score(logits: Tensor, labels: Tensor) -> Scores:
    counted = labels != IGNORED_LABEL
    chosen, wanted = logits[counted].float(), labels[counted]
    if not wanted.numel():
        return Scores()
    losses = cross_entropy(chosen, wanted, reduction="none").double()
    return Scores(float(losses.sum()), int(wanted.numel()), int((chosen.argmax(-1) == wanted).sum()))


def _check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} references: give equally many, at least one"
        )


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().lower()
