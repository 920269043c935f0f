from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mycel.data.examples import Example
from mycel.data.parties import PartyData
from mycel.data.tokens import TokenStore, TokenTable, batches
from mycel.errors import DataError, ModelError

PAD, BOS, EOS = 0, 1, 2


def byte_tokenizer(eos: bool = True, begins: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, special tokens first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if begins:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>" if eos else None
    )


TOKENIZER = byte_tokenizer()
TEXTS = st.text(st.characters(codec="utf-8"), max_size=30)
EXAMPLES = st.lists(st.builds(Example, TEXTS, TEXTS.filter(bool)), min_size=1, max_size=8)


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def numbered(count: int) -> list[Example]:
    return [Example("p" * (1 + index % 7), f"{index}" * (1 + index % 5)) for index in range(count)]


@settings(max_examples=100, deadline=None)
@given(examples=EXAMPLES, max_length=st.integers(8, 80))
def test_a_row_is_the_prompt_s_end_the_response_s_start_and_the_end_token(
    examples: list[Example], max_length: int
) -> None:
    table = TokenTable.from_examples(examples, TOKENIZER, max_length)
    assert len(table) == len(examples)
    batch = table.batch(range(len(table)), PAD)
    for row, example in enumerate(examples):
        prompt, response = ids_of(example.prompt), [*ids_of(example.response), EOS]
        ids = batch.input_ids[row][batch.attention_mask[row].bool()].tolist()
        labels = batch.labels[row].tolist()
        assert len(ids) == int(table.lengths()[row]) == min(max_length, len(prompt) + len(response))
        kept = int(table.prompts[row])
        assert ids[:kept] == prompt[len(prompt) - kept :]
        assert ids[kept:] == response[: len(ids) - kept]
        assert len(ids) - kept >= 1
        learnt = [position for position, label in enumerate(labels) if label != -100]
        assert learnt == list(range(max(kept, 1), len(ids)))
        assert all(labels[position] == ids[position] for position in learnt)
        assert batch.input_ids[row, len(ids) :].tolist() == [PAD] * (batch.input_ids.shape[1] - len(ids))
    assert batch.input_ids.shape[1] == int(table.lengths().max())
    assert batch.tokens() == int((batch.labels != -100).sum())


@settings(max_examples=50, deadline=None)
@given(examples=EXAMPLES)
def test_sequence_to_sequence_puts_the_prompt_in_and_the_response_out(examples: list[Example]) -> None:
    batch = TokenTable.from_examples(examples, TOKENIZER, 512).batch(range(len(examples)), PAD, "seq2seq")
    for row, example in enumerate(examples):
        assert batch.input_ids[row][batch.attention_mask[row].bool()].tolist() == [*ids_of(example.prompt), EOS]
        labels = batch.labels[row]
        assert labels[labels != -100].tolist() == [*ids_of(example.response), EOS]


def test_a_long_response_leaves_the_prompt_a_quarter_and_no_end_token() -> None:
    table = TokenTable.from_examples([Example("a" * 50, "b" * 500)], TOKENIZER, 40)
    ids = table.batch([0], PAD).input_ids[0].tolist()
    assert ids == ids_of("a" * 10 + "b" * 30)


def test_a_long_prompt_yields_to_a_short_response() -> None:
    table = TokenTable.from_examples([Example("x" * 50 + "y" * 9, "bbb")], TOKENIZER, 13)
    assert table.batch([0], PAD).input_ids[0].tolist() == [*ids_of("y" * 9 + "bbb"), EOS]


def test_a_tokeniser_that_begins_its_texts_begins_every_row() -> None:
    table = TokenTable.from_examples([Example("p" * 90, "r"), Example("", "rr")], byte_tokenizer(begins=True), 16)
    batch = table.batch([0, 1], PAD)
    assert batch.input_ids[:, 0].tolist() == [BOS, BOS]
    assert int(table.lengths()[0]) == 16
    assert batch.labels[1][:4].tolist() == [-100, *ids_of("rr"), EOS]


def test_a_slice_is_a_view_of_the_same_memory() -> None:
    table = TokenTable.from_examples(numbered(20), TOKENIZER, 64)
    part = table.slice(5, 12).slice(2, 4)
    assert part.ids.data_ptr() == table.ids.data_ptr()
    assert torch.equal(part.batch([0, 1], PAD).input_ids, table.batch([7, 8], PAD).input_ids)
    assert len(table.slice(3, 3)) == 0
    with pytest.raises(DataError, match="a table of 7 examples has no part from 2 to 9"):
        table.slice(5, 12).slice(2, 9)


@pytest.mark.parametrize("indices", [[], [-1], [3]])
def test_indices_outside_the_table_are_refused(indices: list[int]) -> None:
    with pytest.raises(DataError, match="a batch needs indices between 0 and 2"):
        TokenTable.from_examples(numbered(3), TOKENIZER, 64).batch(indices, PAD)


def test_a_table_survives_its_file_even_as_a_slice(tmp_path: Path) -> None:
    table = TokenTable.from_examples(numbered(30), TOKENIZER, 64).slice(10, 25)
    table.save(tmp_path / "table.safetensors")
    found = TokenTable.open(tmp_path / "table.safetensors")
    for objective in ("causal", "seq2seq"):
        ours, theirs = (part.batch(range(15), PAD, objective) for part in (table, found))
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert torch.equal(ours.labels, theirs.labels)
    assert list(tmp_path.iterdir()) == [tmp_path / "table.safetensors"]


def test_an_opened_table_is_mapped_not_read(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    TokenTable.from_examples(numbered(3), TOKENIZER, 64).save(path)
    table = TokenTable.open(path)
    ranges = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line
    ]
    assert any(int(low, 16) <= table.ids.data_ptr() < int(high, 16) for low, high in ranges)


def test_a_store_gives_each_party_its_own_and_pools_only_training(tmp_path: Path) -> None:
    examples = numbered(60)
    parties = [
        PartyData("north", examples[:10], examples[10:14]),
        PartyData("süd", examples[14:15], examples[15:20]),
        PartyData("west", examples[20:50], examples[50:60]),
    ]
    TokenStore.build(parties, TOKENIZER, 64).save(tmp_path / "store.safetensors")
    store = TokenStore.open(tmp_path / "store.safetensors")
    assert (store.names, len(store)) == (("north", "süd", "west"), 3)
    for index, party in enumerate(parties):
        for found, held in ((store.train(index), party.train), (store.held_out(index), party.held_out)):
            wanted = TokenTable.from_examples(held, TOKENIZER, 64).batch(range(len(held)), PAD)
            assert torch.equal(found.batch(range(len(found)), PAD).input_ids, wanted.input_ids)
    everything = [example for party in parties for example in party.train]
    wanted = TokenTable.from_examples(everything, TOKENIZER, 64).batch(range(41), PAD)
    assert torch.equal(store.pooled().batch(range(41), PAD).labels, wanted.labels)
    with pytest.raises(DataError, match="there is no party 3: the store holds parties 0 to 2"):
        store.train(3)


def tampered(path: Path, **changes: torch.Tensor) -> None:
    TokenTable.from_examples(numbered(4), TOKENIZER, 64).save(path)
    save_file(load_file(path) | changes, path, {"end_id": "2"})


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"ids": torch.tensor([3, -1], dtype=torch.int32)}, "sizes disagree"),
        ({"offsets": torch.tensor([0, 9, 5, 12, 22])}, "offsets do not rise|sizes disagree"),
        ({"offsets": torch.tensor([1, 2])}, "sizes disagree"),
        ({"prompts": torch.tensor([1, 99, 1, 1], dtype=torch.int32)}, "an example has no response"),
        ({"prompts": torch.tensor([1, -1, 1, 1], dtype=torch.int32)}, "offsets do not rise"),
        ({"ids": torch.zeros(3)}, "its tensors are"),
        (
            {"offsets": torch.zeros(0, dtype=torch.int64), "prompts": torch.zeros(0, dtype=torch.int32)},
            "sizes disagree",
        ),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, changes: dict[str, torch.Tensor], fault: str) -> None:
    tampered(tmp_path / "table.safetensors", **changes)
    with pytest.raises(DataError, match=f"is a damaged table of tokens: .*({fault})"):
        TokenTable.open(tmp_path / "table.safetensors")


def test_a_negative_token_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    tampered(path)
    ids = load_file(path)["ids"].clone()
    ids[2] = -5
    tampered(path, ids=ids)
    with pytest.raises(DataError, match="a token is negative"):
        TokenTable.open(path)


def test_a_file_cut_short_at_any_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.safetensors"
    TokenStore.build([PartyData("one", numbered(2), numbered(1))], TOKENIZER, 64).save(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"store\.safetensors is not a table of tokens"):
            TokenStore.open(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(DataError, match="is not a table of tokens"):
            TokenTable.open(path)


@pytest.mark.parametrize(
    ("names", "bounds"),
    [(["a"], [0, 2]), (["a"], [0, 5, 4]), (["a"], [0, 1, 9]), (["a"], [1, 2, 4]), ([1], [0, 2, 4]), ("a", [0, 2, 4])],
)
def test_a_store_whose_parties_do_not_fit_is_refused(tmp_path: Path, names: object, bounds: object) -> None:
    path = tmp_path / "store.safetensors"
    tampered(path)
    save_file(load_file(path), path, {"end_id": "2", "names": json.dumps(names), "bounds": json.dumps(bounds)})
    with pytest.raises(DataError, match="its parties do not fit its 4 examples"):
        TokenStore.open(path)


def test_a_table_is_no_store(tmp_path: Path) -> None:
    tampered(tmp_path / "table.safetensors")
    with pytest.raises(DataError, match="holds tokens but names no parties"):
        TokenStore.open(tmp_path / "table.safetensors")


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 9), steps=st.integers(0, 30), seed=st.integers(0, 2**63 - 1))
def test_every_example_comes_as_often_as_any_other(count: int, batch_size: int, steps: int, seed: int) -> None:
    examples = [Example(f"{index:02}", "r" * (1 + index % 6)) for index in range(count)]
    table = TokenTable.from_examples(examples, TOKENIZER, 64)
    found = list(batches(table, batch_size, steps, seed, PAD, "causal"))
    assert len(found) == steps
    assert all(batch.input_ids.shape[0] == batch_size for batch in found)
    seen = Counter(tuple(row[:2].tolist()) for batch in found for row in batch.input_ids)
    uses = [seen[tuple(ids_of(example.prompt))] for example in examples]
    assert sum(uses) == steps * batch_size
    assert max(uses) - min(uses) <= 1
    again = batches(table, batch_size, steps, seed, PAD, "causal")
    assert all(torch.equal(one.input_ids, two.input_ids) for one, two in zip(found, again, strict=True))


def test_batches_of_another_seed_differ() -> None:
    table = TokenTable.from_examples(numbered(64), TOKENIZER, 64)
    one, two = (next(batches(table, 8, 1, seed, PAD, "causal")).input_ids for seed in (1, 2))
    assert one.shape != two.shape or not torch.equal(one, two)


def test_long_and_short_examples_are_equally_likely_to_come_first() -> None:
    examples = [Example("p", "r" * (1 + index)) for index in range(16)]
    table = TokenTable.from_examples(examples, TOKENIZER, 64)
    first = [next(batches(table, 4, 4, seed, PAD, "causal")).attention_mask.sum(dim=1) for seed in range(400)]
    counts = Counter(int(length) for lengths in first for length in lengths)
    assert set(counts) == set(range(3, 19))
    # 400 draws of 4 in 16 give each example a binomial count of mean 100 and deviation below 9.
    assert all(60 < count < 140 for count in counts.values())


def test_grouping_by_length_saves_padding() -> None:
    examples = [Example("p", "r" * (1 + 7 * index % 60)) for index in range(240)]
    table = TokenTable.from_examples(examples, TOKENIZER, 64)
    grouped = sum(batch.input_ids.numel() for batch in islice(batches(table, 8, 30, 1, PAD, "causal"), 30))
    order = torch.randperm(240, generator=torch.Generator().manual_seed(1)).tolist()
    plain = sum(table.batch(order[start : start + 8], PAD).input_ids.numel() for start in range(0, 240, 8))
    assert grouped < 0.8 * plain


def test_an_empty_table_makes_no_batches() -> None:
    table = TokenTable.from_examples(numbered(2), TOKENIZER, 64).slice(0, 0)
    with pytest.raises(DataError, match="without examples"):
        next(batches(table, 2, 1, 0, PAD, "causal"))


def test_a_tokeniser_without_an_end_and_a_response_without_tokens_are_refused() -> None:
    with pytest.raises(ModelError, match="has no end-of-sequence token: give it one"):
        TokenTable.from_examples(numbered(1), byte_tokenizer(eos=False), 64)
    with pytest.raises(DataError, match="example 2: the response '' has no token in the vocabulary"):
        TokenTable.from_examples([Example("a", "b"), Example("a", "")], TOKENIZER, 64)


def test_no_examples_make_an_empty_table() -> None:
    table = TokenTable.from_examples([], TOKENIZER, 64)
    assert (len(table), table.offsets.tolist()) == (0, [0])
