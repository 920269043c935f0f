"""Breadth-first pipelines (Lamy-Poirier 2023) and what they are held against: GPipe, 1F1B, interleaved 1F1B.

    rank p of P holds v stages: p, p + P, p + 2 P, ...
    breadth-first: all M pieces through a stage before the next stage begins; the way back in reverse
    bubble:        (P - 1) / (v M + P - 1) of a rank's time, where one stage a rank waits (P - 1) / (M + P - 1)

``layout.schedule = "breadth_first"`` with ``layout.chunks = v``; the order is `torch.distributed.pipelining`'s. With
one chunk it is GPipe. Loss and gradients are those of one process whatever the order.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaForCausalLM

from mycel.collectives.apply import lay_out
from mycel.collectives.bubbles import Action, bubble, expected
from mycel.collectives.ranks import make_ranks
from mycel.collectives.step import Trainer, full_gradients, targets_of
from mycel.collectives.together import together
from mycel.models.random_llama import llama_config
from mycel.recipe.schema import Layout
from mycel.rounds.laboratory import Measured

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory

WORK = 0.04  # seconds that a rank's device takes for a forward, and for each half of a way back
LENGTH, VOCABULARY = 16, 64


def decoder(blocks: int) -> LlamaForCausalLM:
    """Return a small decoder in double precision, the same in every process."""
    torch.manual_seed(5)
    return LlamaForCausalLM(llama_config(32, blocks, VOCABULARY, 48, tie_word_embeddings=True)).double()


def scheduled(layout: Layout, blocks: int, work: float, device: torch.device) -> dict[str, Any]:
    """Take one gradient as a rank; return its trace and how far it lies from one process's."""
    model, source = decoder(blocks), torch.Generator().manual_seed(6)
    rows = torch.randint(0, VOCABULARY, (layout.micro_batches, LENGTH), generator=source)
    loss = torch.nn.functional.cross_entropy(
        model(input_ids=rows).logits.reshape(-1, VOCABULARY), targets_of(rows).reshape(-1), ignore_index=-100
    )
    loss.backward()  # type: ignore[no-untyped-call]
    wanted = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    ranks = make_ranks(layout, device)
    stage = lay_out(decoder(blocks), ranks)
    trainer = Trainer(stage, ranks, torch.optim.SGD(stage.parameters(), lr=0.1))
    trainer.gradients(rows)  # the first one also agrees on shapes
    trainer.trace.actions.clear()
    trainer.trace.work = work
    for weight in stage.parameters():
        weight.grad = None
    alone = float(loss.detach())
    apart = abs(trainer.gradients(rows) - alone) / alone
    for name, gradient in full_gradients(trainer):
        apart = max(apart, float((gradient - wanted[name]).norm() / wanted[name].norm()))
    return {"apart": apart, "trace": trainer.trace.actions}


def measured(schedule: str, pieces: int, chunks: int, ranks: int = 4, work: float = WORK) -> tuple[float, float]:
    """Return the bubble that real ranks' traces show, and the largest relative difference from one process."""
    layout = Layout.model_validate({"pipeline": ranks, "micro_batches": pieces, "schedule": schedule, "chunks": chunks})
    found = together(ranks, partial(scheduled, layout, ranks * 2, work))
    traces = [[Action(*action) for action in each["trace"]] for each in found]
    return bubble(traces), max(each["apart"] for each in found)


def claim(lab: Laboratory) -> Measured:
    """Four ranks, two stages each: the bubble is the formula's, and so are those it is held against."""
    cases = [("gpipe", 4, 1), ("1f1b", 4, 1), ("interleaved", 4, 2), ("breadth_first", 4, 2)]
    return judged(cases)


def judged(cases: list[tuple[str, int, int]]) -> Measured:
    """Hold each schedule's measured bubble to its formula; at most 0.04 off, and gradients those of one process."""
    texts: list[str] = []
    figures: dict[str, float] = {}
    off = apart = 0.0
    for schedule, pieces, chunks in cases:
        found, difference = measured(schedule, pieces, chunks)
        theory = expected(schedule, 4, pieces, chunks)
        texts.append(f"{schedule} {found:.3f} ({theory:.3f})")
        figures |= {f"{schedule}_{pieces}_bubble": found}
        off, apart = max(off, abs(found - theory)), max(apart, difference)
    return Measured(
        f"4 ranks of {1e3 * WORK:g} ms a pass, bubble measured (by formula): {', '.join(texts)}; "
        f"loss and gradients at most {apart:.0e} from one process's",
        off < 0.04 and apart < 1e-6,
        {**figures, "apart": apart},
    )
