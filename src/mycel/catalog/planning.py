"""Systems that plan who trains what, and run what they planned, as data."""

from __future__ import annotations

from mycel.catalog.entry import Entry


def _planned(name: str, number: int | None, way: str, factory: str, paper: str, claim: str) -> Entry:
    return Entry(name, number, paper, "pretrain", way, claim, f"mycel.pretrain.{name}", factory)


PLANNING: tuple[Entry, ...] = (
    _planned(
        "alpa",
        58,
        "decisions",
        "slices_of",
        "Zheng et al. 2022, Alpa: Automating Inter- and Intra-Operator Parallelism, with Ray",
        "ways within a stage and stages over devices equal trying everything on every small case",
    ),
    _planned(
        "hethub",
        77,
        "decisions",
        "bound",
        "Xu et al. 2024, HETHUB: A Distributed Training System with Heterogeneous Cluster for Large-Scale Models",
        "blocks by speed reach 95 % of the sum of unequal speeds where even ones reach 70 at most, and it is foretold",
    ),
)
