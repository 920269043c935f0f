"""Which columns of a table are the prompt, the response and the label."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mycel.data.examples import Example
from mycel.errors import DataError

ACCEPTED = "prompt and response, instruction (and input) and output, question and answer, or text; and optionally label"


@dataclass(frozen=True)
class Columns:
    """The columns an example is made of.

    Attributes
    ----------
    prompt, response : str
        Names of the columns; the prompt's is empty for plain text.
    extra : str
        Name of a column whose text follows the prompt, on a line of its own, in the rows that have it.
    verbatim : bool
        Whether the prompt is used as it stands; otherwise a line end closes it.
    """

    prompt: str
    response: str
    extra: str = ""
    verbatim: bool = False

    @staticmethod
    def find(names: Iterable[str], where: str) -> Columns:
        """Choose among a row's columns; ``where`` names the row or table in the error."""
        found = list(names)
        for columns in KNOWN:
            if columns.fits(found):
                return columns
        listed = ", ".join(repr(name) for name in found[:12]) or "none"
        raise DataError(f"{where}: the columns are {listed}; needed are {ACCEPTED}")

    def fits(self, names: Container[str]) -> bool:
        """Whether a row with columns of these ``names`` has those that are needed."""
        return self.response in names and (not self.prompt or self.prompt in names)

    def example(self, row: Mapping[str, Any], where: str) -> Example | None:
        """Make an example of a row; ``None`` when there is nothing to learn in it."""
        parts = [text_of(row, name, where) for name in (self.prompt, self.extra) if name]
        prompt = "\n".join(part for part in parts if part)
        response = text_of(row, self.response, where)
        label = row.get("label")
        if label is not None and not isinstance(label, str | int):
            raise DataError(f"{where}: label is {type(label).__name__}, where text or a whole number will do")
        if not response.strip():
            return None
        if prompt and not self.verbatim:
            prompt += "\n"
        return Example(prompt, response, "" if label is None else str(label))


def text_of(row: Mapping[str, Any], name: str, where: str) -> str:
    """Text in a column; a missing or empty one is the empty text."""
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {type(value).__name__}, where text is needed")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {name} has half of a surrogate pair at character {error.start}, which is no text"
        ) from error
    return value


KNOWN = (
    Columns("prompt", "response", verbatim=True),
    Columns("instruction", "output", extra="input"),
    Columns("question", "answer"),
    Columns("", "text"),
)
