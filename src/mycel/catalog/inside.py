"""Systems inside an island: schedules of its pipeline, what stays in memory, ranks that die; as data."""

from __future__ import annotations

from mycel.catalog.entry import Entry


def _inside(name: str, number: int | None, factory: str, paper: str, claim: str) -> Entry:
    return Entry(name, number, paper, "pretrain", "collectives", claim, f"mycel.pretrain.{name}", factory)


INSIDE: tuple[Entry, ...] = (
    _inside(
        "bamboo",
        None,
        "Bamboo",
        "Thorpe et al. 2023, Bamboo: Making Preemptible Instances Resilient for Affordable Training of Large DNNs",
        "a stage's predecessor takes over when it is killed; no survivor restarts, and the losses stay what they were",
    ),
    _inside(
        "oobleck",
        None,
        "Oobleck",
        "Jang et al. 2023, Oobleck: Resilient Distributed Training of Large Models Using Pipeline Templates",
        "broken pipelines are made anew from templates and other pipelines' copies, without a restart or lost steps",
    ),
    _inside(
        "gemini",
        None,
        "Gemini",
        "Wang et al. 2023, GEMINI: Fast Failure Recovery in Distributed Training with In-Memory Checkpoints",
        "recovery from a peer's memory loses less than one from disk, as copies can be taken at every step",
    ),
)
