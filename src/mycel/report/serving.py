"""The report of a serving run: how long clients waited and how much was generated, from the door's journal alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mycel.errors import RunError
from mycel.report.page import render, write_page
from mycel.report.style import Plot, axes, draw, light
from mycel.report.wording import seconds_text, time_unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JOURNAL = "requests.jsonl"
SIZE = (430.0, 256.0)
MOST_BYTES = 1 << 30


class Served(BaseModel):
    """One line of the journal."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    arrived: float
    first: float | None = Field(None, ge=0)
    last: float | None = Field(None, ge=0)
    prompt: int = Field(ge=0)
    generated: int = Field(ge=0)
    whole: bool


def write_serving_report(folder: Path) -> Path:
    """Write ``report.html`` into a folder that ``mycel serve --log`` filled.

    Raises
    ------
    RunError
        The journal is missing, damaged or empty, or the page cannot be written.
    """
    served = read_journal(folder)
    answered = [request for request in served if request.first is not None and request.last is not None]
    if not answered:
        raise RunError(f"{folder / JOURNAL} tells of no answered request: nothing to report yet")
    start = min(request.arrived for request in served)
    end = max(request.arrived + (request.last or 0.0) for request in served)
    tokens = sum(request.generated for request in served)
    firsts = [request.first for request in answered if request.first is not None]
    gaps = [_gap(request) for request in answered if request.generated > 1]
    text = render(
        "serving.html",
        title=f"Serving, {folder.resolve().name}",
        requests=len(served),
        left=sum(not request.whole for request in served),
        tokens=tokens,
        rate=tokens / max(end - start, 1e-9),
        span=end - start,
        rows=[("to the first token", _quantiles(firsts)), ("between tokens", _quantiles(gaps))],
        plots=[
            _spread("first", "Wait for the first token", firsts, "federated"),
            _spread("gap", "Time between tokens", gaps, "centralised"),
            _throughput(served, start, end),
        ],
    )
    return write_page(folder / "report.html", text)


def read_journal(folder: Path) -> list[Served]:
    """Read and check a journal; a last line that was cut off is left out."""
    path = folder / JOURNAL
    try:
        if path.stat().st_size > MOST_BYTES:
            raise RunError(f"{path} has more than {MOST_BYTES} bytes: report on a part of it")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read: is {folder} a folder of `mycel serve --log`?") from error
    served = []
    for number, line in enumerate(lines, 1):
        try:
            served.append(Served.model_validate(json.loads(line)))
        except (ValueError, ValidationError, RecursionError) as error:
            if number < len(lines):
                raise RunError(f"line {number} of {path} is damaged: remove it") from error
    return served


def _gap(request: Served) -> float:
    assert request.last is not None
    assert request.first is not None
    return max(0.0, request.last - request.first) / (request.generated - 1)


def _quantiles(values: Sequence[float]) -> list[str]:
    if not values:
        return ["–"] * 3
    return [seconds_text(float(value)) for value in np.quantile(values, (0.5, 0.9, 0.99))]


def _spread(name: str, title: str, values: Sequence[float], color: str) -> Plot:
    if len(values) < 2 or max(values) <= 0:
        return Plot(name, title, "", "half", reason="fewer than two requests tell of it")
    divisor, unit = time_unit(float(np.quantile(values, 0.99)))
    ordered = np.sort(values) / divisor
    shares = np.arange(1, len(ordered) + 1) / len(ordered) * 100

    def paint(figure: Figure) -> None:
        frame = axes(figure, left=44, right=14, top=10, bottom=42)
        frame.step(ordered, shares, where="post", color=light(color), linewidth=2)
        frame.set_xlim(0, float(np.quantile(ordered, 0.99)) * 1.1)
        frame.set_ylim(0, 102)
        frame.set_xlabel(f"{unit}")
        frame.grid(axis="y", color=light("line"), linewidth=0.8)

    caption = "Per cent of requests that waited at most so long; the axis ends past the 99th percentile."
    return Plot(name, title, caption, "half", draw(name, title, SIZE, paint))


def _throughput(served: Sequence[Served], start: float, end: float) -> Plot:
    name, title = "throughput", "Tokens generated"
    length = max(end - start, 1e-3)
    bins = np.linspace(0.0, length, 41)
    counted = np.zeros(40)
    for request in served:
        if request.first is None or request.last is None:
            continue
        times = request.arrived - start + np.linspace(request.first, request.last, max(1, request.generated))
        counted += np.histogram(times.clip(0.0, length), bins)[0]
    divisor, unit = time_unit(length)

    def paint(figure: Figure) -> None:
        frame = axes(figure, left=54, right=14, top=10, bottom=42)
        frame.stairs(counted / (length / 40), bins / divisor, color=light("federated"), fill=True, alpha=0.85)
        frame.set_xlim(0, length / divisor)
        frame.set_ylim(bottom=0)
        frame.set_xlabel(unit)
        frame.grid(axis="y", color=light("line"), linewidth=0.8)

    return Plot(
        name,
        title,
        "Tokens a second, over the time the door was open.",
        "full",
        draw(name, title, (880.0, 256.0), paint),
    )
