from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from mycel.data.examples import Example
from mycel.data.library import PRIVATE_DOMAINS
from mycel.data.parties import PartyData, load_parties
from mycel.errors import DataError
from mycel.recipe.schema import Data


def write(path: Path, examples: list[Example]) -> str:
    rows = ({"prompt": e.prompt, "response": e.response, "label": e.label} for e in examples)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def check_separation(parties: list[PartyData]) -> None:
    trained = {" ".join(e.response.casefold().split()) for party in parties for e in party.train}
    measured = {" ".join(e.response.casefold().split()) for party in parties for e in party.held_out}
    assert not trained & measured


def test_the_default_recipe_has_six_parties_with_all_they_need() -> None:
    parties = load_parties(Data(), seed=1)
    assert [party.name for party in parties] == list(PRIVATE_DOMAINS)
    assert {(len(party.train), len(party.held_out)) for party in parties} == {(400, 48)}
    assert all({e.label for e in party.train + party.held_out} == {party.name} for party in parties)
    check_separation(parties)
    assert load_parties(Data(), seed=1) == parties
    assert load_parties(Data(), seed=2) != parties


@settings(max_examples=40, deadline=None)
@given(
    pools=st.lists(
        st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20)), min_size=1, max_size=60), min_size=1, max_size=3
    ),
    held_out=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_nothing_held_out_is_trained_on_anywhere(
    tmp_path_factory: pytest.TempPathFactory, pools: list[list[tuple[int, int]]], held_out: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("pools")
    sources = [
        write(folder / f"pool{number}.jsonl", [Example(f"ask {ask}", f"Say {say}") for ask, say in pool])
        for number, pool in enumerate(pools)
    ]
    try:
        parties = load_parties(Data(parties=sources, held_out=held_out, examples=20), seed)
    except DataError:  # a drawn pool is too small to be split
        reject()
    for party in parties:
        assert len(party.held_out) == held_out
        assert 1 <= len(party.train) <= 20
        every = party.train + party.held_out
        assert len({(e.prompt, e.response) for e in every}) == len(every)
    pairs = {pair for pool in pools for pair in pool}
    if len(pairs) <= 4 * len({say for _, say in pairs}):
        check_separation(parties)
    trained = {(e.prompt, e.response) for party in parties for e in party.train}
    assert not trained & {(e.prompt, e.response) for party in parties for e in party.held_out}


def test_the_same_file_at_two_parties_leaks_nothing(tmp_path: Path) -> None:
    examples = [Example(f"ask {index}", f"answer number {index}") for index in range(40)]
    sources = [write(tmp_path / f"{name}.jsonl", examples) for name in ("one", "two")]
    parties = load_parties(Data(parties=sources, held_out=5), 3)
    check_separation(parties)


def test_a_classification_task_keeps_its_classes_on_both_sides(tmp_path: Path) -> None:
    examples = [Example(f"review {index}", ("good", "bad")[index % 2]) for index in range(60)]
    (party,) = load_parties(Data(parties=[write(tmp_path / "reviews.jsonl", examples)], held_out=10), 1)
    assert {e.response for e in party.train} == {e.response for e in party.held_out} == {"good", "bad"}
    assert len(party.train) == 50
    assert not {e.prompt for e in party.train} & {e.prompt for e in party.held_out}


def test_a_partition_of_a_file_names_its_parties(tmp_path: Path) -> None:
    examples = [Example(f"ask {index}", f"answer {index}", f"l{index % 3}") for index in range(90)]
    source = write(tmp_path / "rows.jsonl", examples)
    spread = load_parties(Data(source=source, parties="iid", count=3, held_out=4), 1)
    assert [party.name for party in spread] == ["party-0", "party-1", "party-2"]
    assert [len(party.train) for party in spread] == [26, 26, 26]
    (pooled,) = load_parties(Data(source=source, parties="pooled", held_out=4), 1)
    assert (pooled.name, len(pooled.train)) == ("pooled", 86)


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    sources = []
    for site in ("north", "south"):
        (tmp_path / site).mkdir()
        rows = [Example(f"{site} {index}", f"{site} answer {index}") for index in range(9)]
        sources.append(write(tmp_path / site / "notes.jsonl", rows))
    assert [party.name for party in load_parties(Data(parties=sources, held_out=2), 1)] == [
        "north-notes",
        "south-notes",
    ]
    with pytest.raises(DataError, match="2 sources that would both be called 'north-notes'"):
        load_parties(Data(parties=[sources[0], sources[0]], held_out=2), 1)


def test_too_few_examples_name_the_party_what_it_has_and_what_it_needs(tmp_path: Path) -> None:
    twice = [Example("ask", f"answer {index % 5}") for index in range(10)]
    source = write(tmp_path / "small.jsonl", twice)
    with pytest.raises(DataError, match="party 'small' has 5 unlike examples, and needs 9: 8 held out and 1 to train"):
        load_parties(Data(parties=[source], held_out=8), 1)


def test_a_party_whose_every_response_is_held_out_elsewhere_is_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [Example(f"a {index}", f"answer {index % 2}") for index in range(4)])
    with pytest.raises(DataError, match="party 'one' has none whose response is not also held out, and needs 4"):
        load_parties(Data(parties=[one], held_out=3), 2)


def test_no_parties_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.parties is an empty list"):
        load_parties(Data(parties=[]), 1)
