"""Systems that plan who trains what, and run what they planned, as data."""

from __future__ import annotations

from mycel.catalog.entry import Entry


def _planned(name: str, number: int | None, way: str, factory: str, paper: str, claim: str) -> Entry:
    return Entry(name, number, paper, "pretrain", way, claim, f"mycel.pretrain.{name}", factory)


PLANNING: tuple[Entry, ...] = (
    _planned(
        "parallel_layouts",
        53,
        "collectives",
        "run_layouts",
        "Hagemann et al. 2023, Efficient Parallelization Layouts for Large-Scale Distributed Model Training",
        "the best layout does without recomputation where memory allows, and a cost model finds it",
    ),
    _planned(
        "cross_cloud",
        68,
        "rounds",
        "CrossCloud",
        "Yang et al. 2024, Research on Key Technologies for Cross-Cloud Federated Training of Large Language Models",
        "steps by speed leave a tenth idle, equal ones four; bad clouds lose weight; prices say where to meet",
    ),
    _planned(
        "swarm_stages",
        None,
        "segments",
        "trained",
        "Ryabinin et al. 2023, SWARM Parallelism: Training Large Models Can Be Surprisingly Communication-Efficient",
        "unequal peers serve by their speed; those that leave change no loss, and those that move keep the pace",
    ),
    _planned(
        "distmm",
        54,
        "decisions",
        "towers",
        "Huang et al. 2024, DISTMM: Accelerating Distributed Multimodal Model Training",
        "a batch-sync keeps every negative: gradients of the uncut batch, in a pipeline with short bubbles",
    ),
    _planned(
        "spindle",
        55,
        "decisions",
        "contracted",
        "Wang et al. 2024, Spindle: Efficient Distributed Training of Multi-Task Large Models via Wavefront Scheduling",
        "waves of malleable runs end within 1.15 of the continuous optimum, sooner than one task after another",
    ),
    _planned(
        "fusionllm",
        70,
        "segments",
        "two_sites",
        "Tang et al. 2024, FusionLLM: A Decentralized LLM Training System on Geo-distributed GPUs",
        "slow links are crossed once; squeezing them alone is 1.45 times as fast or more and costs less of the loss",
    ),
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
