"""What each party got and what it sent, as horizontal bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from mycel.report.curves import COSTS, curve, curve_plot, levels
from mycel.report.source import Result, finite
from mycel.report.style import Plot, axes, draw, light
from mycel.report.tables import ARMS
from mycel.report.wording import byte_unit, clean_name, counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 430.0
"""Width of a bar plot, in CSS pixels."""
GROUP = 50.0
"""Height of one party's bars and the space around them, in CSS pixels."""
MOST_PARTIES = 24
"""Most parties that a bar plot shows."""


def loss_plots(result: Result) -> list[Plot]:
    """Draw the run's loss against rounds, bytes and virtual time, beside the arms it was compared with."""
    marks = levels(result)
    color = "federated"
    return [curve_plot([curve(result, cost, color, color)], cost, f"Seed {result.seed}.", marks) for cost in COSTS]


def arm_bars(result: Result) -> Plot:
    """Draw by how much each arm lowered the loss on every party's own text, from the base model's."""
    name, title = "arms", "What each party gained"
    scores = result.final.per_party
    # Losses have no meaningful zero to draw bars from; what an arm gained over the base model has.
    gains: dict[str, dict[str, float]] = {}
    for party in result.parties:
        score = scores.get(party.name)
        if score is None or (base := finite(score.base)) is None:
            continue
        values = {arm: finite(getattr(score, arm)) for arm in ARMS if arm != "base"}
        gains[party.name] = {arm: base - value for arm, value in values.items() if value is not None}
    gains = {party: values for party, values in gains.items() if values}
    if not gains:
        return Plot(name, title, "", "half", reason="no party has a loss both before and after training")
    parties = list(gains)[:MOST_PARTIES]
    arms = [arm for arm in ARMS if any(arm in gains[party] for party in parties)]
    rows = [[gains[party].get(arm) for party in parties] for arm in arms]
    caption = (
        "Fall of the loss on the party's own held-out text from the base model, in nats per token; "
        f"longer is better, left of zero is harm.{_left_out(len(gains))} Seed {result.seed}."
    )
    svg = _bars(name, title, parties, [(ARMS[arm], arm) for arm in arms], rows, "nats per token below the base model")
    return Plot(name, title, caption, "half", svg)


def byte_bars(result: Result) -> Plot:
    """Draw what each party sent and received."""
    name, title = "traffic", "What each party sent"
    traffic = {party.name: result.bytes.per_party.get(party.name) for party in result.parties}
    known = {party: sent for party, sent in traffic.items() if sent is not None}
    largest = max((max(sent.up, sent.down) for sent in known.values()), default=0)
    if not largest:
        return Plot(name, title, "", "half", reason="no bytes were counted by party")
    parties = list(known)[:MOST_PARTIES]
    divisor, unit = byte_unit(largest)
    rows: list[list[float | None]] = [
        [known[party].up / divisor for party in parties],
        [known[party].down / divisor for party in parties],
    ]
    caption = f"Serialised bytes of the whole run, headers included.{_left_out(len(known))} Seed {result.seed}."
    svg = _bars(name, title, parties, [("up", "upload"), ("down", "download")], rows, unit)
    return Plot(name, title, caption, "half", svg)


def _left_out(number: int) -> str:
    return f" The first {MOST_PARTIES} of {counted(number, 'party')}." if number > MOST_PARTIES else ""


def _bars(
    name: str,
    title: str,
    parties: Sequence[str],
    kinds: Sequence[tuple[str, str]],
    rows: Sequence[Sequence[float | None]],
    label: str,
) -> Markup:
    """Draw groups of bars: a group per party, a bar per kind (heading, colour)."""
    names = [clean_name(party, 22) for party in parties]
    thickness = min(15.0, (GROUP - 14.0) / len(kinds))
    start = -thickness * len(kinds) / 2

    def paint(figure: Figure) -> None:
        frame = axes(figure, left=18 + 6.4 * max(map(len, names)), right=16, top=30, bottom=42)
        for index, ((heading, color), values) in enumerate(zip(kinds, rows, strict=True)):
            places = [party * GROUP + start + index * thickness for party in range(len(names))]
            frame.barh(
                places,
                [value if value is not None else 0.0 for value in values],
                height=thickness - 1.5,
                align="edge",
                color=light(color),
                label=heading,
            )
        frame.set_yticks([party * GROUP for party in range(len(names))], names)
        frame.set_ylim((len(names) - 0.5) * GROUP, -0.5 * GROUP)
        frame.set_xlabel(label)
        frame.tick_params(axis="y", labelcolor=light("ink"))
        _finish(frame, len(kinds))

    return draw(name, title, (WIDTH, 72 + GROUP * len(names)), paint)


def _finish(frame: Axes, columns: int) -> None:
    from matplotlib.ticker import MaxNLocator

    frame.xaxis.set_major_locator(MaxNLocator(nbins=5))
    frame.grid(axis="x", color=light("line"), linewidth=0.8)
    frame.axvline(0, color=light("quiet"), linewidth=1)
    legend(frame, columns)


def legend(frame: Axes, columns: int) -> None:
    """Put a legend in one line above the axes, flush left with the whole figure."""
    figure = frame.figure
    made = figure.legend(
        *frame.get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=0.9,
        handleheight=0.9,
        handletextpad=0.5,
        columnspacing=1.4,
        fontsize=10.5,
    )
    for text in made.get_texts():
        text.set_color(light("quiet"))
