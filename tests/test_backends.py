"""Engines that others keep, and their formats: the same tokens and logits, or the line that installs them."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mycel.cli.export import export_command
from mycel.errors import ExtraMissing, GenerationError, ModelError
from mycel.generation.backends import Setup, open_engine
from mycel.generation.ctranslate import open_ctranslate
from mycel.generation.gguf import write_gguf
from mycel.generation.request import Request, Sampling, Token
from mycel.generation.served import Found, Served
from mycel.models.base import Base, find_base, save_model
from small_models import ends_early, greedy_text, micro, write_adapter_folder

PROMPTS = ["def add(first, second):\n    ", "import ", "class Name:\n    def __init__(self"]


@pytest.fixture(scope="module")
def base() -> Base:
    return micro()


async def _read(served: Served, request: Request) -> list[Token]:
    return [token async for token in served.backend.stream(request)]


def test_ctranslate2_says_what_transformers_says(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYCEL_CACHE", str(tmp_path))
    served = open_ctranslate(Found("micro", base.folder, {}), 8, "float32")
    try:

        async def ask() -> list[list[Token]]:
            requests = [
                Request(tuple(base.tokenizer(text)["input_ids"]), 16 + index, ends=served.ends)
                for index, text in enumerate(PROMPTS)
            ]
            return await asyncio.gather(*(_read(served, request) for request in requests))

        for index, (text, tokens) in enumerate(zip(PROMPTS, asyncio.run(ask()), strict=True)):
            assert "".join(token.text for token in tokens) == greedy_text(base, text, 16 + index)
            assert tokens[-1].reason == ("stop" if ends_early(base, text, 16 + index) else "length")
        drawn = asyncio.run(_read(served, Request((5, 6, 7), 8, Sampling(1.0))))
        assert len(drawn) == 8
        with pytest.raises(GenerationError, match="seed"):
            asyncio.run(_read(served, Request((5,), 2, Sampling(1.0, seed=3))))
        with pytest.raises(GenerationError, match="penalties"):
            asyncio.run(_read(served, Request((5,), 2, Sampling(1.0, frequency_penalty=1.0))))
    finally:
        served.backend.close()


@pytest.mark.filterwarnings("ignore")  # what transformers' own reader of the format warns of is not ours
def test_gguf_read_by_transformers_computes_the_same_logits(base: Base, tmp_path: Path) -> None:
    run = tmp_path / "run" / "model"
    save_model(base, run / "base")
    write_adapter_folder(base, run / "adapter", seed=1)
    export_command(str(tmp_path / "run"), "gguf", tmp_path / "model.gguf", "f32")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    ids = base.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    read_text = base.tokenizer.decode(
        read.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=0)[
            0, ids.shape[1] :
        ]
    )
    plain = greedy_text(base, PROMPTS[0], 16)
    assert read_text != plain, "the adapter was not merged"
    write_gguf(base.folder, tmp_path / "plain.gguf")
    bare = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="plain.gguf").eval()
    with torch.no_grad():
        assert torch.allclose(bare(ids).logits, base.model(ids).logits, atol=1e-4)
    with pytest.raises(GenerationError, match="exists"):
        export_command(str(tmp_path / "run"), "gguf", tmp_path / "model.gguf", "f32")
    write_gguf(base.folder, tmp_path / "half.gguf", "bf16")
    half = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="half.gguf").eval()
    with torch.no_grad():
        assert 0 < float((half(ids).logits - base.model(ids).logits).abs().max()) < 0.2
    with pytest.raises(ModelError, match="q8_0"):
        write_gguf(base.folder, tmp_path / "other.gguf", "q3")


@pytest.mark.parametrize(("engine", "library"), [("llama.cpp", "llama_cpp"), ("ctranslate2", "ctranslate2")])
def test_a_missing_engine_prints_its_install_line(engine: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == library else found(name, *rest)
    )
    with pytest.raises(ExtraMissing, match="pip install 'mycel"):
        open_engine(engine, Setup(str(find_base("micro")), {}, None, 1 << 20, 1))


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(GenerationError, match="choose one of"):
        open_engine("gpt", Setup("micro", {}, None, 1 << 20, 1))
