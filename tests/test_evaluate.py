"""Held-out scores against a plain loop, generation against one prompt at a time, metrics at their bounds."""

from __future__ import annotations

import math

import pytest
import torch

from mycel.data.examples import Example
from mycel.data.tokens import TokenTable
from mycel.evaluate.metrics import Scores, exact_match, generate_text, held_out, rouge_l
from mycel.models.base import Base
from mycel.models.trainable import build_trainable
from mycel.recipe.schema import TrainableSpec
from mycel.testing.bases import random_base
from mycel.testing.trainables import random_state

EXAMPLES = [
    Example("What is a party?\n", "One who keeps its data."),
    Example("", "Plain text has no prompt, and its first token is not predicted."),
    Example("Why?\n", "So that no line leaves."),
    Example("A much longer question than all of the others, is it not?\n", "Yes."),
    Example("Name a letter.\n", "a"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    torch.set_num_threads(1)
    return random_base(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def encoder_decoder(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return random_base(tmp_path_factory.mktemp("t5"), "t5")


def plain_causal(base: Base) -> Scores:
    """Score every example alone, without padding, from log-softmax."""
    loss, tokens, correct = 0.0, 0, 0
    for example in EXAMPLES:
        prompt = base.tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
        response = [
            *base.tokenizer(example.response, add_special_tokens=False)["input_ids"],
            base.tokenizer.eos_token_id,
        ]
        ids = [*prompt, *response]
        with torch.no_grad():
            chances = base.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(max(len(prompt), 1), len(ids)):
            loss -= float(chances[place - 1, ids[place]])
            correct += int(chances[place - 1].argmax()) == ids[place]
            tokens += 1
    return Scores(loss, tokens, correct)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_held_out_equals_a_plain_loop_at_any_batch_size(base: Base, batch_size: int) -> None:
    table = TokenTable.from_examples(EXAMPLES, base.tokenizer, 64)
    found = held_out(base.model, table, pad_id=0, batch_size=batch_size)
    expected = plain_causal(base)
    assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)
    assert (found.tokens, found.correct) == (expected.tokens, expected.correct)


def test_held_out_of_an_encoder_decoder_is_its_own_loss(encoder_decoder: Base) -> None:
    model = encoder_decoder.model
    table = TokenTable.from_examples(EXAMPLES[2:], encoder_decoder.tokenizer, 64)
    found = held_out(model, table, pad_id=0, objective="seq2seq", batch_size=2)
    batch = table.batch(range(len(table)), 0, "seq2seq")
    with torch.no_grad():
        expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    assert found.loss == pytest.approx(float(expected), rel=1e-5)
    assert found.tokens == batch.tokens()


def test_held_out_adds_up_over_parts(base: Base) -> None:
    table = TokenTable.from_examples(EXAMPLES, base.tokenizer, 64)
    parts = [held_out(base.model, table.slice(*bounds), pad_id=0) for bounds in ((0, 2), (2, 5))]
    whole, together = held_out(base.model, table, pad_id=0), parts[0] + parts[1]
    assert together.loss == pytest.approx(whole.loss, rel=1e-5)
    assert (together.tokens, together.correct) == (whole.tokens, whole.correct)


@pytest.mark.parametrize("kind", ["lora", "prompt", "full"])
def test_held_out_sees_the_active_trainable(base: Base, kind: str) -> None:
    table = TokenTable.from_examples(EXAMPLES, base.tokenizer, 48)
    trainable = build_trainable(TrainableSpec.model_validate({"kind": kind, "rank": 2, "length": 4}), base)
    trainable.load(random_state(trainable, 1))
    without = held_out(base.model, table, pad_id=0)
    with trainable.active():
        changed = held_out(base.model, table, pad_id=0)
    assert changed.tokens == without.tokens
    assert changed.loss_sum != without.loss_sum
    assert held_out(base.model, table, pad_id=0) == without


def test_scores_of_a_uniform_model(base: Base) -> None:
    table = TokenTable.from_examples(EXAMPLES, base.tokenizer, 64)
    full = build_trainable(TrainableSpec(kind="full"), base)
    full.load({name: torch.zeros_like(value) for name, value in full.state().items()})
    with full.active():
        scores = held_out(base.model, table, pad_id=0)
    rows = base.model.get_input_embeddings().weight.shape[0]
    assert scores.loss == pytest.approx(math.log(rows), rel=1e-5)
    assert scores.perplexity == pytest.approx(rows, rel=1e-4)


def test_scores_without_tokens_and_beyond_range() -> None:
    assert math.isnan(Scores().loss)
    assert math.isnan(Scores().token_accuracy)
    assert Scores(1e6, 1, 0).perplexity == math.inf
    assert Scores(2.0, 4, 1) + Scores() == Scores(2.0, 4, 1)
    assert Scores(2.0, 4, 1).token_accuracy == 0.25


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_batched_generation_equals_one_prompt_at_a_time(base: Base, encoder_decoder: Base, family: str) -> None:
    chosen = base if family == "llama" else encoder_decoder
    prompts = ["", "a", "a longer prompt", "the longest prompt of these"]
    alone = [generate_text(chosen.model, chosen.tokenizer, [prompt], 8)[0] for prompt in prompts]
    assert generate_text(chosen.model, chosen.tokenizer, prompts, 8) == alone
    assert any(alone)
    assert generate_text(chosen.model, chosen.tokenizer, [], 8) == []


def test_metrics_at_their_bounds() -> None:
    references = ["the cat sat on the mat", "a party keeps its data"]
    assert rouge_l(references, references) == 1.0
    assert rouge_l(["quite other words", "none in common"], references) == 0.0
    # Four of four words in order, of six: precision 1, recall 4/6.
    assert rouge_l(["the cat sat on"], references[:1]) == pytest.approx(0.8)
    assert exact_match(["  The cat\nsat on the mat", "a party"], references) == 0.5
    for metric in (rouge_l, exact_match):
        with pytest.raises(ValueError, match="equally many"):
            metric(["one"], references)
