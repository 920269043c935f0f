"""A rank of the layout study: every layout of two ranks on one shape, its step's seconds and fullest rank's bytes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from mycel.collectives.apply import lay_out
from mycel.collectives.ranks import make_ranks, process_group
from mycel.collectives.step import Trainer
from mycel.decisions.layout import layouts
from mycel.models.footprint import Footprint
from mycel.models.random_llama import llama_config
from mycel.recipe.schema import Layout

ROWS, LENGTH, STEPS = 8, 64, 4


def config() -> LlamaConfig:
    """Four blocks, wide enough that operators cost more than their launches."""
    return llama_config(160, 4, 512, 480)


def candidates(ranks: int) -> Iterator[Layout]:
    """Every way to divide, pipelines with several numbers of micro-batches, with and without recomputation."""
    for pieces in (1, 2, 4, 8):
        for layout in layouts(ranks, config(), ROWS, LENGTH, pieces):
            if layout.pipeline > 1 or pieces == 1:
                yield layout
                yield layout.model_copy(update={"recompute": True})


def measure(layout: Layout) -> dict[str, Any]:
    """Median seconds of a whole step, and the bytes that it needs at once beside the weights, on the fullest rank."""
    torch.manual_seed(1)
    ranks = make_ranks(layout, torch.device("cpu"))
    stage = lay_out(LlamaForCausalLM(config()), ranks)
    trainer = Trainer(stage, ranks, torch.optim.AdamW(stage.parameters(), lr=1e-3), clip_norm=0.0)
    rows = torch.randint(0, 512, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    trainer.step(rows, 1e-3)
    seconds = []
    for _ in range(STEPS):
        dist.barrier()
        started = time.perf_counter()
        trainer.step(rows, 1e-3)
        seconds.append(time.perf_counter() - started)
    with Footprint() as footprint:
        trainer.step(rows, 1e-3)
    found = torch.tensor([sorted(seconds)[STEPS // 2], float(footprint.peak)])
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return {"layout": layout.model_dump(mode="json"), "seconds": float(found[0]), "bytes": float(found[1])}


def main() -> None:
    """Measure everything; rank 0 writes it down."""
    torch.set_num_threads(1)
    with process_group():
        rows = [measure(layout) for layout in candidates(dist.get_world_size())]
        if dist.get_rank() == 0:
            Path(sys.argv[1]).write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
