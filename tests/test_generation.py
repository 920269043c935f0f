"""The acceptance test of generation: whatever the combination of parts, the stream is plain greedy decoding."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from mycel.generation.engine import Engine, Limits, greedy
from mycel.generation.executor import Whole
from mycel.generation.scheduler import FirstComeFirstServed
from mycel.segments.executor import Pipeline
from mycel.serve.prompt_lookup import PromptLookup
from swarms import bench

VOCABULARY = 97
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, **HEADS}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {**SHAPE, "num_key_value_heads": 2},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "GPTNeo": {
        "hidden_size": 32,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "num_heads": 4,
        "window_size": 8,
        "max_position_embeddings": 128,
    },
    "GPTNeoX": SHAPE,
    "OPT": {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, **HEADS},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Phi": SHAPE,
    "Gemma": {**SHAPE, "num_key_value_heads": 1, "head_dim": 8},
    "Gemma2": {**SHAPE, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "Mistral": {**SHAPE, "num_key_value_heads": 2, "sliding_window": 8},
    "Qwen2": {**SHAPE, "num_key_value_heads": 2},
    "Qwen3": {**SHAPE, "num_key_value_heads": 2, "head_dim": 8},
}
PROMPTS = [[5, 9, 17], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50], [7] * 6, [5, 9, 17, 3, 60, 61], [90]]
MOST = 14


def made(family: str, seed: int = 0) -> PreTrainedModel:
    """Return a small random decoder whose logits are spread widely, so that no two tokens are nearly tied."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, **FAMILIES[family]
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def plain(model: PreTrainedModel, prompts: list[list[int]], most: int = MOST) -> list[list[int]]:
    """Greedy decoding by transformers, one prompt at a time, nothing ended early."""
    settings = {"max_new_tokens": most, "min_new_tokens": most, "do_sample": False, "pad_token_id": 0}
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **settings)
        found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_continues_as_plain_greedy_decoding_does(family: str) -> None:
    model = made(family)
    wanted = plain(model, PROMPTS)
    engine = Engine(Whole(model), limits=Limits(page=4, tokens=9))
    assert greedy(engine, PROMPTS, MOST) == wanted
    assert engine.pool.held == 0


STORES = {
    "roomy": lambda position: {"memory": 200 * 4 * position},
    "short of pages, moved aside": lambda position: {"memory": 13 * 4 * position, "share": False},
    "short of pages, computed again": lambda position: {"memory": 13 * 4 * position, "share": False, "aside": 0},
    "short of pages, shared": lambda position: {"memory": 13 * 4 * position},
}
SCHEDULES = {"whole prompts": {"tokens": 64}, "chunks": {"tokens": 6}, "one at a time": {"jobs": 1}}


@pytest.fixture(scope="module")
def wanted() -> list[list[int]]:
    return plain(made("Llama", seed=1), PROMPTS)


@pytest.mark.parametrize(("store", "schedule"), list(product(STORES, SCHEDULES)))
def test_every_combination_continues_alike(wanted: list[list[int]], store: str, schedule: str) -> None:
    executor = Whole(made("Llama", seed=1))
    keep: Callable[[int], dict[str, Any]] = STORES[store]
    limits = Limits(page=4, **{**keep(executor.position_bytes), **SCHEDULES[schedule]})
    engine = Engine(executor, limits=limits, policy=FirstComeFirstServed())
    assert greedy(engine, PROMPTS, MOST) == wanted
    assert greedy(engine, PROMPTS, MOST) == wanted, "what is kept of earlier requests changes later ones"
    assert engine.pool.held == 0
    assert engine.aside.bytes == 0
    if store.startswith("short") and schedule != "one at a time":
        assert engine.counts.set_aside > 0, "nothing was ever short"


@pytest.mark.parametrize("ranges", [[(0, 2)], [(0, 1), (1, 2)]], ids=["one peer", "two peers"])
@pytest.mark.parametrize("guessing", [False, True], ids=["plain", "guessing"])
def test_a_pipeline_over_peers_continues_alike(
    wanted: list[list[int]], tmp_path: Path, ranges: list[tuple[int, int]], guessing: bool
) -> None:
    made("Llama", seed=1).save_pretrained(tmp_path)

    async def run() -> tuple[list[list[int]], Engine]:
        async with bench(tmp_path, ranges) as peers:
            pipeline = Pipeline(peers.model, asyncio.get_running_loop())
            drafter = PromptLookup() if guessing else None
            engine = Engine(pipeline, limits=Limits(page=4, tokens=9, jobs=3), drafter=drafter)
            return await asyncio.to_thread(greedy, engine, PROMPTS, MOST), engine

    found, engine = asyncio.run(run())
    assert found == wanted
    assert engine.pool.held == 0
