"""One rank of ``islands.py``: an island's step beside a bare FSDP2 script's, and ACCO's stages over a held link."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from mycel.collectives.apply import lay_out
from mycel.collectives.overlap import Made, Overlap
from mycel.collectives.ranks import make_ranks, process_group
from mycel.collectives.step import Trainer
from mycel.pretrain.acco import joined
from mycel.pretrain.weights import advance
from mycel.recipe.schema import Layout, Training
from mycel.wire.parcel import Tensors

PAIRS, ROWS, LENGTH = 24, 8, 128
STAGES, MEGABITS = 12, 100.0


def model(hidden: int = 256, layers: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(3)
    shape = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=2048, **shape, **heads))


def timed(step: Callable[[], Any]) -> float:
    dist.barrier()
    started = time.perf_counter()
    step()
    dist.barrier()
    return time.perf_counter() - started


def overhead() -> dict[str, Any]:
    """Steps of both in turn, so that what disturbs the machine disturbs both; the median of the pairs' ratios."""
    ranks = make_ranks(Layout(data=dist.get_world_size()), torch.device("cpu"))
    stage = lay_out(model(), ranks)
    trainer = Trainer(stage, ranks, torch.optim.AdamW(stage.parameters(), lr=1e-3), clip_norm=0.0)
    mesh, plain = init_device_mesh("cpu", (dist.get_world_size(),)), model()
    for layer in plain.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(plain, mesh=mesh)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    rows = torch.randint(0, 2048, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    own = rows.chunk(dist.get_world_size())[dist.get_rank()]

    def bare() -> None:
        optimizer.zero_grad(set_to_none=True)
        plain(input_ids=own, labels=own).loss.backward()
        optimizer.step()

    pairs = [(timed(lambda: trainer.step(rows, 1e-3)), timed(bare)) for _ in range(PAIRS + 2)][2:]
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    return {
        "seconds": median(ours for ours, _ in pairs),
        "bare": median(theirs for _, theirs in pairs),
        "ratio": median(ratios),
        "quartiles": [ratios[PAIRS // 4], ratios[3 * PAIRS // 4]],
    }


def acco() -> dict[str, Any]:
    """ACCO's recursion over two ranks: a stage's time beside computing and sending alone, and one after the other."""
    net = model(hidden=128)
    weights = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    training, overlap = Training(learning_rate=1e-3), Overlap(megabits=MEGABITS)
    chance = torch.Generator().manual_seed(dist.get_rank())
    batches = 1

    def compute() -> Made:
        net.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, weight in net.named_parameters():
                weight.copy_(place[name])
        for _ in range(batches):
            rows = torch.randint(0, 2048, (4, LENGTH), generator=chance)
            (net(input_ids=rows, labels=rows).loss * rows.numel()).backward()
        return {name: weight.grad for name, weight in net.named_parameters() if weight.grad is not None}, batches * 512

    place = weights
    made = compute()
    sending = median(timed(lambda: overlap.sum(made)) for _ in range(5))
    one = median(timed(compute) for _ in range(5))
    batches = max(1, round(sending / one))  # as many as fit into the sending, as the system chooses them
    computing = median(timed(compute) for _ in range(5))
    stages: list[float] = []
    memory: Tensors = {}
    half = made
    for number in range(STAGES):
        dist.barrier()
        started = time.perf_counter()
        fresh, (total, tokens) = overlap.stage(compute, made)
        mean = {name: tensor / tokens for name, tensor in total.items()}
        if number % 2:
            both = joined(half[0], half[1], mean, tokens)
            weights, memory = advance(weights, both, memory, training, 1e-3)
            place = weights
        else:
            half = mean, tokens
            place, _ = advance(weights, mean, memory, training, 1e-3)
        made = fresh
        stages.append(time.perf_counter() - started)
    waiting = median(timed(lambda: overlap.sum(compute())) for _ in range(5))
    overlap.close()
    longer = max(computing, sending)
    return {
        "computing": computing,
        "sending": sending,
        "stage": median(stages),
        "waiting": waiting,
        "ratio": median(stages) / longer,
        "ratio_waiting": waiting / longer,
        "batches": batches,
    }


def main() -> None:
    torch.set_num_threads(1)
    with process_group():
        found = {"overhead": overhead(), "acco": acco()}
        if dist.get_rank() == 0:
            Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
