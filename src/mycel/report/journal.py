"""What a door wrote down while it was open, read and checked: requests, and what happened beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mycel.errors import RunError

JOURNAL, OLDER = "requests.jsonl", "requests.1.jsonl"
MOST_BYTES = 1 << 30
SPANS = ("parse", "tokenise", "enter", "queue", "prefill", "decode", "detokenise", "generate", "send")
Text = Annotated[str, Field(max_length=1000)]
Count = Annotated[int, Field(ge=0, le=1 << 40)]


class _Line(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Served(_Line):
    """One choice of a request: moments in seconds after ``arrived``, tokens, and seconds of each part of its way."""

    arrived: float
    first: float | None = Field(None, ge=0)
    last: float | None = Field(None, ge=0)
    prompt: int = Field(ge=0)
    generated: int = Field(ge=0)
    whole: bool
    spans: dict[Text, float] = {}


class _Event(_Line):
    at: float


class Opened(_Event):
    """The door opened; ``shares`` are the heads of each rank, if blocks are shared out inside."""

    model: Text = ""
    shares: list[float] = []


class State(_Event):
    """How much was under way."""

    requests: Count
    pages: Count
    of: Count


class Holds(_Event):
    """A peer announced blocks ``first`` to ``last`` of so many."""

    peer: Text
    first: Count
    last: Count
    of: Count


class Gone(_Event):
    """A peer left."""

    peer: Text


class Lost(_Event):
    """A peer failed in the middle of answers: why, who took its place, and how many positions were sent again."""

    peer: Text
    first: Count
    last: Count
    why: Text = ""
    to: list[Text] = []
    positions: Count = 0


class Resumed(_Event):
    """Answers that had lost a peer went on after a pause, in seconds."""

    pause: float = Field(ge=0)


class Failed(_Event):
    """The engine failed, and gave so many requests up."""

    why: Text
    requests: Count = 0


class Refusals(_Event):
    """So many answers had a status that is none of success."""

    status: Count
    count: Count


KINDS: dict[str, type[_Event]] = {
    "opened": Opened,
    "state": State,
    "holds": Holds,
    "gone": Gone,
    "lost": Lost,
    "resumed": Resumed,
    "failed": Failed,
    "refused": Refusals,
}
Kind = TypeVar("Kind", bound=_Event)


class Journal(NamedTuple):
    """Requests and events, each in the order in which they were written."""

    served: list[Served]
    events: list[_Event]

    def of(self, kind: type[Kind]) -> list[Kind]:
        """Return the events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]


def read_journal(folder: Path) -> Journal:
    """Read a journal; a last line that was cut off is left out.

    Raises
    ------
    RunError
        The journal is missing, too long or damaged.
    """
    found = Journal([], [])
    if not (folder / JOURNAL).is_file():
        raise RunError(f"{folder} has no {JOURNAL}: is it a folder of `mycel serve --log`?")
    for name in (OLDER, JOURNAL):
        if (folder / name).is_file():
            _read(folder / name, found)
    return found


def _read(path: Path, into: Journal) -> None:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise RunError(f"{path} has more than {MOST_BYTES} bytes: report on a part of it")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read: {str(error)[:100]}") from error
    for number, line in enumerate(lines, 1):
        try:
            _take(json.loads(line), into)
        except (ValueError, TypeError, ValidationError, RecursionError) as error:
            if number < len(lines):
                raise RunError(f"line {number} of {path} is damaged: remove it") from error


def _take(content: Any, into: Journal) -> None:
    kind = content.get("event") if isinstance(content, dict) else None
    if kind is None:
        into.served.append(Served.model_validate(content))
    elif isinstance(kind, str) and kind in KINDS:
        into.events.append(KINDS[kind].model_validate(content))
