"""A rank of the equality tests: every layout that fits the world, its loss and gradients against one process's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from mycel.collectives.apply import lay_out
from mycel.collectives.ranks import make_ranks, process_group
from mycel.collectives.step import Trainer, full_gradients, targets_of
from mycel.decisions.layout import layouts, ranks_of
from mycel.models.random_llama import llama_config
from mycel.recipe.schema import Layout

ROWS, LENGTH = 4, 16


def config(tied: bool) -> LlamaConfig:
    return llama_config(32, 4, 64, 48, tie_word_embeddings=tied)


def model(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(5)
    return LlamaForCausalLM(config(tied)).double()


def batch() -> torch.Tensor:
    return torch.randint(0, 64, (ROWS, LENGTH), generator=torch.Generator().manual_seed(6))


def reference(tied: bool) -> tuple[float, dict[str, torch.Tensor]]:
    uncut, rows = model(tied), batch()
    logits = uncut(input_ids=rows).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 64), targets_of(rows).reshape(-1), ignore_index=-100)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), {name: weight.grad for name, weight in uncut.named_parameters()}


def deviation(layout: Layout, tied: bool) -> float:
    """Largest relative difference of loss and gradients between a layout and one process."""
    loss, wanted = reference(tied)
    ranks = make_ranks(layout, torch.device("cpu"))
    stage = lay_out(model(tied), ranks)
    trainer = Trainer(stage, ranks, torch.optim.SGD(stage.parameters(), lr=0.1))
    found = trainer.gradients(batch())
    worst = abs(found - loss) / loss
    for name, gradient in full_gradients(trainer):
        worst = max(worst, float((gradient - wanted[name]).norm() / wanted[name].norm()))
    return worst


def cases(ranks: int) -> list[Layout]:
    plain = list(layouts(ranks, config(True), ROWS, LENGTH, micro_batches=2))
    piped = [layout.model_copy(update={"schedule": "gpipe"}) for layout in plain]
    more = [
        layout.model_copy(update={"recompute": True}) for layout in plain if layout.sequence > 1 or layout.tensor > 1
    ]
    return piped + more[:3] + scheduled(ranks)


def scheduled(ranks: int) -> list[Layout]:
    """The schedules that loop and those that divide the way back, alone and with other ways of sharing."""
    if ranks == 1:
        return []
    looped = [("interleaved", 2), ("breadth_first", 2), ("zero_bubble", 1), ("zero_bubble", 2), ("zbv", 2)]
    mixed = [("zbv", "tensor", False), ("zbv", "data", True), ("zbv", "sequence", False)]
    mixed += [("breadth_first", "data", True), ("zero_bubble", "data", False), ("1f1b", "data", True)]
    even = [
        Layout.model_validate({"sequence": ranks, "attention": "balanced", "recompute": again, "micro_batches": 2})
        for again in (False, True)
    ]
    if ranks == 2:
        return even + [Layout(pipeline=2, micro_batches=4, schedule=name, chunks=chunks) for name, chunks in looped]  # type: ignore[arg-type]
    return even + [
        Layout.model_validate(
            {
                axis: 2,
                "pipeline": 2,
                "micro_batches": 2,
                "schedule": name,
                "chunks": 1 if name in {"1f1b", "zero_bubble"} else 2,
                "recompute": again,
            }
        )
        for name, axis, again in mixed
    ]


def main() -> None:
    torch.set_num_threads(1)
    with process_group():
        report = {}
        for layout in cases(dist.get_world_size()):
            assert ranks_of(layout) == dist.get_world_size()
            for tied in (True, False):
                worst = torch.tensor(deviation(layout, tied))
                dist.all_reduce(worst, op=dist.ReduceOp.MAX)
                report[f"{layout.model_dump_json()} tied={tied}"] = float(worst)
        if dist.get_rank() == 0:
            Path(sys.argv[1]).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
