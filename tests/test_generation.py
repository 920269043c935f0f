"""The acceptance test of generation: whatever the combination of parts, the stream is plain greedy decoding."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mycel.errors import EngineError, GenerationError
from mycel.generation.engine import Engine, Limits, greedy
from mycel.generation.executor import Executor, Whole
from mycel.generation.memory import Memory, Shape
from mycel.generation.request import Request, Token
from mycel.generation.scheduler import FirstComeFirstServed, Policy, Step, View, fill
from mycel.generation.sharing import by_speed, shares_of
from mycel.generation.tensor_parallel import pack_plan, read_plan
from mycel.generation.weights import open_executor
from mycel.models.linear import quicken, rounded_rows
from mycel.segments.executor import Pipeline
from mycel.segments.weights import Weights
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
MOST = 10


def made(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a small random decoder whose logits are spread widely, so that no two tokens are nearly tied."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, **{**FAMILIES[family], **changes}
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


def write_tokenizer(folder: Path) -> None:
    """Write a tokeniser of one word for each token id."""
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w3"))
    special = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w2", "unk_token": "w3"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_continues_as_plain_greedy_decoding_does(family: str) -> None:
    model = made(family)
    wanted = plain(model, PROMPTS)
    engine = Engine(Whole(model), limits=Limits(page=4, tokens=9))
    assert greedy(engine, PROMPTS, MOST) == wanted
    assert engine.pool.held == 0


class Turns:
    """A policy that pre-empts on purpose: two requests at a time run for six iterations, all others are set aside."""

    def decide(self, view: View) -> Step:
        turn = view.memory if isinstance(view.memory, int) else 0
        at = turn // 6 % len(view.jobs)
        step = fill(replace(view, most_jobs=2), [*view.jobs[at:], *view.jobs[:at]], turn + 1)
        spared = {identity for identity, _ in step.run} | set(step.aside)
        more = [job.id for job in view.jobs if job.place == "resident" and job.id not in spared]
        return replace(step, aside=(*step.aside, *more))


STORES: dict[str, Callable[[int], dict[str, Any]]] = {
    "roomy": lambda position: {"memory": 200 * 4 * position},
    "short of pages, moved aside": lambda position: {"memory": 13 * 4 * position, "share": False},
    "short of pages, computed again": lambda position: {"memory": 13 * 4 * position, "share": False, "aside": 0},
    "short of pages, shared": lambda position: {"memory": 13 * 4 * position},
}
SCHEDULES: dict[str, tuple[type[Policy], dict[str, int]]] = {
    "whole prompts": (FirstComeFirstServed, {"tokens": 64}),
    "chunks": (FirstComeFirstServed, {"tokens": 6}),
    "one at a time": (FirstComeFirstServed, {"jobs": 1}),
    "pre-empted": (Turns, {"tokens": 64}),
}
WEIGHTS = ["resident", "mapped", "tiered(1)", "window(1)"]
EXECUTORS = ["whole", "unequal ranks", "pipeline over peers"]


class Parts:
    """One model under every executor and weight store, each opened when it is first wanted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.opened = folder, dict[tuple[str, str], Executor]()
        model = made("Llama", seed=1, num_key_value_heads=4)
        model.save_pretrained(folder)
        write_tokenizer(folder)
        self.wanted = plain(model, PROMPTS)
        self.loop = asyncio.new_event_loop()
        self.leave = AsyncExitStack()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def executor(self, kind: str, weights: str) -> Executor:
        if (kind, weights) not in self.opened:
            if kind == "pipeline over peers":
                entering = self.leave.enter_async_context(
                    bench(self.folder, [(0, 1), (1, 2)], weights=Weights.parse(weights))
                )
                peers = asyncio.run_coroutine_threadsafe(entering, self.loop).result()
                found: Executor = Pipeline(peers.model, self.loop)
            else:
                found = open_executor(self.folder, weights, () if kind == "whole" else (3.0, 1.0))
            self.opened[kind, weights] = found
        return self.opened[kind, weights]

    def close(self) -> None:
        for executor in self.opened.values():
            executor.close()
        asyncio.run_coroutine_threadsafe(self.leave.aclose(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    made = Parts(tmp_path_factory.mktemp("parts"))
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(("kind", "weights"), list(product(EXECUTORS, WEIGHTS)))
@pytest.mark.parametrize(("store", "schedule"), list(product(STORES, SCHEDULES)))
def test_every_combination_continues_alike(parts: Parts, store: str, schedule: str, kind: str, weights: str) -> None:
    executor = parts.executor(kind, weights)
    policy, more = SCHEDULES[schedule]
    limits = Limits(page=4, **{**STORES[store](executor.position_bytes), **more})
    engine = Engine(executor, limits=limits, policy=policy(), drafter=PromptLookup() if store == "roomy" else None)
    assert greedy(engine, PROMPTS, MOST) == parts.wanted
    if engine.pool.share and store.endswith("shared"):
        assert greedy(engine, PROMPTS, MOST) == parts.wanted, "what is kept of earlier requests changes later ones"
    assert engine.pool.held == 0
    assert engine.aside.bytes == 0
    short = store.startswith("short") and executor.memory is not None and schedule != "one at a time"
    if short or schedule == "pre-empted":
        assert engine.counts.set_aside > 0, "nothing was ever set aside"


class Restless:
    """A policy whose favourites change all the time: two run, whoever is needed makes room."""

    def decide(self, view: View) -> Step:
        turn = view.memory if isinstance(view.memory, int) else 0
        order = sorted(view.jobs, key=lambda job: ((job.id + turn // 7) % 3, job.id))
        return fill(replace(view, most_jobs=2), order, turn + 1)


@pytest.mark.parametrize("pages", [16, 17, 19])
def test_pages_that_others_share_do_not_come_free_and_nobody_is_lost(parts: Parts, pages: int) -> None:
    executor = parts.executor("whole", "resident")
    shared = [5 + index % 7 for index in range(24)]
    prompts = [[*shared, *[40 + place] * (1 + place % 4)] for place in range(5)]
    wanted = greedy(Engine(executor, limits=Limits(page=4)), prompts, 20)
    engine = Engine(executor, limits=Limits(page=4, memory=pages * 4 * executor.position_bytes), policy=Restless())
    assert greedy(engine, prompts, 20) == wanted
    assert engine.counts.set_aside > 0
    assert engine.pool.held == engine.aside.bytes == 0


def test_a_lost_rank_fails_what_is_under_way_and_nothing_after(parts: Parts) -> None:
    others = multiprocessing.active_children()
    executor = open_executor(parts.folder, shares=(1.0, 1.0))
    try:
        engine = Engine(executor, limits=Limits(page=4))
        assert greedy(engine, PROMPTS, MOST) == parts.wanted
        (victim,) = [process for process in multiprocessing.active_children() if process not in others]
        ended: list[Token] = []
        engine.submit(Request(tuple(PROMPTS[1]), MOST), ended.append)
        engine.step()
        victim.kill()
        with pytest.raises(EngineError, match="rank 1 is gone"):
            engine.run()
        engine.fail_all()
        assert ended[-1].reason == "error"
        assert greedy(engine, PROMPTS, MOST) == parts.wanted, "pages of the lost rank were trusted"
        assert engine.pool.held == 0
    finally:
        executor.close()
    assert not set(multiprocessing.active_children()) - set(others)


ROOM = Memory([Shape(1, 2, 2)], 5, 4)


@given(st.lists(st.integers(-2, 9), max_size=24), st.integers(0, 30))
def test_a_rank_takes_no_plan_that_leaves_its_pages(numbers: list[int], tokens: int) -> None:
    try:
        extents = read_plan(numbers, tokens, ROOM)
    except EngineError:
        return
    assert sum(each.end - each.start for each in extents) == tokens
    for each in extents:
        assert 0 <= each.start < each.end <= 4 * len(each.table)
        assert all(0 <= page < 5 for page in each.table)
    assert read_plan(pack_plan(extents).tolist(), tokens, ROOM) == extents


def test_ranks_share_heads_by_speed_or_as_asked(parts: Parts) -> None:
    assert by_speed((3.0, 1.0), 4, 2, 32) == (3.0, 1.0)
    assert by_speed((1.03, 0.97), 4, 2, 32) == (2.0, 2.0)
    assert shares_of("", parts.folder) == ()
    assert shares_of("1:5", parts.folder) == (1.0, 3.0)
    assert shares_of("2", parts.folder) == (2.0, 2.0)
    for bad in ("0", "x", "3:", "1:0", "5", "1:1:1:1:1", "-1", "2:-1"):
        with pytest.raises(GenerationError, match="--tensor-parallel"):
            shares_of(bad, parts.folder)


@pytest.mark.parametrize("text", ["", "tiered", "window(0)", "tiered(x)", "disk", "window(2) "])
def test_weights_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(GenerationError, match="--weights"):
        Weights.parse(text)


@given(rows=st.integers(1, 300), shaped=st.booleans(), biased=st.booleans())
def test_quick_layers_compute_what_layers_compute_for_any_number_of_rows(rows: int, shaped: bool, biased: bool) -> None:
    torch.manual_seed(rows)
    layer = torch.nn.Sequential(torch.nn.Linear(48, 80, bias=biased))
    x = torch.randn((1, rows, 48) if shaped else (rows, 48))
    with torch.inference_mode():
        plain = layer(x)
        quicken(layer)
        found = layer(x)
    assert found.shape == plain.shape
    assert torch.allclose(found, plain, atol=1e-5)


def test_few_numbers_of_rows_are_computed_and_none_far_beyond_what_is_asked() -> None:
    rounded = {rows: rounded_rows(rows) for rows in range(1, 1025)}
    assert all(rows <= more <= 1.25 * rows for rows, more in rounded.items())
    assert len(set(rounded.values())) == 36
