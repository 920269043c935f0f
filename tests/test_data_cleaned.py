"""Cleaning named in a recipe: done where the text lies, before anything is tokenised; counts are all that leaves."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from mycel.data.cleaned import clean_examples, parse_cleaning
from mycel.data.cleaning import Rules
from mycel.data.examples import Example
from mycel.data.tokens import TokenStore
from mycel.errors import DataError, RecipeError
from mycel.federation.member import Membership
from mycel.models.base import find_base, open_base
from mycel.recipe.schema import Recipe
from mycel.run.execute import run_recipe
from small_runs import WORDS, small_recipe

RULES = ["quality", "copies(0.7)", "masks"]


def dirty(folder: Path) -> list[str]:
    """Write two parties' texts: ten good ones with an address each, two near-copies, one of hardly any letters."""
    paths = []
    for party in range(2):
        chance, path = random.Random(party), folder / f"party-{party}.jsonl"
        texts = [" ".join(chance.choices(WORDS, k=60)) + f" ask ada{index}@example.org" for index in range(16)]
        texts += [f"{text.replace('ask', 'tell')}" for text in texts[:2]] + ["0123 4567 " * 9]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        paths.append(str(path))
    return paths


def recipe(folder: Path) -> Recipe:
    changes = {"data.parties": dirty(folder), "data.cleaning": RULES, "data.max_length": 96, "rounds.count": 1}
    return small_recipe(folder / "unused", changes)


def test_a_run_cleans_at_the_party_and_shows_counts_alone(tmp_path: Path) -> None:
    wanted = recipe(tmp_path)
    result = run_recipe(wanted, tmp_path / "run")
    counts = {"copy": 2, "kept": 16, "letters": 1, "masked <email>": 16}
    assert result["cleaning"] == {"party-0": counts, "party-1": counts}
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert 'id="cleaning"' in page
    assert "letters 1" in page
    store = TokenStore.open(tmp_path / "run/work/tokens.safetensors")
    text = open_base(find_base("micro")).tokenizer.decode(store.pooled().ids)
    assert "<email>" in text
    assert "@" not in text
    assert all("@" not in path.read_text(encoding="utf-8") for path in (tmp_path / "run").glob("*.json*"))


def test_a_party_of_a_federation_cleans_its_own_file(tmp_path: Path) -> None:
    wanted = recipe(tmp_path)
    paths = wanted.data.parties
    member = Membership("clinic", Path(paths[0]), tmp_path / "home")
    party = member._examples(wanted)
    assert party.cleaned == {"copy": 2, "kept": 16, "letters": 1, "masked <email>": 16}
    assert all("@" not in example.response for example in (*party.train, *party.held_out))


def test_rules_are_what_a_recipe_names_and_nothing_more() -> None:
    assert parse_cleaning(["quality", "copies(0.8)", "masks"]) == Rules()
    assert parse_cleaning(["language(de)"]).language == "de"
    plain = [Example("", "7"), Example("", "7"), Example("ask", "me@example.org")]
    assert clean_examples(plain, [], "party") == (plain, {"kept": 3})
    kept, _ = clean_examples(plain, ["masks"], "party")
    assert kept[2] == Example("ask", "<email>")
    for spec in ("copies", "copies(2)", "language(xx)", "tidy", "masks(1)"):
        with pytest.raises(RecipeError, match="it knows 'quality'"):
            parse_cleaning([spec])
    with pytest.raises(DataError, match="leaves nothing of the data of 'party' \\(short 3\\)"):
        clean_examples(plain, ["quality"], "party")
