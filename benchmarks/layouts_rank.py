"""A rank of ``benchmarks/layouts.py``: every layout of this world, its step's seconds, bytes and memory."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from mycel.collectives.apply import lay_out
from mycel.collectives.layout import layouts
from mycel.collectives.ranks import make_ranks
from mycel.collectives.step import Trainer
from mycel.collectives.traffic import Traffic
from mycel.recipe.schema import Layout
from mycel.rounds.footprint import Footprint

SHAPES = ((128, 4, 8, 64), (128, 4, 16, 64), (192, 4, 8, 128))  # hidden, blocks, rows, tokens
STEPS = 4


def config(hidden: int, blocks: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )


def model(shape: tuple[int, int, int, int]) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(config(shape[0], shape[1]))


def measure(shape: tuple[int, int, int, int], layout: Layout) -> dict[str, Any]:
    """Time whole steps, then count one step's bytes and memory; the slowest and fullest rank counts."""
    rows = torch.randint(0, 1024, (shape[2], shape[3]), generator=torch.Generator().manual_seed(2))
    ranks = make_ranks(layout, torch.device("cpu"))
    stage = lay_out(model(shape), ranks)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-3)
    trainer = Trainer(stage, ranks, optimizer, clip_norm=0.0)
    trainer.step(rows, 1e-3)
    seconds = []
    for _ in range(STEPS):
        dist.barrier()
        started = time.perf_counter()
        trainer.step(rows, 1e-3)
        seconds.append(time.perf_counter() - started)
    with Traffic() as traffic:
        trainer.step(rows, 1e-3)
    with Footprint() as footprint:
        trainer.step(rows, 1e-3)
    held = sum(tensor.numel() * tensor.element_size() for tensor in _kept(stage, optimizer))
    found = torch.tensor([sorted(seconds)[STEPS // 2], float(footprint.peak + held), float(traffic.bytes)])
    total = found.clone()
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return {
        "shape": shape,
        "layout": layout.model_dump(mode="json"),
        "ranks": dist.get_world_size(),
        "seconds": float(found[0]),
        "memory": float(found[1]),
        "bytes": float(total[2]),
    }


def _kept(stage: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    weights = [getattr(parameter, "_local_tensor", parameter) for parameter in stage.parameters()]
    moments = [
        getattr(value, "_local_tensor", value)
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    return [*weights, *moments]


def bare(shape: tuple[int, int, int, int]) -> float:
    """Median seconds of a step of a plain FSDP2 script on the same work."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plain = model(shape)
    for layer in plain.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(plain, mesh=mesh)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    rows = torch.randint(0, 1024, (shape[2], shape[3]), generator=torch.Generator().manual_seed(2))
    own = rows.chunk(dist.get_world_size())[dist.get_rank()]
    seconds = []
    for _ in range(2 * STEPS + 1):
        dist.barrier()
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        plain(input_ids=own, labels=own).loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds[1:])[STEPS]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    count = dist.get_world_size()
    rows: list[dict[str, Any]] = []
    try:
        for shape in SHAPES:
            for pieces in (1, 2) if count > 1 else (1,):
                for layout in layouts(count, config(*shape[:2]), shape[2], shape[3], pieces):
                    if pieces > 1 and layout.pipeline == 1:
                        continue
                    rows.append(measure(shape, layout))
        if count > 1:
            rows.append({"ranks": count, "bare": bare(SHAPES[0]), "shape": SHAPES[0]})
        if dist.get_rank() == 0:
            Path(sys.argv[1]).write_text(json.dumps(rows), encoding="utf-8")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
