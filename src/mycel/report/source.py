"""What a run folder holds, read with care: ``result.json`` and ``events.jsonl``.

Both files may come from another machine, so their size is bounded and their shape is checked before anything
is drawn. Unknown keys and unknown events are ignored: a newer run can still be read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mycel.errors import RunError

RESULT_LIMIT = 1 << 28
"""Largest ``result.json`` that is read, in bytes."""
LINE_LIMIT = 1 << 20
"""Longest line of ``events.jsonl`` that is read, in characters."""

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Part(BaseModel):
    """A part of a result: frozen, and deaf to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Party(Part):
    """One party, its data and its device."""

    name: str
    samples: Count
    tokens: Count
    rank: int | None = None
    device: str = ""


class Round(Part):
    """What one round cost and reached.

    Bytes and answers are those of this round; ``virtual_seconds`` is the clock when it ended, and ``dropped`` counts
    from the beginning of the run.
    """

    round: Count
    loss: float | None = None
    bytes_up: Count
    bytes_down: Count
    virtual_seconds: Seconds
    answers: Count = 0
    dropped: Count = 0


class Final(Part):
    """Held-out quality of the final state; loss in nats per token, ``None`` if it diverged."""

    loss: float | None = None
    perplexity: float | None = None
    token_accuracy: float | None = None


class Mixture(Part):
    """Loss of each arm on the union of every party's held-out text, in nats per token."""

    base: float | None = None
    local_only_mean: float | None = None
    federated: float | None = None
    personal_mean: float | None = None
    centralised: float | None = None


class Own(Part):
    """Mean over parties of the loss on the party's own held-out text, in nats per token."""

    base_mean: float | None = None
    local_only_mean: float | None = None
    federated_mean: float | None = None
    personal_mean: float | None = None
    centralised_mean: float | None = None


class Scores(Part):
    """Loss of each arm on one party's own held-out text, in nats per token."""

    base: float | None = None
    local_only: float | None = None
    federated: float | None = None
    centralised: float | None = None
    personal: float | None = None


class Finals(Final):
    """Everything measured at the end of a run."""

    mixture: Mixture = Mixture()
    own: Own = Own()
    per_party: dict[str, Scores] = {}


class Traffic(Part):
    """Serialised bytes towards the coordinator and away from it."""

    up: Count = 0
    down: Count = 0


class Bytes(Traffic):
    """Serialised bytes of the whole run, by party and by purpose."""

    per_party: dict[str, Traffic] = {}
    by_purpose: dict[str, Traffic] = {}


class Dropped(Part):
    """Answers that were not used, by reason, and attempts at rounds whose hidden sum could not be opened."""

    late: Count = 0
    invalid: Count = 0
    lost: Count = 0
    abandoned: Count = 0


class Moment(Part):
    """One point of an arm's curve: what it had spent when it had this held-out loss."""

    steps: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    bytes: Count
    virtual_seconds: Seconds
    loss: float | None = None


class Way(Part):
    """One arm of a run: what it reached, and what for."""

    system: str = ""
    loss: float | None = None
    bytes: Count = 0
    virtual_seconds: Seconds = 0.0
    curve: list[Moment] = []


class Result(Part):
    """The whole of ``result.json``."""

    title: str = ""
    system: str
    recipe: dict[str, Any] = {}
    seed: int
    parties: list[Party]
    rounds: list[Round] = []
    final: Finals
    bytes: Bytes
    dropped: Dropped = Dropped()
    left_out: str = ""
    state_sha256: str = ""
    seconds: Seconds = 0.0
    virtual_seconds: Seconds = 0.0
    step_seconds: Seconds | None = None
    predicted: dict[str, Any] | None = None
    arms: dict[str, Way] = {}
    guard: dict[str, Any] = {}
    cleaning: dict[str, dict[str, Count]] = {}
    audit: dict[str, Any] = {}


def finite(value: float | None) -> float | None:
    """Return the value if it is a finite number, else ``None``."""
    return value if value is not None and math.isfinite(value) else None


def as_result(content: Mapping[str, Any] | Result, place: str = "the result") -> Result:
    """Check the content of a ``result.json``.

    Raises
    ------
    RunError
        With the first field that is missing or of the wrong kind.
    """
    if isinstance(content, Result):
        return content
    try:
        return Result.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(step) for step in first["loc"]) or "the top level"
        message = f"{place} is damaged at {field}: {first['msg'].lower()}; run the recipe again"
        raise RunError(message) from error


def read_result(folder: Path) -> Result:
    """Read and check ``result.json`` of a run folder.

    Raises
    ------
    RunError
        The file is missing, too large, not JSON, or not the result of a run.
    """
    path = Path(folder) / "result.json"
    if not path.is_file():
        raise RunError(f"{path} does not exist: either this is no run folder or the run did not finish; resume it")
    if path.stat().st_size > RESULT_LIMIT:
        raise RunError(f"{path} is larger than {RESULT_LIMIT} bytes, which no run writes; run the recipe again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not JSON ({error}); the file is damaged, run the recipe again") from error
    return as_result(content, str(path))


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a run folder in the order they were written; none if there is no log.

    A last line without its line feed was torn by a kill and is left out.

    Raises
    ------
    RunError
        A line is too long, not JSON, or not an object.
    """
    path = Path(folder) / "events.jsonl"
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        number = 0
        while line := file.readline(LINE_LIMIT):
            number += 1
            if not line.endswith("\n"):
                if len(line) == LINE_LIMIT:
                    raise RunError(f"{path} line {number} is longer than {LINE_LIMIT} characters; it is damaged")
                return
            if line.strip():
                yield _event(line, path, number)


def _event(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} line {number} is not JSON ({error}); delete the line or run again") from error
    if not isinstance(event, dict):
        raise RunError(f"{path} line {number} is not an object but {type(event).__name__}; delete the line")
    return event
