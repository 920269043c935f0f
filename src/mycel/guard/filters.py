"""Robust filters: what to make of updates some of which lie.

A filter looks at the updates as rows of one matrix and gives each a share, or a centre of its own that is no mean.
Rows may be the updates as they travel or what they change in the weights a model computes with; the caller decides.

    median, trimmed_mean(b)       Yin et al. 2018, coordinate by coordinate; b: share cut at either end
    krum(f), multi_krum(f)        Blanchard et al. 2017; f: share of parties that may lie
    norm_bound(c)                 Sun et al. 2019; rows cut to c times the median norm
    geometric_median              Pillutla et al. 2022 (RFA): smoothed Weiszfeld iterations
    foolsgold                     Fung et al. 2020: rows of one history count once (sybils)
    fltrust                       Cao et al. 2021: cosine to the coordinator's own update, norms brought to its own
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from difflib import get_close_matches

import torch
from torch import Tensor

from mycel.errors import RecipeError

WEISZFELD_STEPS = 32
SMOOTHING = 1e-6


@dataclass(frozen=True)
class Verdict:
    """What a filter makes of K rows.

    Attributes
    ----------
    shares : Tensor
        (K,), by which the rows are to be multiplied and added; 0 for rows that were left out.
    centre : Tensor or None
        (D,), what stands for all rows where no sum of them does.
    """

    shares: Tensor
    centre: Tensor | None = None


@dataclass(frozen=True)
class Evidence:
    """What a filter may look at.

    Attributes
    ----------
    rows : Tensor
        (K, D) float32, one update each.
    weights : Tensor
        (K,), what the parties would count for without a filter; they need not add up to 1.
    reference : Tensor or None
        (D,), the coordinator's own update, where it has examples of its own.
    histories : Tensor or None
        (K, D), the sum of each party's updates so far, this one included.
    """

    rows: Tensor
    weights: Tensor
    reference: Tensor | None = None
    histories: Tensor | None = None


class Filter(ABC):
    """Judges the updates of one round.

    Attributes
    ----------
    spec : str
        The text that ``parse_filter`` turns back into this filter.
    trusts : bool
        Whether it needs an update of the coordinator's own.
    remembers : bool
        Whether it needs the parties' histories.
    """

    spec: str
    trusts: bool = False
    remembers: bool = False

    @abstractmethod
    def judge(self, evidence: Evidence) -> Verdict:
        """Return what the rows come to; must not depend on their order."""

    def least(self) -> int:
        """Fewest updates it works on."""
        return 1


@dataclass(frozen=True)
class TrimmedMean(Filter):
    """Mean, coordinate by coordinate, without the ``cut`` largest and smallest share; 0.5 is the median."""

    cut: float
    spec: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", "median" if self.cut == 0.5 else f"trimmed_mean({self.cut!r})")

    def judge(self, evidence: Evidence) -> Verdict:
        """Sort each column; equal weights, for a party could lie about its own."""
        ordered = evidence.rows.sort(0).values
        count = len(ordered)
        gone = min(math.floor(self.cut * count + 1e-9), (count - 1) // 2)
        shares = torch.full((count,), 1 / count, dtype=torch.float64)
        return Verdict(shares, ordered[gone : count - gone].mean(0))


@dataclass(frozen=True)
class Krum(Filter):
    """Keep the row, or the ``1 - liars`` share of rows, that lie closest to their nearest neighbours."""

    liars: float
    several: bool
    spec: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", f"{'multi_krum' if self.several else 'krum'}({self.liars!r})")

    def least(self) -> int:
        """Enough that a neighbour is left beside the liars."""
        return 3

    def judge(self, evidence: Evidence) -> Verdict:
        """Add up each row's squared distances to its count - liars - 2 nearest."""
        count = len(evidence.rows)
        liars = math.ceil(self.liars * count - 1e-9)
        apart = torch.cdist(evidence.rows.double(), evidence.rows.double()).square()
        near = apart.sort(1).values[:, 1 : max(count - liars - 2, 1) + 1].sum(1)
        # Two rows may each be the other's nearest: then the one nearer to all decides, not the order.
        near += 1e-9 * (evidence.rows.double() - evidence.rows.double().mean(0)).square().sum(1)
        kept = near.argsort(stable=True)[: max(count - liars, 1) if self.several else 1]
        shares = torch.zeros(count, dtype=torch.float64)
        shares[kept] = evidence.weights[kept].double() if self.several else 1.0
        return Verdict(shares / shares.sum())


@dataclass(frozen=True)
class NormBound(Filter):
    """Cut every row to ``times`` the median norm: a lie may not be louder than others speak."""

    times: float
    spec: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", f"norm_bound({self.times!r})")

    def judge(self, evidence: Evidence) -> Verdict:
        """Shrink; shares then add up to less than 1."""
        norms = evidence.rows.double().norm(dim=1)
        factors = (self.times * norms.median() / norms.clamp_min(1e-30)).clamp_max(1.0)
        return Verdict(factors * evidence.weights.double() / evidence.weights.sum())


@dataclass(frozen=True)
class GeometricMedian(Filter):
    """The point with the least weighted sum of distances to all rows; half the weight must move to move it far."""

    spec: str = "geometric_median"

    def judge(self, evidence: Evidence) -> Verdict:
        """Weigh rows by the inverse of their distance, again and again, on the rows' inner products alone."""
        rows = evidence.rows.double()
        weights = evidence.weights.double() / evidence.weights.sum()
        inner, shares = rows @ rows.T, weights.clone()
        for _ in range(WEISZFELD_STEPS):
            squares = inner.diagonal() - 2 * inner @ shares + shares @ inner @ shares
            pull = weights / squares.clamp_min(0).sqrt().clamp_min(SMOOTHING * float(inner.diagonal().max()) ** 0.5)
            shares = pull / pull.sum()
        return Verdict(shares)


@dataclass(frozen=True)
class FoolsGold(Filter):
    """Parties whose histories point the same way share one voice; it protects against sybils, not lone liars."""

    spec: str = "foolsgold"
    remembers = True

    def judge(self, evidence: Evidence) -> Verdict:
        """Cosines of the histories, pardoning, and a logit, as in the paper."""
        found = evidence.histories if evidence.histories is not None else evidence.rows
        unit = torch.nn.functional.normalize(found.double(), dim=1)
        alike = (unit @ unit.T).fill_diagonal_(-1.0)
        most = alike.max(1).values
        pardon = torch.where(most[None, :] > most[:, None], most[:, None] / most[None, :].clamp_min(1e-12), 1.0)
        voice = (1 - (alike * pardon).max(1).values).clamp(0, 1)
        voice = voice / voice.max().clamp_min(1e-12)
        voice = voice.clamp(1e-6, 0.99)
        voice = ((voice / (1 - voice)).log() + 0.5).clamp(0, 1)
        shares = voice * evidence.weights.double()
        total = shares.sum()
        return Verdict(shares / total if total else evidence.weights.double() / evidence.weights.sum())


@dataclass(frozen=True)
class FLTrust(Filter):
    """Weigh by the cosine to the coordinator's own update, negative ones out, and give all rows its norm."""

    spec: str = "fltrust"
    trusts = True

    def judge(self, evidence: Evidence) -> Verdict:
        """Where nobody agrees with the coordinator its own update stands."""
        if evidence.reference is None:
            raise RecipeError("guard.filter 'fltrust' needs examples of the coordinator's own: set guard.root_examples")
        own, rows = evidence.reference.double(), evidence.rows.double()
        norms = rows.norm(dim=1).clamp_min(1e-30)
        trust = (rows @ own / (norms * own.norm().clamp_min(1e-30))).clamp_min(0)
        if not bool(trust.sum()):
            return Verdict(torch.zeros(len(rows), dtype=torch.float64), evidence.reference)
        return Verdict(trust / trust.sum() * own.norm() / norms)


PLAIN: dict[str, Filter] = {
    "median": TrimmedMean(0.5),
    "geometric_median": GeometricMedian(),
    "foolsgold": FoolsGold(),
    "fltrust": FLTrust(),
}
NUMBERED = {"trimmed_mean": (0.2, 0.5), "krum": (0.2, 0.5), "multi_krum": (0.2, 0.5), "norm_bound": (1.0, 100.0)}
FILTERS = (*PLAIN, *NUMBERED)


def parse_filter(spec: str) -> Filter:
    """Return the filter that ``spec`` names, e.g. ``"trimmed_mean(0.2)"``.

    Raises
    ------
    RecipeError
        When the name is unknown or its number is out of range.
    """
    match = re.fullmatch(r"([a-z_]+)(?:\(([0-9]*\.?[0-9]+)\))?", spec.replace(" ", ""))
    name, number = match.groups() if match else (spec, None)
    if name in PLAIN and number is None:
        return PLAIN[name]
    if name not in NUMBERED:
        near = get_close_matches(name, FILTERS, 1, 0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(FILTERS)}"
        raise RecipeError(f"guard.filter is {spec[:60]!r}; {hint}")
    default, most = NUMBERED[name]
    value = default if number is None else float(number)
    if not 0 < value <= most or (most == 0.5 and value == 0.5):
        raise RecipeError(f"guard.filter is {spec!r}; {name} takes a number above 0 and below {most}")
    if name == "norm_bound":
        return NormBound(value)
    return TrimmedMean(value) if name == "trimmed_mean" else Krum(value, name == "multi_krum")
