"""Pre-training data: the order of samples, packing, and cleaning at the party."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.data.cleaning import SPAN, Cleaner, Rules, language_of, shingles
from mycel.data.packing import packed_rows, table_of
from mycel.data.stream import sample_rows, stream_batches
from mycel.errors import DataError
from mycel.models.vocabulary import train_tokenizer

TEXTS = [
    f"A {word} line of text about {word}s and their kind, number {number}."
    for number, word in enumerate(["party", "island", "model", "token", "gradient"] * 4)
]
TOKENIZER = train_tokenizer(TEXTS)
SENTENCE = "the sea was calm and grey that morning while boats went out to fish for what could be sold"
WORDS = SENTENCE.split()


def document(seed: int, words: int = 150) -> str:
    chance = random.Random(seed)
    return " ".join(f"{chance.choice(WORDS)}{chance.randint(0, 99)}x" for _ in range(words)).replace("x", "")


@given(st.integers(1, 40), st.integers(0, 200), st.lists(st.integers(1, 30), max_size=5))
@settings(max_examples=50, deadline=None)
def test_a_stream_resumed_anywhere_goes_on_with_the_very_next_sample(rows: int, first: int, pieces: list[int]) -> None:
    whole = sample_rows(rows, first, sum(pieces), 7)
    place, found = first, [np.empty(0, np.int64)]
    for count in pieces:
        found.append(sample_rows(rows, place, count, 7))
        place += count
    assert np.array_equal(whole, np.concatenate(found))
    assert sorted(sample_rows(rows, 3 * rows, rows, 7)) == list(range(rows))


def test_rows_are_packed_without_padding_and_lose_only_the_end() -> None:
    rows = list(packed_rows(iter(TEXTS), TOKENIZER, 16))
    wanted = [token for text in TEXTS for token in [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]]
    assert np.concatenate(rows).tolist() == wanted[: len(rows) * 16]
    assert len(wanted) - len(rows) * 16 < 16
    table = table_of(rows, 2)
    batch = next(stream_batches(table, 3, 0, 1, 1, 0))
    assert batch.input_ids.shape == (3, 16)
    assert bool(batch.attention_mask.all())
    assert batch.tokens() == 3 * 15
    assert torch.equal(batch.labels[:, 1:], batch.input_ids[:, 1:])


def test_near_duplicates_go_and_unlike_documents_stay() -> None:
    pytest.importorskip("datasketch")
    base = [document(seed) for seed in range(30)]
    changed = [text.replace(text.split()[7], "elsewhere", 1) for text in base[:10]]
    alike = [
        len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b)) for a, b in zip(base, changed, strict=False)
    ]
    assert min(alike) > 0.8
    cleaner = Cleaner(Rules(letters=0.3, similarity=0.7))
    kept = list(cleaner.clean([*base, *changed]))
    assert kept == base
    assert cleaner.counts == {"kept": 30, "copy": 10}


def test_what_repeats_a_protected_text_is_found_wherever_it_stands() -> None:
    secret = document(99, 80)
    for shift in range(0, 40, 7):
        cleaner = Cleaner(Rules(letters=0.3, similarity=0.0), [secret])
        hidden = document(1) + " " + secret[shift : shift + 2 * SPAN] + " " + document(2)
        assert list(cleaner.clean([hidden, document(3)])) == [document(3)]
        assert cleaner.counts["protected"] == 1


def test_personal_data_is_masked_and_only_counts_leave() -> None:
    text = (
        "Write to ada.lovelace@example.org or call +44 20 7946 0958 from 192.168.0.1; the account is "
        "DE89 3704 0044 0532 0130 00 and the card 4111 1111 1111 1111, as agreed on page 12."
    )
    cleaner = Cleaner(Rules(similarity=0.0, letters=0.3))
    (kept,) = cleaner.clean([text])
    for private in ("ada", "7946", "192.168", "DE89", "4111"):
        assert private not in kept
    assert "page 12" in kept
    assert cleaner.counts["masked <email>"] == 1
    assert all(isinstance(count, int) for count in cleaner.counts.values())


def test_quality_and_language_rules_name_their_reasons() -> None:
    cleaner = Cleaner(Rules(language="en", similarity=0.0))
    noise = "0101 1101 0001 1110 1010 0110 1100 0111 0011 1001"
    chorus = "we sing the same line of the song\n" * 8
    german = "Das ist nicht die Sprache, die wir suchen, und der Text ist auf Deutsch mit vielen Wörtern."
    good = "This is the kind of text that we want to keep, as it is in the language of the model."
    assert list(cleaner.clean(["too short", noise, chorus, german, good])) == [good]
    assert cleaner.counts == {"short": 1, "letters": 1, "repeated": 1, "language": 1, "kept": 1}
    assert language_of(german) == "de"
    with pytest.raises(DataError, match="language"):
        Rules(language="xx")
    with pytest.raises(DataError, match="at least one row"):
        sample_rows(0, 0, 1, 1)
