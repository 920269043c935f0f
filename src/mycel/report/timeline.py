"""Who worked when: downloads, compute and uploads of every node in virtual time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mycel.errors import RunError
from mycel.report.plots import legend
from mycel.report.source import Result
from mycel.report.style import Plot, axes, draw, light
from mycel.report.wording import clean_name, counted, time_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAIN_ARM = "system"
MOST_NODES = 40
"""Most nodes that the chart shows."""
MOST_SPANS = 4000
"""Most pieces of work that the chart shows; a page with more is slow to open."""
WIDTH = 960.0
"""Width of the chart, in CSS pixels."""


class _Ask(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    node: int = Field(ge=0)
    round: int
    at: float = Field(ge=0)


class _Answer(_Ask):
    started: float = Field(ge=0)
    computed: float = Field(ge=0)


class _Drop(_Ask):
    reason: str = ""


class Span(NamedTuple):
    """One asking of one node (by index), in virtual seconds: asked, started, computed, answered."""

    node: int
    asked: float
    started: float
    computed: float
    answered: float


class Drop(NamedTuple):
    """An answer of a node that was not used: when it was asked for and given up, in virtual seconds."""

    node: int
    asked: float
    at: float


class Timeline(NamedTuple):
    """What the main arm's nodes did."""

    spans: list[Span]
    drops: list[Drop]


def read_timeline(events: Iterable[dict[str, Any]]) -> Timeline:
    """Pair the main arm's asks with its answers, and gather what was dropped.

    Work that was done again after the run was resumed is counted once.

    Raises
    ------
    RunError
        An event of the main arm lacks a field or holds one of the wrong kind.
    """
    waiting: defaultdict[int, list[_Ask]] = defaultdict(list)
    spans: dict[Span, None] = {}
    drops: dict[Drop, None] = {}
    for content in events:
        if content.get("arm") != MAIN_ARM or content.get("event") not in KINDS:
            continue
        event = _checked(content)
        asks = waiting[event.node]
        if isinstance(event, _Answer):
            asked = _taken(asks, event)
            spans[Span(event.node, min(asked, event.started), event.started, event.computed, event.at)] = None
        elif isinstance(event, _Drop):
            # A late answer belongs to a lease that ended long ago, any other to the one that is open.
            ask = asks.pop(0 if event.reason == "late" else -1) if asks else event
            drops[Drop(event.node, min(ask.at, event.at), event.at)] = None
        else:
            asks.append(event)
    return Timeline(list(spans), list(drops))


KINDS: dict[str, type[_Ask]] = {"ask": _Ask, "answer": _Answer, "drop": _Drop}


def _checked(content: dict[str, Any]) -> _Ask:
    kind = content["event"]
    try:
        return KINDS[kind].model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = f"event {content.get('n')} ({kind}) is damaged at {'.'.join(map(str, first['loc']))}"
        raise RunError(f"{place}: {first['msg'].lower()}; delete its line") from error


def _taken(asks: list[_Ask], answer: _Answer) -> float:
    """Take the ask that an answer belongs to, the last of its version, and return when it was sent."""
    for index in range(len(asks) - 1, -1, -1):
        if asks[index].round == answer.round:
            return asks.pop(index).at
    return answer.started


def gantt(result: Result, timeline: Timeline) -> Plot:
    """Draw a line per node with its downloads, compute and uploads, and where rounds ended."""
    name, title = "timeline", "Who worked when"
    spans = sorted(timeline.spans, key=lambda span: span.answered)[:MOST_SPANS]
    if not spans:
        return Plot(name, title, "", "full", reason="the event log holds no answers of the system's nodes")
    nodes = sorted({span.node for span in spans})
    shown = nodes[:MOST_NODES]
    names = {index: party.name for index, party in enumerate(result.parties)}
    rows = {node: clean_name(names.get(node, f"node {node}"), 22) for node in shown}
    end = max(span.answered for span in spans)
    note = f" The first {MOST_NODES} of {counted(len(nodes), 'node')}." if len(nodes) > len(shown) else ""
    if len(spans) < len(timeline.spans):
        note += f" The first {counted(len(spans), 'answer')} of {len(timeline.spans):,}."
    caption = (
        "Each node's briefs coming down, its work, and its answers going up, in virtual time; hairlines mark "
        f"the ends of rounds{', a line to a cross an answer that was dropped' if timeline.drops else ''}.{note} "
        f"Seed {result.seed}."
    )
    chart = _Chart(rows, spans, [drop for drop in timeline.drops if drop.at <= end], _ends(result, end), end)
    return Plot(name, title, caption, "full", draw(name, title, (WIDTH, 74 + 26 * len(shown)), chart.paint))


def _ends(result: Result, end: float) -> list[float]:
    ends = [entry.virtual_seconds for entry in result.rounds if entry.virtual_seconds <= end]
    return ends if len(ends) <= 200 else []


class _Chart(NamedTuple):
    names: dict[int, str]
    spans: list[Span]
    drops: list[Drop]
    ends: list[float]
    end: float

    def paint(self, figure: Figure) -> None:
        names = list(self.names.values())
        frame = axes(figure, left=18 + 6.4 * max(map(len, names)), right=16, top=30, bottom=42)
        divisor, unit = time_unit(self.end)
        for at in self.ends:
            frame.axvline(at / divisor, color=light("line"), linewidth=1, zorder=0)
        for kind, color in (("download", "download"), ("compute", "federated"), ("upload", "upload")):
            for row, node in enumerate(self.names):
                pieces = [_piece(span, kind, divisor) for span in self.spans if span.node == node]
                frame.broken_barh(
                    pieces,
                    (row - 0.32, 0.64),
                    color=light(color),
                    linewidth=0,
                    label=kind if row == 0 else None,
                )
        self._crosses(frame, divisor)
        frame.set_yticks(range(len(names)), names)
        frame.tick_params(axis="y", labelcolor=light("ink"))
        frame.set_ylim(len(names) - 0.5, -0.5)
        frame.set_xlim(0, self.end / divisor * 1.005)
        frame.set_xlabel(f"virtual {unit}")
        legend(frame, 4)

    def _crosses(self, frame: Axes, divisor: float) -> None:
        drops = [drop for drop in self.drops if drop.node in self.names]
        if not drops:
            return
        order = list(self.names)
        rows = [order.index(drop.node) for drop in drops]
        ends = [drop.at / divisor for drop in drops]
        color = light("local_only")
        frame.hlines(rows, [drop.asked / divisor for drop in drops], ends, color=color, linewidth=1.2)
        frame.plot(ends, rows, "x", color=color, markersize=6, markeredgewidth=2, label="dropped")


def _piece(span: Span, kind: str, divisor: float) -> tuple[float, float]:
    start, stop = {
        "download": (span.asked, span.started),
        "compute": (span.started, span.computed),
        "upload": (span.computed, span.answered),
    }[kind]
    return start / divisor, max(stop - start, 0.0) / divisor
