"""Loss against what it cost: rounds, bytes and virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, NamedTuple

from mycel.report.source import Result, finite
from mycel.report.style import Plot, axes, draw, light
from mycel.report.wording import byte_unit, clean_name, time_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cost = Literal["rounds", "steps", "bytes", "time"]
COSTS: tuple[Cost, ...] = ("rounds", "bytes", "time")
SIZE = (330.0, 256.0)
"""Width and height of a curve plot, in CSS pixels."""
LABEL_GAP = 14.0
"""Least distance between two labels at the right edge, in CSS pixels."""


class Curve(NamedTuple):
    """One line of a plot: its label, its colour in the palette, and its points."""

    label: str
    color: str
    x: tuple[float, ...]
    y: tuple[float, ...]


class Level(NamedTuple):
    """A horizontal line to compare with: its label, its colour in the palette, its loss."""

    label: str
    color: str
    loss: float


def curve(result: Result, cost: Cost, label: str, color: str) -> Curve:
    """Lay out the evaluated rounds of a run against rounds done, bytes sent, or virtual seconds passed."""
    spent: list[float]
    if cost == "rounds":
        spent = [float(entry.round) for entry in result.rounds]
    elif cost == "bytes":
        spent = list(accumulate(float(entry.bytes_up + entry.bytes_down) for entry in result.rounds))
    else:
        spent = [entry.virtual_seconds for entry in result.rounds]
    known = [
        (x, loss) for x, entry in zip(spent, result.rounds, strict=True) if (loss := finite(entry.loss)) is not None
    ]
    if known and same_measure(result) and result.rounds[0].round > 0 and (base := finite(result.final.mixture.base)):
        known.insert(0, (0.0, base))
    return Curve(label, color, tuple(x for x, _ in known), tuple(y for _, y in known))


def same_measure(result: Result) -> bool:
    """Tell whether the rounds were evaluated on the mixture, and so compare with the arms' mixture losses."""
    losses = [loss for entry in result.rounds if (loss := finite(entry.loss)) is not None]
    mixture = finite(result.final.mixture.federated)
    return bool(losses) and mixture is not None and abs(losses[-1] - mixture) <= 1e-4 * abs(mixture)


def levels(result: Result) -> list[Level]:
    """Name the losses of the other arms that a curve may be compared with."""
    if not same_measure(result):
        return []
    mixture = result.final.mixture
    arms = (
        ("alone", "local_only", mixture.local_only_mean),
        ("centralised", "centralised", mixture.centralised),
    )
    return [Level(label, color, loss) for label, color, value in arms if (loss := finite(value)) is not None]


def curve_plot(curves: Sequence[Curve], cost: Cost, seeds: str, levels: Sequence[Level] = ()) -> Plot:
    """Draw loss curves against one cost, each labelled at its end."""
    name, title = (
        f"loss-{cost}",
        {"rounds": "Loss by round", "steps": "Loss by step", "bytes": "Loss by traffic", "time": "Loss by time"}[cost],
    )
    drawn = [line for line in curves if len(line.x) > 1]
    largest = max((max(line.x) for line in drawn), default=0.0)
    if not drawn or largest <= 0:
        return Plot(name, title, "", "third", reason="fewer than two rounds were evaluated")
    counted = {"rounds": (1.0, "rounds"), "steps": (1.0, "steps")}
    divisor, unit = {**counted, "bytes": byte_unit(largest), "time": time_unit(largest)}[cost]
    label = {
        "rounds": "rounds",
        "steps": "steps of an island",
        "bytes": f"{unit} sent, up and down",
        "time": f"virtual {unit}",
    }[cost]

    def paint(figure: Figure) -> None:
        labels = [line.label for line in drawn] + [level.label for level in levels]
        longest = max(len(clean_name(label, 16)) for label in labels)
        frame = axes(figure, left=34, right=14 + 6.4 * longest, top=10, bottom=42)
        frame.set_xlabel(label)
        for line in drawn:
            x = [value / divisor for value in line.x]
            frame.plot(x, line.y, color=light(line.color), linewidth=2, solid_capstyle="round")
            frame.plot(x[-1], line.y[-1], "o", color=light(line.color), markersize=5, clip_on=False)
        for level in levels:
            frame.axhline(level.loss, color=light(level.color), linewidth=1.2, linestyle=(0, (4, 3)))
        _scale(frame, largest / divisor, whole=cost in {"rounds", "steps"})
        _label_ends(frame, [Level(line.label, line.color, line.y[-1]) for line in drawn] + list(levels))

    caption = {
        "rounds": "Held-out loss (nats per token) after each round.",
        "steps": "Held-out loss (nats per token) against the batches that an island has trained on.",
        "bytes": "The same loss against every serialised byte sent in both directions.",
        "time": "The same loss against virtual time: transfers and compute by the fleet's cost model.",
    }[cost]
    return Plot(name, title, f"{caption} {seeds}", "third", draw(name, title, SIZE, paint))


def _scale(frame: Axes, largest: float, whole: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    frame.set_xlim(0, largest)
    frame.margins(y=0.08)
    frame.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=whole))
    frame.yaxis.set_major_locator(MaxNLocator(nbins=5))
    frame.grid(axis="y", color=light("line"), linewidth=0.8)


def _label_ends(frame: Axes, ends: Sequence[Level]) -> None:
    low, high = frame.get_ylim()
    pixels = frame.get_window_extent().height
    wanted = [(end.loss - low) / (high - low) * pixels for end in ends]
    for end, place in zip(ends, spread(wanted, LABEL_GAP, pixels), strict=True):
        frame.annotate(
            clean_name(end.label, 16),
            (1.0, place / pixels),
            xycoords="axes fraction",
            xytext=(9, 0),
            textcoords="offset pixels",
            va="center",
            color=light(end.color),
            annotation_clip=False,
        )


def spread(wanted: Sequence[float], gap: float, top: float) -> list[float]:
    """Move labels apart until neighbours are ``gap`` from each other, keeping their order.

    Parameters
    ----------
    wanted
        Where each label would like to be, in pixels from the bottom.
    gap
        Least distance between two labels, in pixels.
    top
        Highest place allowed, in pixels; crowded labels may be pushed below zero rather than above it.

    Returns
    -------
    list[float]
        Places in the order of ``wanted``.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed: list[float] = []
    for index in order:
        placed.append(max(wanted[index], placed[-1] + gap) if placed else wanted[index])
    limit = top
    for position in range(len(placed) - 1, -1, -1):
        placed[position] = min(placed[position], limit)
        limit = placed[position] - gap
    result = [0.0] * len(wanted)
    for position, index in enumerate(order):
        result[index] = placed[position]
    return result
