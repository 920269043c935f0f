"""Pieces of running text for pre-training: prose from docstrings and comments, code, the language reference."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator

from mycel.data.definitions import documented
from mycel.data.modules import SourceFile

PIECE = 1200  # characters that a piece has at most, unless it is one long line
COMMENT = re.compile(r"(?:^[ \t]*#(?!!).*\n){2,}", re.MULTILINE)


def pieces_of_code(file: SourceFile) -> Iterator[str]:
    """Split a file where its top-level definitions end, and gather the parts into pieces."""
    return gather(file.text.replace("\r\n", "\n").split("\n\n"), "\n\n")


def pieces_of_prose(file: SourceFile) -> Iterator[str]:
    """Whole docstrings of more than one paragraph, and comments of at least two lines that read as prose."""
    for _, _, docstring in documented(file):
        first, _, rest = docstring.partition("\n\n")
        if is_prose(rest):
            yield from gather([first, *rest.split("\n\n")], "\n\n")
    for block in COMMENT.findall(file.text):
        text = "\n".join(line.strip().lstrip("#").strip() for line in block.splitlines()).strip()
        if is_prose(text):
            yield from gather(text.split("\n\n"), "\n\n")


def pieces_of_table(file: SourceFile, left_out: set[str]) -> Iterator[str]:
    """Gather the paragraphs of each text in a module that is a table of texts, except under some keys."""
    for table in ast.walk(file.tree):
        if not isinstance(table, ast.Dict):
            continue
        for key, value in zip(table.keys, table.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and key.value not in left_out:
                yield from gather(str(value.value).split("\n\n"), "\n\n")


def gather(paragraphs: Iterable[str], separator: str) -> Iterator[str]:
    """Join neighbouring paragraphs into pieces of at most ``PIECE`` characters."""
    kept: list[str] = []
    length = 0
    for paragraph in paragraphs:
        if len(paragraph) > PIECE and "\n" in paragraph:
            if kept:
                yield separator.join(kept)
            kept, length = [], 0
            yield from gather(paragraph.split("\n"), "\n")
            continue
        if kept and length + len(paragraph) > PIECE:
            yield separator.join(kept)
            kept, length = [], 0
        if paragraph.strip():
            kept.append(paragraph.strip("\n"))
            length += len(paragraph)
    if kept:
        yield separator.join(kept)


def is_prose(text: str) -> bool:
    """Whether a text is mostly letters and spaces, and long enough to say something."""
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return len(text) >= 60 and letters >= 0.85 * len(text)
