from __future__ import annotations

import ast
import inspect
import json.decoder
import sysconfig
from itertools import combinations
from pathlib import Path

import pytest

from mycel.data import library
from mycel.data.definitions import RESPONSE_LIMIT, WORD, as_example, definitions, summary
from mycel.data.library import PRIVATE_DOMAINS, private_examples, public_examples, public_text
from mycel.data.modules import SourceFile, read_source, source_files
from mycel.data.prose import PIECE, pieces_of_code, pieces_of_prose, pieces_of_table
from mycel.errors import DataError

NEEDED = 400 + 48


@pytest.mark.parametrize("domain", PRIVATE_DOMAINS)
def test_each_domain_has_enough_unlike_examples(domain: str) -> None:
    examples = private_examples(domain)
    responses = [example.response.casefold() for example in examples]
    assert len(examples) >= NEEDED
    assert len(set(responses)) == len(responses)
    assert all(example.label == domain and example.prompt.endswith("\n") for example in examples)
    assert all(len(example.response) <= RESPONSE_LIMIT for example in examples)
    assert all(len(WORD.findall(example.response)) >= 3 for example in examples)


def test_a_response_is_the_beginning_of_the_real_docstring() -> None:
    (example,) = (e for e in private_examples("mail-and-parsing") if "def raw_decode(self, s, idx=" in e.prompt)
    docstring = inspect.getdoc(json.decoder.JSONDecoder.raw_decode)
    assert docstring is not None
    assert " ".join(docstring.split()).startswith(example.response)
    assert example.prompt.startswith("# json.decoder, class JSONDecoder\n")
    assert example.response not in example.prompt


def test_domains_share_no_module_and_little_vocabulary() -> None:
    for one, other in combinations(PRIVATE_DOMAINS, 2):
        assert not set(PRIVATE_DOMAINS[one]) & set(PRIVATE_DOMAINS[other])
    words = {
        domain: {word for example in private_examples(domain) for word in example.response.casefold().split()}
        for domain in PRIVATE_DOMAINS
    }
    for one, other in combinations(words, 2):
        assert len(words[one] & words[other]) < 0.5 * min(len(words[one]), len(words[other]))


def test_nothing_private_is_public() -> None:
    private = [example for domain in PRIVATE_DOMAINS for example in private_examples(domain)]
    public = public_examples()
    assert not {example.prompt for example in private} & {example.prompt for example in public}
    folded = {example.response.casefold() for example in private}
    assert not folded & {example.response.casefold() for example in public}
    pieces = set(public_text())
    assert not any(example.prompt + example.response in pieces for example in private)


def test_public_text_is_in_a_fixed_order_that_mixes_its_kinds() -> None:
    pieces = list(public_text())
    assert pieces == list(public_text())
    assert sum(map(len, pieces)) > 2_000_000
    formatted = {example.prompt + example.response for example in public_examples()}
    first, whole = ([piece in formatted for piece in part] for part in (pieces[:1500], pieces))
    assert sum(first) / len(first) == pytest.approx(sum(whole) / len(whole), rel=0.25)


def test_a_python_without_its_graphical_packages_still_has_six_domains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in Path(sysconfig.get_path("stdlib")).iterdir():
        if place.name not in ("tkinter", "idlelib", "turtledemo", "site-packages"):
            (tmp_path / place.name).symlink_to(place)
    monkeypatch.setattr(library, "_root", lambda: tmp_path)
    examples = private_examples("graphical-interfaces")
    assert len(examples) >= NEEDED
    assert any(example.prompt.startswith("# matplotlib.widgets") for example in examples)
    assert not any(example.prompt.startswith(("# tkinter", "# idlelib")) for example in examples)


def test_a_python_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_root", lambda: tmp_path)
    with pytest.raises(DataError, match=r"finds no source of asyncio, .* in .*: install Python with the \.py files"):
        private_examples("concurrency")


def test_an_unknown_domain_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="no domain 'cooking': use one of web, concurrency"):
        private_examples("cooking")


def test_no_member_s_docstring_stands_in_another_prompt() -> None:
    text = '''
class Kettle(Vessel):
    """A kettle that boils water."""

    def boil(self, seconds: float = 3) -> None:
        """Boil what is inside until steam comes."""
        def inner():
            """A secret that an inner function keeps."""
        return inner
'''
    file = SourceFile("kitchen", text, ast.parse(text))
    found = [example for definition in definitions(file) if (example := as_example(definition))]
    prompts = [example.prompt for example in found]
    assert prompts[0] == "# kitchen\nclass Kettle(Vessel):\n    # has boil\n# What is Kettle for?\n"
    assert prompts[1] == (
        "# kitchen, class Kettle\ndef boil(self, seconds: float=3):\n    def inner():\n# What does boil do?\n"
    )
    for one, other in combinations(found, 2):
        assert one.response not in other.prompt
        assert other.response not in one.prompt


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the\n   sum of two numbers.\n\nMore.", "Return the sum of two numbers."),
        ("Normal distribution.\n\nmu is the mean.", "Normal distribution. mu is the mean."),
        ("One sentence here. " + "word " * 60, "One sentence here."),
        ("word " * 60, None),
        ("a + b", None),
        (">>> print(1 + 1)", None),
        ("x.__hash__() <==> hash(x)", None),
        ("Hash.", None),
    ],
)
def test_summaries_are_prose_of_bounded_length(docstring: str, expected: str | None) -> None:
    assert summary(docstring) == expected


def test_files_that_are_not_python_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "coded.py").write_bytes('# coding: latin-1\nname = "é"\n'.encode("latin-1"))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text("x = 1\n")
    assert [file.module for file in source_files(tmp_path, lambda name: True)] == ["coded"]
    file = read_source(tmp_path / "coded.py", "coded")
    assert file is not None
    assert "é" in file.text


def test_prose_is_taken_from_comments_and_the_rest_of_docstrings() -> None:
    text = '''
# This comment runs over two lines and says in plain words
# what the code below is there to do for its readers.
x = 1
# short
def pour():
    """Pour the water.

    The water has to be hot before it is poured, or the tea will have no taste at all.
    """
'''
    file = SourceFile("kitchen", text, ast.parse(text))
    assert list(pieces_of_prose(file)) == [
        "Pour the water.\n\nThe water has to be hot before it is poured, or the tea will have no taste at all.",
        "This comment runs over two lines and says in plain words\nwhat the code below is there to do for its readers.",
    ]


def test_pieces_are_bounded_and_lose_no_line() -> None:
    text = "\n\n".join("\n".join(f"x{block}_{line} = {line}" for line in range(300)) for block in range(4)) + "\n"
    pieces = list(pieces_of_code(SourceFile("numbers", text, ast.parse(text))))
    assert all(len(piece) <= 1.1 * PIECE for piece in pieces)
    assert [line for piece in pieces for line in piece.split("\n") if line] == [
        line for line in text.split("\n") if line
    ]


def test_a_table_of_texts_leaves_out_what_it_is_told_to() -> None:
    text = "topics = {'kept': 'one\\n\\ntwo', 'debugger': 'three'}"
    assert list(pieces_of_table(SourceFile("topics", text, ast.parse(text)), {"debugger"})) == ["one\n\ntwo"]
