"""Systems that hold one model in segments, as data."""

from __future__ import annotations

from mycel.catalog.entry import Entry


def _segments(name: str, number: int, stage: str, factory: str, paper: str, claim: str) -> Entry:
    return Entry(name, number, paper, stage, "segments", claim, f"mycel.{stage}.{name}", factory)


SWARMING: tuple[Entry, ...] = (
    _segments(
        "petals",
        7,
        "serve",
        "volunteers",
        "Borzunov et al. 2023, Distributed Inference and Fine-tuning of Large Language Models Over The Internet",
        "a lost server changes no token and only its own blocks are rebuilt; 8-bit states cost almost nothing",
    ),
    _segments(
        "distributed_cpu",
        6,
        "serve",
        "claim",
        "He et al. 2024, Distributed Inference Performance Optimization for LLMs on CPUs",
        "token ids down and one sum a layer: half the synchronisations, the same logits",
    ),
    _segments(
        "tpi_llm",
        56,
        "serve",
        "claim",
        "Li et al. 2024, TPI-LLM: Serving 70B-scale LLMs Efficiently on Low-resource Edge Devices",
        "memory does not grow with depth; star beats ring while latency dominates and loses when bandwidth does",
    ),
    _segments(
        "collm",
        45,
        "serve",
        "claim",
        "Li et al. 2024, CoLLM: collaborative LLM inference on edge devices by tensor parallelism",
        "the cost model's number of devices is the best that is measured; adaptive shares make batteries last",
    ),
    _segments(
        "task_scheduling",
        11,
        "serve",
        "ShortestCycle",
        "Ren 2024, Task Scheduling for Decentralized LLM Serving in Heterogeneous Networks",
        "the heuristic's time per token is within a tenth of the least possible, in under a second for 200 machines",
    ),
    _segments(
        "split_lora",
        92,
        "finetune",
        "SplitLora",
        "Lin et al. 2024, SplitLoRA: A Split Parameter-Efficient Fine-Tuning Framework for Large Language Models",
        "one client equals centralised LoRA step by step; more reach at least federated LoRA for a share of its work",
    ),
)
