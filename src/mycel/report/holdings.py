"""Who held what while a model was served, how much was under way, and what failed and was survived."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mycel.report.journal import Failed, Gone, Holds, Journal, Lost, Opened, Refusals, Resumed, State
from mycel.report.plots import legend
from mycel.report.style import RUNS, Plot, axes, draw, light
from mycel.report.wording import clean_name, counted, seconds_text, time_unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PEERS, MOST_FAILURES = 24, 40
WIDTH = 880.0


class Held(NamedTuple):
    """Blocks that one peer held for a while, in seconds after the door opened."""

    peer: str
    first: int
    last: int
    start: float
    end: float


def holdings(journal: Journal, start: float, end: float) -> list[Held]:
    """Return which peer held which blocks when, as the door knew it."""
    found, now = list[Held](), dict[str, Holds]()

    def close(peer: str, at: float) -> None:
        held = now.pop(peer, None)
        if held is not None:
            found.append(Held(peer, held.first, held.last, max(0.0, held.at - start), max(0.0, at - start)))

    for event in journal.events:
        if isinstance(event, Holds):
            close(event.peer, event.at)
            now[event.peer] = event
        elif isinstance(event, Gone):
            close(event.peer, event.at)
        elif isinstance(event, Opened):  # the door was opened anew: it knows nobody yet
            for peer in list(now):
                close(peer, event.at)
    for peer in list(now):
        close(peer, end)
    return found


def holdings_plot(journal: Journal, start: float, end: float) -> Plot | None:
    """Draw a line per peer with the blocks that it held, and where it was lost; None where no peers were."""
    held = holdings(journal, start, end)
    if not held:
        return None
    peers = sorted(
        {each.peer for each in held}, key=lambda peer: min((h.first, h.start) for h in held if h.peer == peer)
    )
    shown, divisor_unit = peers[:MOST_PEERS], time_unit(end - start)
    ranges = sorted({(each.first, each.last) for each in held})
    colors = {blocks: light(RUNS[index % len(RUNS)]) for index, blocks in enumerate(ranges)}
    lost = [event for event in journal.of(Lost) if event.peer in shown]
    rows = [clean_name(peer, 22) for peer in shown]

    def paint(figure: Figure) -> None:
        frame = axes(figure, left=18 + 6.4 * max(map(len, rows)), right=16, top=30, bottom=42)
        divisor, unit = divisor_unit
        for blocks in ranges:
            name = f"blocks {blocks[0]} to {blocks[1] - 1}" if blocks[1] - blocks[0] > 1 else f"block {blocks[0]}"
            for row, peer in enumerate(shown):
                pieces = [
                    (each.start / divisor, max(each.end - each.start, 0.0) / divisor)
                    for each in held
                    if each.peer == peer and (each.first, each.last) == blocks
                ]
                if pieces:
                    frame.broken_barh(pieces, (row - 0.32, 0.64), color=colors[blocks], linewidth=0, label=name)
                    name = "_shown"
        if lost:
            places = [(event.at - start) / divisor for event in lost]
            marks = [shown.index(event.peer) for event in lost]
            frame.plot(places, marks, "x", color=light("ink"), markersize=7, markeredgewidth=2, label="lost")
        frame.set_yticks(range(len(rows)), rows)
        frame.tick_params(axis="y", labelcolor=light("ink"))
        frame.set_ylim(len(rows) - 0.5, -0.5)
        frame.set_xlim(0, max(end - start, 1e-3) / divisor * 1.005)
        frame.set_xlabel(unit)
        legend(frame, 4)

    note = f" The first {MOST_PEERS} of {counted(len(peers), 'peer')}." if len(peers) > len(shown) else ""
    caption = f"The blocks that each peer held, as the door knew it; a cross where it failed in an answer.{note}"
    size = (WIDTH, 74.0 + 26 * len(shown))
    return Plot("holdings", "Who held what", caption, "full", draw("holdings", "Who held what", size, paint))


def load_plot(journal: Journal, start: float, end: float) -> Plot:
    """Draw how many requests were under way and how many pages of the key-value store they held."""
    name, title = "load", "Requests and pages under way"
    states = journal.of(State)
    if len(states) < 2:
        return Plot(name, title, "", "full", reason="the engine told too seldom how much was under way")
    divisor, unit = time_unit(end - start)
    times = np.array([0.0, *(max(0.0, state.at - start) / divisor for state in states)])
    requests = np.array([0, *(state.requests for state in states)])
    pages = np.array([0.0, *(100 * state.pages / max(1, state.of) for state in states)])

    def paint(figure: Figure) -> None:
        frame = axes(figure, left=54, right=54, top=30, bottom=42)
        frame.step(times, requests, where="post", color=light("federated"), linewidth=2, label="requests (left)")
        frame.set_ylim(0, max(1.0, float(requests.max()) * 1.08))
        frame.set_xlim(0, max(end - start, 1e-3) / divisor * 1.005)
        frame.set_xlabel(unit)
        frame.grid(axis="y", color=light("line"), linewidth=0.8)
        frame.plot([], [], color=light("upload"), linewidth=2, label="pages held, % (right)")
        other = frame.twinx()
        other.step(times, pages, where="post", color=light("upload"), linewidth=2)
        other.set_ylim(0, max(1.0, float(pages.max()) * 1.08))
        for side in ("top", "right", "left"):
            other.spines[side].set_visible(False)
        other.tick_params(length=0, labelsize=10.5, labelcolor=light("quiet"), pad=5)
        legend(frame, 4)

    caption = "At most one point a second; the store's pages hold keys and values of the requests under way."
    return Plot(name, title, caption, "full", draw(name, title, (WIDTH, 256.0), paint))


def failures(journal: Journal, start: float) -> list[tuple[str, str, str, str]]:
    """Return what failed: when, what, how it was met, and the pause that readers saw."""
    rows = list[tuple[str, str, str, str]]()
    pauses = [event for event in journal.events if isinstance(event, Lost | Resumed)]
    failed = {event.peer for event in journal.of(Lost)}
    for event in journal.events:
        at = seconds_text(max(0.0, event.at - start)) if event.at > start else "0 s"
        if isinstance(event, Lost):
            after = pauses[pauses.index(event) + 1 :]
            pause = next((each.pause for each in after if isinstance(each, Resumed)), None)
            what = f"{clean_name(event.peer)}, blocks {event.first} to {event.last - 1}: {clean_name(event.why, 160)}"
            others = ", ".join(clean_name(peer) for peer in event.to)
            met = f"{others} took over; {counted(event.positions, 'position')} sent again"
            rows.append((at, what, met, "–" if pause is None else seconds_text(pause)))
        elif isinstance(event, Gone) and event.peer not in failed:
            rows.append((at, f"{clean_name(event.peer)} left", "no answer of this door was with it", "–"))
        elif isinstance(event, Failed):
            met = f"{counted(event.requests, 'request')} ended with status 503; the engine went on"
            rows.append((at, clean_name(event.why, 160), met, "–"))
    return rows


def refusals(journal: Journal) -> list[tuple[str, str]]:
    """Return how many answers had which status that is none of success, and what it means."""
    meaning = {
        400: "could not be answered as asked",
        401: "brought no key that fits",
        404: "asked for a model that is not served",
        413: "sent too much",
        429: "came when all places were taken, and were told when to come back",
        499: "went away before an answer",
        503: "were given up when the engine failed",
    }
    counts: dict[int, int] = {}
    for event in journal.of(Refusals):
        counts[event.status] = counts.get(event.status, 0) + event.count
    return [(f"{count:,}", f"{meaning.get(status, 'failed')} ({status})") for status, count in sorted(counts.items())]


def layout_line(journal: Journal) -> str:
    """Return how the model was laid out over ranks, in a sentence; empty where it was not."""
    opened = journal.of(Opened)
    shares = opened[-1].shares if opened else []
    if not shares:
        return ""
    heads = " and ".join(f"{share:g}" for share in shares)
    return f"Every block was shared out over {len(shares)} ranks of this machine, which held {heads} of its heads."
