"""Distributed CPU inference: token ids instead of embeddings, one sum per layer, no copies.

He et al., "Distributed Inference Performance Optimization for LLMs on CPUs", 2024 (the engine is xFasterTransformer).

Ranks hold shares of every block. Per token the master broadcasts *ids* (4 bytes each) and every rank embeds them
itself, where an embedding would be 4 d bytes. In families whose attention and feed-forward part stand side by side,
y = x + Attn(x) + FFN(x), partial results are added up *once* per layer, not twice; the residual and biases belong to
one rank, or they would be added n times. What the last matrix product wrote is what the link sends: no copy between.

Here: ``segments.ranks`` with ``ids`` and ``syncs=1``; reduces to ``tpi_llm`` without them. Not built: sharding the
head's vocabulary with local candidates; the master computes all logits.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from mycel.models.cut import Cut
from mycel.rounds.laboratory import Laboratory, Measured
from mycel.segments.mesh import HEADER
from mycel.segments.ranks import COMMAND, Group, Master, ranks

PROMPT, TOKENS = [7, 99, 12, 5, 300], 8
WIDTH, DEPTH = 128, 4


def claim(lab: Laboratory) -> Measured:
    """Count what crosses per token with one sum a layer and with two, with ids and with states."""
    folder = _model(lab.folder / "neox")
    found = {}
    for name, syncs, ids in (("one sum, ids", 1, True), ("two sums, ids", 2, True), ("one sum, states", 1, False)):
        with ranks(Group(folder, (1.0, 1.0), syncs=syncs, ids=ids)) as master:
            found[name] = _step(master)
    whole = Cut.open(folder)
    with torch.inference_mode():
        right = whole.head(whole.run(whole.embed(torch.tensor([[*PROMPT, 3]]))))[0, -1]
    gap = max(float((logits - right).abs().max() / right.abs().max()) for logits, _, _ in found.values())
    state = 4 * WIDTH
    # Per token the master sends a command, the ids, and one sum a layer; a worker sends one partial result a layer.
    expected = 2 * HEADER.size + COMMAND.size + 4 + DEPTH * (HEADER.size + state)
    one, two, states = (found[name][1] for name in found)
    saved = two - one == DEPTH * (HEADER.size + state) and found["two sums, ids"][2] == 2 * found["one sum, ids"][2]
    return Measured(
        f"logits within {gap:.1g} of the whole model's; a token takes {one:,} bytes from the master with one sum"
        f" a layer and ids ({expected:,} by count), {two:,} with two sums, {states:,} with states for ids",
        gap < 1e-4 and one == expected and saved and states - one == state - 4,
        {"gap": gap, "bytes_one": one, "bytes_two": two, "bytes_states": states},
    )


def _step(master: Master) -> tuple[torch.Tensor, int, int]:
    """Return a token's logits, the bytes that the master sent for it, and the sums that were made."""
    master.step(torch.tensor([PROMPT]))
    sent, calls = master.mesh.sent, master.sums.calls
    logits = master.step(torch.tensor([[3]]))[0]
    return logits, master.mesh.sent - sent, master.sums.calls - calls


def _model(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        config = GPTNeoXConfig(
            vocab_size=512,
            hidden_size=WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=4,
            intermediate_size=4 * WIDTH,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
