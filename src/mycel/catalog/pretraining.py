"""Systems that pre-train across islands, as data."""

from __future__ import annotations

from mycel.catalog.entry import Entry


def _pretrained(name: str, number: int | None, file: str, factory: str, paper: str, claim: str) -> Entry:
    return Entry(name, number, paper, "pretrain", "rounds", claim, f"mycel.pretrain.{file}", factory)


PRETRAINING: tuple[Entry, ...] = (
    _pretrained(
        "synchronous",
        None,
        "synchronous",
        "Synchronous",
        "baseline: data parallelism",
        "islands that exchange every gradient end where one machine with all their batches does",
    ),
    _pretrained(
        "diloco",
        None,
        "diloco",
        "DiLoCo",
        "Douillard et al. 2023, DiLoCo: Distributed Low-Communication Training of Language Models",
        "synchronous quality at equal tokens for a sixtieth of its bytes with 64 local steps",
    ),
    _pretrained(
        "photon",
        31,
        "photon",
        "Photon",
        "Sani et al. 2024, The Future of Large Language Model Pre-training is Federated",
        "half of the islands in a round, and one of them dropping out, cost at most 5 % at equal tokens",
    ),
    _pretrained(
        "streaming_diloco",
        None,
        "streaming_diloco",
        "StreamingDiLoCo",
        "Douillard et al. 2025, Streaming DiLoCo with overlapping communication: Towards a Distributed Free Lunch",
        "a fragment at a time, sent while islands train on: peak bytes fall by the fragments' number, loss as DiLoCo's",
    ),
    _pretrained(
        "async_diloco",
        51,
        "async_diloco",
        "AsyncDiLoCo",
        "Liu et al. 2024, Asynchronous Local-SGD Training for Language Modeling",
        "over unequal islands the loss of synchronous rounds in half the time or less",
    ),
    _pretrained(
        "acco",
        4,
        "acco",
        "Acco",
        "Nabli et al. 2024, ACCO: Accumulate While You Communicate, Hiding Communications in Distributed LLM Training",
        "a round takes as long as the longer of computing and sending, not their sum",
    ),
    _pretrained(
        "qsdp",
        48,
        "qsdp",
        "Qsdp",
        "Markov et al. 2023, Quantized Distributed Training of Large Models with Convergence Guarantees",
        "8-bit weights and gradients lose nothing that shows and are up to 2.2 times as fast",
    ),
)
