"""A rank of the tests of gradient codecs: what every rank ends with, and what it sent."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from equality_worker import batch, model, reference
from mycel.collectives.apply import lay_out
from mycel.collectives.hooks import CodecExchange, gather_frames
from mycel.collectives.ranks import make_ranks, process_group
from mycel.collectives.step import Trainer, full_gradients
from mycel.errors import ParcelError
from mycel.recipe.schema import Layout

SPECS = ("raw", "bf16", "int8(32)", "topk(0.25)", "lattice(8)", "topk(0.25)+int8(32)+zstd")


def gradient(rank: int, step: int) -> torch.Tensor:
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(100 * step + rank))


def summed(spec: str, feedback: bool, steps: int) -> tuple[torch.Tensor, torch.Tensor, int, bool]:
    """Sum over steps of what arrived, of the true means, this rank's bytes, and whether all ranks got the same."""
    size, rank = dist.get_world_size(), dist.get_rank()
    exchange = CodecExchange(make_ranks(Layout(data=size), torch.device("cpu")), spec, feedback)
    weight = nn.Parameter(torch.zeros(16, 32))
    arrived, true, alike = torch.zeros(16, 32), torch.zeros(16, 32), True
    for step in range(steps):
        weight.grad = gradient(rank, step)
        exchange.average({"weight": weight})
        assert weight.grad is not None
        everyone = [torch.empty_like(weight.grad) for _ in range(size)]
        dist.all_gather(everyone, weight.grad)
        alike = alike and all(torch.equal(each, weight.grad) for each in everyone)
        arrived += weight.grad
        true += torch.stack([gradient(each, step) for each in range(size)]).mean(0)
    return arrived, true, exchange.sent, alike


def model_off() -> float:
    """Largest relative difference of loss and gradients from one process, where gradients cross as raw frames."""
    loss, wanted = reference(True)
    ranks = make_ranks(Layout(data=2, codec="raw"), torch.device("cpu"))
    stage = lay_out(model(True), ranks)
    exchange = CodecExchange(ranks, "raw")
    trainer = Trainer(stage, ranks, torch.optim.SGD(stage.parameters(), lr=0.1), exchange=exchange)
    worst = abs(trainer.gradients(batch()) - loss) / loss
    for name, found in full_gradients(trainer):
        worst = max(worst, float((found - wanted[name]).norm() / wanted[name].norm()))
    return worst


def main() -> None:
    torch.set_num_threads(1)
    with process_group():
        rank = dist.get_rank()
        report: dict[str, Any] = {}
        for spec in SPECS:
            once, mean, sent, alike = summed(spec, False, 1)
            many, means, _, _ = summed(spec, True, 30)
            report[spec] = {
                "off": float((once - mean).norm() / mean.norm()),
                "off_over_time": float((many - means).norm() / means.norm()),
                "sent": sent,
                "alike": alike,
            }
        frames = gather_frames(bytes([rank]) * (3 + 5 * rank), dist.distributed_c10d._get_default_group())
        report["frames"] = [list(frame) for frame in frames]
        exchange = CodecExchange(make_ranks(Layout(data=2), torch.device("cpu")), "raw")
        weight = nn.Parameter(torch.zeros(2))
        weight.grad = torch.ones(2)
        try:
            exchange.average({f"weight.{rank}": weight})
        except ParcelError as error:
            report["refused"] = str(error)
        report["model"] = model_off()
        if rank == 0:
            Path(sys.argv[1]).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
