from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.data.examples import Example
from mycel.data.sources import PASSAGE, load_examples
from mycel.errors import DataError


def write_jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "response": "r"}, Example("p", "r")),
        ({"prompt": "p", "response": "r", "label": "x", "other": [1]}, Example("p", "r", "x")),
        ({"instruction": "i", "output": "o"}, Example("i\n", "o")),
        ({"instruction": "i", "input": "n", "output": "o", "label": 3}, Example("i\nn\n", "o", "3")),
        ({"question": "q", "answer": "a", "label": None}, Example("q\n", "a")),
        ({"text": "plain"}, Example("", "plain")),
    ],
)
def test_the_accepted_columns_read_alike_from_jsonl_and_parquet(
    tmp_path: Path, row: dict[str, object], expected: Example
) -> None:
    jsonl = write_jsonl(tmp_path / "rows.jsonl", row, row)
    parquet = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), parquet)
    assert load_examples(jsonl) == load_examples(str(parquet)) == [expected, expected]


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.text(), st.text().filter(str.strip)), min_size=1, max_size=5))
def test_any_text_survives_jsonl(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.mktemp("any") / "rows.jsonl"
    source = write_jsonl(path, *({"prompt": prompt, "response": response} for prompt, response in rows))
    assert load_examples(source) == [Example(prompt, response) for prompt, response in rows]


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=80) | st.text('{}[]":,prompt response text\\ud800\n', max_size=60).map(str.encode))
def test_no_bytes_raise_anything_but_a_data_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "rows.jsonl"
    path.write_bytes(content)
    try:
        examples = load_examples(str(path))
    except DataError:
        return
    assert all(example.response.strip() for example in examples)


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    assert [example.response for example in load_examples(str(path))] == ["one", "two"]


def test_rows_without_a_response_are_passed_over(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", {"text": " "}, {"text": None}, {"text": "kept"})
    assert load_examples(source) == [Example("", "kept")]


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\nnot json\n')
    assert [example.response for example in load_examples(str(path), limit=2)] == ["one", "two"]


def test_a_folder_of_text_is_cut_into_passages_that_lose_no_word(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    paragraphs = [" ".join(f"word{number}-{index}" for index in range(40)) for number in range(12)]
    (tmp_path / "letters" / "one.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    (tmp_path / "two.md").write_text(" ".join(f"long{index}" for index in range(500)), encoding="utf-8")
    (tmp_path / "three.csv").write_text("not,read\n")
    examples = load_examples(str(tmp_path))
    assert {example.label for example in examples} == {"letters", ""}
    words = " ".join(example.response for example in examples).split()
    assert words == [word for part in paragraphs for word in part.split()] + [f"long{index}" for index in range(500)]
    assert all(example.prompt == "" and len(example.response) < 2 * PASSAGE + 400 for example in examples)


def test_the_built_in_source_holds_all_six_domains() -> None:
    examples = load_examples("python-library")
    assert len({example.label for example in examples}) == 6


BAD_LINES = [
    (b'{"text": "fine"}\n{"text": \n', r"rows\.jsonl, line 2: not JSON .*every line must be one JSON object"),
    (b'{"text": "fine"}\n[1, 2]\n', r"line 2: a JSON list, where an object with columns is needed"),
    (b'{"text": "fine"}\n\n{"text": "caf\xe9"}\n', r"rows\.jsonl, line 3: byte 0xe9 is not UTF-8: save the file"),
    (b'{"title": "x"}\n', r"line 1: the columns are 'title'; needed are prompt and response, .*or text"),
    (b'{"prompt": "x", "response": "y"}\n{"response": "y"}\n', r"line 2: the columns are 'response'; needed are"),
    (b'{"text": 7}\n', r"line 1: text is int, where text is needed"),
    (b'{"text": "x", "label": 0.5}\n', r"line 1: label is float, where text or a whole number will do"),
    (b'{"text": "\\ud800"}\n', r"line 1: text has half of a surrogate pair at character 0"),
    (b"[" * 100_000 + b"\n", r"line 1: not JSON"),
    (b"", r"rows\.jsonl is empty: it holds no example with a response"),
    (b'{"text": ""}\n', r"rows\.jsonl is empty"),
]


@pytest.mark.parametrize(("content", "sentence"), BAD_LINES)
def test_bad_lines_are_refused_by_number(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        load_examples(str(tmp_path / "rows.jsonl"))


def test_wrong_encoding_in_a_folder_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("plain\ncafé\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt, line 2: byte 0xe9 is not UTF-8"):
        load_examples(str(tmp_path))


def test_an_endless_line_is_refused_before_it_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 28)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="line 1: more than 16 MiB long"):
            load_examples(str(path))
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
def test_corrupt_parquet_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 50, "b"]}), path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "text": b"text\n" * 20}[damage])
    with pytest.raises(DataError, match=r"rows\.parquet is not a sound Parquet file: "):
        load_examples(str(path))


def test_parquet_without_the_columns_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"title": ["a"]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet: the columns are 'title'; needed are"):
        load_examples(str(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        DataError,
        match=rf"there is no file .*{name}: (a data\.source|it) is \"python-library\", \"python-text\", a \.jsonl",
    ):
        load_examples(str(tmp_path / name))


def test_an_empty_folder_and_a_stray_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the folder .* has no \.txt or \.md file"):
        load_examples(str(tmp_path))
    (tmp_path / "sheet.xls").write_text("x")
    with pytest.raises(DataError, match=r"sheet\.xls is not a kind of file that is read"):
        load_examples(str(tmp_path / "sheet.xls"))


@pytest.mark.parametrize("source", ["nonsense", "../up/one", "", "a/b/c", "org/na me", "x" * 5000, "nul\0l"])
def test_what_is_no_source_is_refused(source: str) -> None:
    with pytest.raises(DataError, match=r"(a data\.source|it) is \"python-library\""):
        load_examples(source)


def test_a_hub_id_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    # The library's own offline mode: what follows is its real refusal, on machines with and without a network.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="no file or folder 'org/name' here, and the Hugging Face dataset") as refused:
        load_examples("org/name:test")
    assert "split 'test'" in str(refused.value)
    assert "\n" not in str(refused.value)
