"""Systems inside an island: schedules of its pipeline, what stays in memory, ranks that die; as data."""

from __future__ import annotations

from mycel.catalog.entry import Entry


def _inside(name: str, number: int | None, factory: str, paper: str, claim: str) -> Entry:
    return Entry(name, number, paper, "pretrain", "collectives", claim, f"mycel.pretrain.{name}", factory)


INSIDE: tuple[Entry, ...] = (
    _inside(
        "breadth_first",
        None,
        "scheduled",
        "Lamy-Poirier 2023, Breadth-First Pipeline Parallelism",
        "several stages a rank divide the bubble by their number, at the gradients of one process",
    ),
    _inside(
        "zero_bubble",
        None,
        "claim",
        "Qi et al. 2024, Zero Bubble Pipeline Parallelism",
        "gradients of weights fill what 1F1B waits away: a third of its bubble, or almost none there and back",
    ),
    _inside(
        "activation_memory",
        None,
        "claim",
        "Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models",
        "blocks keep, compute again or send away what they need, within any budget, at the same gradients to the bit",
    ),
    _inside(
        "distflashattn",
        3,
        "claim",
        "Li et al. 2024, DISTFLASHATTN: Distributed Memory-efficient Attention for Long-context LLMs Training",
        "causal attention over ranks, evenly shared out, and never repeated when blocks are computed again",
    ),
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
