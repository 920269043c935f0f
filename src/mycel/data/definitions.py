"""Documented definitions of Python source files, as instructions to describe them.

The prompt shows where a definition stands, its signature and the first lines of its body; the response is the
first paragraph of its docstring. Files are parsed, never imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mycel.data.examples import Example
from mycel.data.modules import SourceFile

SIGNATURE_LIMIT = 140  # characters
CONTEXT_LINES = 3
CONTEXT_LIMIT = 140  # characters
RESPONSE_LIMIT = 220  # characters
SENTENCE_END = re.compile(r"[.!?](?=\s)")
WORD = re.compile(r"[A-Za-z]+")
WORDS_LEAST = 3

BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")  # where statements stand

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Definition:
    """A function or class that has a docstring.

    Attributes
    ----------
    module, owner, name : str
        Where it stands; ``owner`` is the class around it, or empty.
    signature : str
        Its head, decorators included, bounded.
    context : str
        The first lines of its body after the docstring, bounded.
    docstring : str
        The docstring, with common indentation removed.
    """

    module: str
    owner: str
    name: str
    signature: str
    context: str
    docstring: str


def documented(file: SourceFile) -> Iterator[tuple[Documented, str, str]]:
    """Every function and class that has a docstring, with the class around it and the docstring, in order."""
    pending: list[tuple[ast.AST, str]] = [(file.tree, "")]
    while pending:
        node, owner = pending.pop()
        if isinstance(node, Documented) and (docstring := ast.get_docstring(node)):
            yield node, owner, docstring
        inner = node.name if isinstance(node, ast.ClassDef) else owner
        for block in reversed(BLOCKS):
            pending.extend((child, inner) for child in reversed(getattr(node, block, ())))


def definitions(file: SourceFile) -> Iterator[Definition]:
    """Every documented function and class of a file, in the order of its source."""
    lines = file.text.splitlines()
    for node, owner, docstring in documented(file):
        context = _members(node) if isinstance(node, ast.ClassDef) else _opening(node, lines)
        yield Definition(file.module, owner, node.name, _signature(node), context, docstring)


def as_example(definition: Definition, label: str = "") -> Example | None:
    """Turn a definition into an instruction; ``None`` when its docstring says too little or is not prose."""
    response = summary(definition.docstring)
    if response is None:
        return None
    place = f"# {definition.module}, class {definition.owner}" if definition.owner else f"# {definition.module}"
    parts = [place, definition.signature]
    if definition.context:
        parts.append(definition.context)
    parts.append(
        f"# What is {definition.name} for?"
        if definition.signature.startswith("class ")
        else f"# What does {definition.name} do?"
    )
    return Example("\n".join(parts) + "\n", response, label)


def summary(docstring: str) -> str | None:
    """First paragraph of a docstring on one line, cut at the end of a sentence; ``None`` when it is not prose."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in docstring.split("\n\n", 2)[:2]]
    text = paragraphs[0]
    if len(WORD.findall(text)) < WORDS_LEAST and text.endswith("."):  # a heading: what it heads says what is meant
        text = " ".join(paragraphs)
    if len(text) > RESPONSE_LIMIT:
        ends = [match.end() for match in SENTENCE_END.finditer(text, 0, RESPONSE_LIMIT)]
        if not ends:
            return None
        text = text[: ends[-1]]
    letters = sum(character.isalpha() or character == " " for character in text)
    prose = text[:1].isalpha() and letters >= 0.75 * len(text) and ">>>" not in text
    return text if prose and len(WORD.findall(text)) >= WORDS_LEAST else None


def _members(node: ast.ClassDef) -> str:
    names = [inner.name for inner in node.body if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)]
    text = "    # has " + ", ".join(dict.fromkeys(names))
    if len(text) > CONTEXT_LIMIT:
        text = text[: CONTEXT_LIMIT - 5].rsplit(",", 1)[0] + ", ..."
    return text if names else ""


def _opening(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    if len(node.body) == 1:
        return ""
    first = node.body[1]
    start = min([first.lineno, *(mark.lineno for mark in getattr(first, "decorator_list", []))])
    kept: list[str] = []
    for line in lines[start - 1 : node.end_lineno]:
        text = line.removeprefix(" " * first.col_offset).rstrip()
        if not text.strip() or text.lstrip().startswith("#"):
            continue
        # A string block may be another definition's docstring, hence another example's response.
        if len(kept) == CONTEXT_LINES or sum(map(len, kept)) + len(text) > CONTEXT_LIMIT or '"""' in text:
            break
        kept.append("    " + text)
    return "\n".join(kept)


def _signature(node: Documented) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        head = f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    else:
        word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        head = f"{word} {node.name}({ast.unparse(node.args)}):"
    if len(head) > SIGNATURE_LIMIT:
        head = head[: SIGNATURE_LIMIT - 5].rsplit(",", 1)[0] + ", ...):"
    decorators = [
        f"@{ast.unparse(mark)}\n" for mark in node.decorator_list if isinstance(mark, ast.Name | ast.Attribute)
    ]
    return "".join(decorators) + head
