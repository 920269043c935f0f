"""The report of a serving run: how long clients waited, where the time went, who held what, and what was survived."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mycel.errors import RunError
from mycel.report.holdings import MOST_FAILURES, failures, holdings_plot, layout_line, load_plot, refusals
from mycel.report.journal import JOURNAL, SPANS, Served, read_journal
from mycel.report.page import render, write_page
from mycel.report.plots import legend
from mycel.report.style import Plot, axes, draw, light
from mycel.report.wording import seconds_text, time_unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE, WIDE = (430.0, 256.0), (880.0, 256.0)
MOST_POINTS = 4000
MEANING = {
    "parse": "reading and checking the body",
    "tokenise": "prompt to tokens",
    "enter": "to the engine",
    "queue": "waiting for a place",
    "prefill": "computing the prompt",
    "decode": "computing tokens",
    "detokenise": "tokens to text",
    "generate": "inside an engine that tells no more",
    "send": "forming and sending the answer",
}


def write_serving_report(folder: Path) -> Path:
    """Write ``report.html`` into a folder that ``mycel serve --log`` filled.

    Raises
    ------
    RunError
        The journal is missing, damaged or empty, or the page cannot be written.
    """
    journal = read_journal(folder)
    served = journal.served
    answered = [request for request in served if request.first is not None and request.last is not None]
    if not answered:
        raise RunError(f"{folder / JOURNAL} tells of no answered request: nothing to report yet")
    start = min(request.arrived for request in served)
    end = max(request.arrived + (request.last or 0.0) for request in served)
    end = max(end, *(event.at for event in journal.events), end)
    tokens = sum(request.generated for request in served)
    firsts = [request.first for request in answered if request.first is not None]
    gaps = [_gap(request) for request in answered if request.generated > 1]
    failed = failures(journal, start)
    held = holdings_plot(journal, start, end)
    text = render(
        "serving.html",
        title=f"Serving, {folder.resolve().name}",
        requests=len(served),
        left=sum(not request.whole for request in served),
        tokens=tokens,
        rate=tokens / max(end - start, 1e-9),
        span=end - start,
        layout=layout_line(journal),
        rows=[("to the first token", _quantiles(firsts)), ("between tokens", _quantiles(gaps))],
        plots=[
            _spread("first", "Wait for the first token", firsts, "federated"),
            _spread("gap", "Time between tokens", gaps, "centralised"),
            _over_time(answered, start, end),
            _throughput(served, start, end),
        ],
        spans=_spans(answered),
        way=_way(answered),
        holdings=[*([held] if held else []), load_plot(journal, start, end)],
        failures=failed[:MOST_FAILURES],
        more_failures=max(0, len(failed) - MOST_FAILURES),
        refusals=refusals(journal),
    )
    return write_page(folder / "report.html", text)


def _spans(answered: Sequence[Served]) -> list[tuple[str, str, list[str]]]:
    """Return the quantiles of each part of the way, in its order."""
    found = {name: [request.spans[name] for request in answered if name in request.spans] for name in SPANS}
    return [
        (name, MEANING[name], [f"{1e3 * value:.3g} ms" for value in np.quantile(values, (0.5, 0.9, 0.99))])
        for name, values in found.items()
        if values
    ]


def _way(answered: Sequence[Served]) -> Plot:
    name, title = "way", "Where the time of a request goes"
    told = [request.spans for request in answered if request.spans]
    if not told:
        return Plot(name, title, "", "full", reason="the journal tells no parts of the way")
    means = {part: float(np.mean([spans.get(part, 0.0) for spans in told])) for part in SPANS}
    means = {part: mean for part, mean in means.items() if mean > 0}
    total = sum(means.values())
    divisor, unit = time_unit(max(means.values()))

    def paint(figure: Figure) -> None:
        frame = axes(figure, left=84, right=70, top=6, bottom=42)
        rows = list(means)
        own = {"parse", "tokenise", "enter", "detokenise", "send"}
        colors = [light("upload" if part in own else "federated") for part in rows]
        frame.barh(range(len(rows)), [means[part] / divisor for part in rows], color=colors, height=0.62)
        for row, part in enumerate(rows):
            text = f"{means[part] / total:.1%}"
            frame.text(means[part] / divisor, row, f" {text}", va="center", fontsize=10.5, color=light("quiet"))
        frame.set_yticks(range(len(rows)), rows)
        frame.tick_params(axis="y", labelcolor=light("ink"))
        frame.set_ylim(len(rows) - 0.5, -0.5)
        frame.set_xlabel(f"{unit}, mean of a request")

    caption = (
        "From the door to the engine and back; the door's own parts in the lighter colour, the engine's in the other."
    )
    return Plot(name, title, caption, "full", draw(name, title, (WIDE[0], 60 + 24 * len(means)), paint))


def _over_time(answered: Sequence[Served], start: float, end: float) -> Plot:
    name, title = "latency", "Waits over time"
    shown = answered[:: max(1, -(-len(answered) // MOST_POINTS))]
    divisor, unit = time_unit(end - start)
    firsts = np.array([request.first or 0.0 for request in shown])
    wholes = np.array([request.last or 0.0 for request in shown])
    times = np.array([request.arrived - start for request in shown]) / divisor
    across, across_unit = time_unit(float(wholes.max()))

    def paint(figure: Figure) -> None:
        frame = axes(figure, left=54, right=14, top=30, bottom=42)
        looks: dict[str, Any] = {"linestyle": "none", "marker": ".", "alpha": 0.6, "markeredgewidth": 0.0}
        frame.plot(times, wholes / across, color=light("upload"), label="to the last token", markersize=7, **looks)
        frame.plot(times, firsts / across, color=light("federated"), label="to the first token", markersize=6, **looks)
        frame.set_ylim(bottom=0)
        frame.set_xlim(0, max(end - start, 1e-3) / divisor * 1.005)
        frame.set_xlabel(unit)
        frame.grid(axis="y", color=light("line"), linewidth=0.8)
        legend(frame, 4)

    caption = f"Each request at its arrival, waits in {across_unit}."
    return Plot(name, title, caption, "full", draw(name, title, WIDE, paint))


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
        draw(name, title, WIDE, paint),
    )
