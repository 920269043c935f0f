"""How names, numbers and verdicts are put into words; the same everywhere a person reads them."""

from __future__ import annotations

import math
from typing import NamedTuple

from mycel.report.source import Result, finite


def clean_name(text: str, limit: int = 60) -> str:
    """Make a name fit for one line of a terminal or a plot: printable, no breaks, at most ``limit`` long."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def loss_text(value: float | None) -> str:
    """Print a loss to three decimals; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:.3f}" if math.isfinite(value) else "diverged"


def byte_unit(largest: float) -> tuple[float, str]:
    """Choose the decimal unit in which ``largest`` bytes read well, as (divisor, name)."""
    for divisor, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= divisor:
            return divisor, name
    return 1.0, "B"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def bytes_text(count: float) -> str:
    """Print a number of bytes in decimal units, to three digits."""
    divisor, name = byte_unit(count)
    return f"{count:.0f} B" if name == "B" else f"{_three_digits(count / divisor)} {name}"


def time_unit(largest: float) -> tuple[float, str]:
    """Choose the unit in which ``largest`` seconds read well, as (divisor, name)."""
    for divisor, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if largest >= 2 * divisor:
            return divisor, name
    return 1.0, "seconds"


def seconds_text(seconds: float) -> str:
    """Print a duration in the unit that suits it."""
    divisor, name = time_unit(seconds)
    short = {"days": "d", "hours": "h", "minutes": "min", "seconds": "s"}[name]
    return f"{_three_digits(seconds / divisor)} {short}"


def counted(number: int, noun: str) -> str:
    """Print a number with its noun, in the plural where that is due."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


class Verdict(NamedTuple):
    """What a run showed.

    Attributes
    ----------
    sentence
        What happened, in one sentence.
    beat_local
        Whether the federated model beat the mean of the parties' lone models on the mixture; ``None``: not
        run.
    gap_closed
        Share of the way from local-only to centralised loss that federated training went (1: all of it; below
        0: it moved away); ``None`` where there is no such gap.
    """

    sentence: str
    beat_local: bool | None
    gap_closed: float | None


def verdict(result: Result) -> Verdict:
    """Judge a run by its losses on the mixture of everybody's held-out text."""
    mixture = result.final.mixture
    federated, local = finite(mixture.federated), finite(mixture.local_only_mean)
    centralised = finite(mixture.centralised)
    beat = None if federated is None or local is None else federated < local
    gap = None
    if federated is not None and local is not None and centralised is not None and centralised < local:
        gap = (local - federated) / (local - centralised)
    who = f"{clean_name(result.system)} over {counted(len(result.parties), 'party')}"
    reached = finite(mixture.federated if mixture.federated is not None else result.final.loss)
    if reached is None:
        return Verdict(f"{who} diverged: the final loss is not a finite number.", beat, gap)
    base = finite(mixture.base)
    way = f"to {loss_text(reached)}" if base is None else f"from {loss_text(base)} to {loss_text(reached)}"
    start = f"{who} brought the held-out loss {way} in {counted(len(result.rounds), 'round')}"
    clauses = ", ".join(_against_local(federated, local) + _against_centralised(result, gap))
    return Verdict(f"{start}: {clauses}." if clauses else f"{start}.", beat, gap)


def _against_local(federated: float | None, local: float | None) -> list[str]:
    if federated is None or local is None:
        return []
    if loss_text(federated) == loss_text(local):
        return [f"level with training alone ({loss_text(local)})"]
    word = "better" if federated < local else "worse"
    return [f"{word} than training alone ({loss_text(local)})"]


def _against_centralised(result: Result, gap: float | None) -> list[str]:
    mixture = result.final.mixture
    centralised, federated, base = (
        finite(mixture.centralised),
        finite(mixture.federated),
        finite(mixture.base),
    )
    if centralised is None or federated is None:
        return []
    there = f"centralised training ({loss_text(centralised)})"
    if gap is None and finite(mixture.local_only_mean) is not None:
        return [f"with no gap to close, as {there} did no better"]
    if gap is None:
        if base is None or base <= centralised:
            return []
        return [f"{(base - federated) / (base - centralised):.0%} of the way from the base model to {there}"]
    if gap >= 1.0:
        return [f"closing the whole gap to {there}"]
    return [f"closing {f'{gap:.0%}' if gap > 0 else 'none'} of the gap to {there}"]


def details(result: Result) -> list[str]:
    """Say what the headline leaves out: own texts, personal steps, and what to run to know more."""
    own, lines = result.final.own, []
    pairs = [(finite(s.federated), finite(s.local_only)) for s in result.final.per_party.values()]
    known = [(federated, local) for federated, local in pairs if federated is not None and local is not None]
    if known:
        won = sum(federated < local for federated, local in known)
        means = f" (mean {loss_text(own.federated_mean)} against {loss_text(own.local_only_mean)})"
        both = own.federated_mean is not None and own.local_only_mean is not None
        lines.append(
            f"On their own held-out text, {won} of {len(known)} parties do better with the federated model "
            f"than alone{means if both else ''}."
        )
    if own.personal_mean is not None:
        lines.append(f"Personal steps from the federated model bring that mean to {loss_text(own.personal_mean)}.")
    if result.final.mixture.local_only_mean is None and not known:
        lines.append('Training alone was not run beside it: compare = ["local", "centralised"] would.')
    return lines
