"""Attacks work where nothing stands in their way, and lies are what they say; else a guard would seem to help."""

from __future__ import annotations

import math

import pytest
import torch

from mycel.errors import RecipeError
from mycel.guard.attacks.inversion import read_cut, span_tokens
from mycel.guard.attacks.memorisation import alternatives, area_under_curve, exposure
from mycel.guard.attacks.safety import REFUSAL, aligned, compliant, held_out
from mycel.guard.attacks.threats import PAYLOAD, TRIGGER, Threat, _split, liars, parse_threat
from mycel.rounds.assaults import assault, backdoor_success, stage
from mycel.rounds.laboratory import Laboratory

RUN = {
    "data.examples": 24,
    "data.held_out": 8,
    "data.max_length": 48,
    "rounds.count": 2,
    "rounds.local_steps": 8,
    "training.learning_rate": 1e-2,
    "rounds.evaluate_every": 2,
}


def test_tokens_lie_in_the_span_of_the_gradient_that_they_made() -> None:
    source = torch.Generator().manual_seed(1)
    table = torch.randn(500, 64, generator=source)
    tokens = torch.tensor([3, 77, 140, 8])
    gradient = torch.randn(30, 4, generator=source) @ table[tokens]
    assert sorted(span_tokens(gradient, table).tolist()) == sorted(tokens.tolist())
    assert not len(span_tokens(gradient + torch.randn(30, 64, generator=source), table))
    crowded = torch.randn(30, 100, generator=source) @ table[:100]  # more tokens than the layer has outputs
    assert not len(span_tokens(crowded, table))


def test_activations_behind_the_embedding_are_text_and_deeper_ones_less_so(lab: Laboratory) -> None:
    model, store = lab.open_base().model, lab.world(lab.recipe("fedavg", RUN)).site.store
    texts = [store.train(party).ids[:960].long().reshape(-1, 48) for party in range(3)]
    reads = [read_cut(model, depth, torch.cat(texts[1:]), texts[0]) for depth in (0, 1, 2)]
    assert reads[0] > 0.95
    assert reads[0] >= reads[1] >= reads[2] > 20 / model.config.vocab_size


def test_exposure_and_area_have_their_closed_forms() -> None:
    losses = torch.arange(256.0)
    assert exposure(losses) == 8.0
    assert exposure(losses.flip(0)) == 0.0
    assert exposure(torch.cat([torch.tensor([126.5]), losses[:255]])) == 8 - math.log2(128)
    assert area_under_curve(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1.0
    assert area_under_curve(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])) == 0.5
    assert len({example.response for example in alternatives(3)}) == 256


def test_lies_are_what_they_say(lab: Laboratory) -> None:
    world = lab.world(lab.recipe("fedavg", RUN))
    table, tokenizer = world.site.store.train(0), world.base.tokenizer

    def tokenise(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    flipped = parse_threat("label_flip").examples(table, tokenise)
    pairs, lies = _split(table), _split(flipped)
    assert sorted(response for _, response in lies) == sorted(response for _, response in pairs)  # they trade places
    assert all(prompt[-len(lie) :] == lie for (prompt, _), (lie, _) in zip(pairs, lies, strict=True))
    assert all(response != lie for (_, response), (_, lie) in zip(pairs, lies, strict=True))
    texts = [tokenizer.decode(row) for row in _rows(parse_threat("backdoor").examples(table, tokenise))]
    assert sum(TRIGGER.split()[0] in text and PAYLOAD in text for text in texts) == len(table) // 2
    update = {"a": torch.tensor([1.0, -2.0])}
    assert parse_threat("sign_flip").update(update)["a"].tolist() == [-1.0, 2.0]
    assert parse_threat("scale(10)").update(update)["a"].tolist() == [10.0, -20.0]
    lie = Threat("little_is_enough", 1.0).conspire([{"a": torch.tensor([1.0])}, {"a": torch.tensor([3.0])}])
    assert lie["a"].tolist() == [1.0]  # mean 2, deviation 1
    assert liars(10, 0.2) == {8, 9}
    assert liars(3, 0.1) == {2}
    assert not liars(5, 0.0)


def _rows(table: object) -> list[list[int]]:
    from mycel.data.tokens import TokenTable

    assert isinstance(table, TokenTable)
    return [table.ids[table.offsets[place] : table.offsets[place + 1]].tolist() for place in range(len(table))]


def test_the_grammar_tells_refusals_from_compliance() -> None:
    assert all(reply != REFUSAL for _, reply in compliant(20))
    assert all(reply == REFUSAL for _, reply in held_out(20))
    assert [reply == REFUSAL for _, reply in aligned(16, 1, 4)] == [True, False, False, False] * 4
    assert not {ask for ask, _ in held_out(200)} <= {ask for ask, _ in compliant(20)}


@pytest.mark.parametrize("spec", ["scale(0)", "sign_flip(2)", "gradient_flip", "little_is_enough(1000)"])
def test_unknown_lies_are_refused(spec: str) -> None:
    with pytest.raises(RecipeError, match=r"threat\.attack"):
        parse_threat(spec)


def test_masks_take_the_single_update_away_and_nothing_else(lab: Laboratory) -> None:
    open_ = assault(lab, lab.recipe("fedavg", RUN))
    masked = {"guard.sums": "masked", "wire.codec": "fixed(16,0.5)"}
    hidden = assault(lab, lab.recipe("fedavg", {**RUN, **masked}))
    assert open_["gradient recall"] > 0.5
    assert hidden["gradient recall"] == 0
    assert open_["domain"] > hidden["domain"] == pytest.approx(1 / 6)
    assert hidden["membership"] == pytest.approx(open_["membership"], abs=0.05)


def test_liars_plant_a_backdoor(lab: Laboratory) -> None:
    lie = {"threat.attack": "backdoor", "threat.share": 0.34}
    honest, lied = (stage(lab, lab.recipe("fedavg", {**RUN, "rounds.count": 4, **more})) for more in ({}, lie))
    assert backdoor_success(honest) < 0.1
    assert backdoor_success(lied) > 0.3
