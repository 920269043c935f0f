"""The tables of a run: losses per party and arm, and what crossed the wire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mycel.report.source import Result, Scores, as_result, finite
from mycel.report.wording import bytes_text, clean_name, counted, loss_text

ARMS: dict[str, str] = {
    "base": "base",
    "local_only": "alone",
    "federated": "federated",
    "personal": "+ personal",
    "centralised": "centralised",
}
"""Arms in reading order, with the heading of their column."""
AT_HOME = ("base", "local_only", "federated", "personal")
"""Arms that pool nobody's data, and so compete for the mark."""
TERMINAL_PARTIES = 40
"""Most parties that a terminal table lists."""


class Row(NamedTuple):
    """One line of the table of losses.

    Attributes
    ----------
    name
        A party's name, or what the line sums up.
    summary
        Whether the line sums up the parties.
    losses
        Loss by arm, in nats per token; ``None`` where the arm was not run.
    best
        The arms with the lowest loss among those that keep data at home.
    """

    name: str
    summary: bool
    losses: dict[str, float | None]
    best: frozenset[str]


def _row(name: str, summary: bool, losses: dict[str, float | None]) -> Row:
    home = {arm: value for arm in AT_HOME if (value := finite(losses.get(arm))) is not None}
    best = {arm for arm, value in home.items() if value == min(home.values())} if len(home) > 1 else set()
    return Row(name, summary, losses, frozenset(best))


def _mean(losses: list[float | None]) -> float | None:
    # A mean over some of the parties would not compare with a mean over all of them.
    known = [loss for loss in losses if loss is not None]
    return sum(known) / len(known) if known and len(known) == len(losses) else None


def summary_rows(result: Result) -> list[Row]:
    """Lay out losses: a row per party on its own held-out text, their mean, and the mixture."""
    final = result.final
    named = dict.fromkeys([*(party.name for party in result.parties), *final.per_party])
    rows = [_row(name, False, final.per_party.get(name, Scores()).model_dump()) for name in named]
    rows = [row for row in rows if any(value is not None for value in row.losses.values())]
    mean = {arm: _mean([row.losses[arm] for row in rows]) for arm in ARMS}
    given = {arm: getattr(final.own, f"{arm}_mean") for arm in ARMS}
    mean.update({arm: value for arm, value in given.items() if value is not None})
    if any(value is not None for value in mean.values()):
        rows.append(_row("mean of parties", True, mean))
    mixture = final.mixture
    rows.append(
        _row(
            "mixture",
            True,
            {
                "base": mixture.base,
                "local_only": mixture.local_only_mean,
                "federated": mixture.federated,
                "personal": mixture.personal_mean,
                "centralised": mixture.centralised,
            },
        )
    )
    return rows


def shown_arms(rows: list[Row]) -> list[str]:
    """Name the arms that have a loss in at least one row, in reading order."""
    return [arm for arm in ARMS if any(row.losses[arm] is not None for row in rows)]


def summary_table(result: Mapping[str, Any] | Result) -> Table:
    """Make the terminal's table of held-out losses.

    Parameters
    ----------
    result
        The content of ``result.json``.

    Returns
    -------
    rich.table.Table
        A row per party (loss on its own held-out text, nats per token), their mean, and the mixture of
        everybody's held-out text. The best loss of a row among the arms that keep data at home is bold
        and starred.
    """
    checked = as_result(result)
    rows = summary_rows(checked)
    arms = shown_arms(rows)
    parties = [row for row in rows if not row.summary]
    left_out = len(parties) - TERMINAL_PARTIES
    note = "loss in nats per token, lower is better; * best that keeps data at home"
    if left_out > 0:
        note += f"; {left_out} of {len(parties)} parties are left out here and shown in report.html"
    table = plain_table("Held-out loss", note)
    table.add_column("own text of", overflow="fold")
    for arm in arms:
        table.add_column(ARMS[arm], justify="right", no_wrap=True)
    for row in parties[:TERMINAL_PARTIES]:
        table.add_row(*_cells(row, arms))
    table.add_section()
    for row in rows:
        if row.summary:
            table.add_row(*_cells(row, arms))
    return table


def plain_table(title: str, caption: str) -> Table:
    """Make an empty table, narrow enough for eighty columns."""
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )


def _cells(row: Row, arms: list[str]) -> list[Text]:
    # Text, not markup: a party's name may hold square brackets or terminal escapes.
    cells = [Text(clean_name(row.name, 28), style="bold" if row.summary else "")]
    for arm in arms:
        best = arm in row.best
        cells.append(Text(loss_text(row.losses[arm]) + ("*" if best else " "), style="bold green" if best else ""))
    return cells


def bytes_line(result: Mapping[str, Any] | Result) -> str:
    """Say in one line what crossed the wire and what was dropped.

    Parameters
    ----------
    result
        The content of ``result.json``.
    """
    checked = as_result(result)
    sent, dropped = checked.bytes, checked.dropped
    line = f"wire: {bytes_text(sent.up)} up, {bytes_text(sent.down)} down"
    if len(checked.rounds) > 1:
        each = sum(entry.bytes_up + entry.bytes_down for entry in checked.rounds) / len(checked.rounds)
        line += f" ({bytes_text(each)} a round)"
    lost = {"late": dropped.late, "invalid": dropped.invalid, "lost": dropped.lost}
    reasons = ", ".join(f"{number} {reason}" for reason, number in lost.items() if number)
    total = counted(sum(lost.values()), "answer")
    return f"{line}; {total} dropped ({reasons})" if reasons else f"{line}; no answer dropped"
