"""Decoding speed beside ``transformers``' own ``generate``, one thread, and the share of what memory can deliver.

A random Llama of 55 million parameters (12 blocks of width 512, vocabulary 32,000). Batch 1: prompt of 32 tokens, 64
new ones. Batch 8, alike: the same eight times. Batch 8, unequal: prompts of 8 to 64 tokens, 16 to 128 new ones;
``generate`` pads to the longest prompt and runs to the longest answer, the engine does neither. Tokens per second
count the tokens that were asked for, prefill included; each contestant's best of ``--repeats`` runs, taken in turn.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from common import arguments, show
from mycel.generation.engine import Engine, Limits
from mycel.generation.executor import Whole
from mycel.generation.gguf import write_gguf
from mycel.generation.request import Request
from mycel.models.base import find_base

VOCABULARY = 32_000
WEIGHTS = 4 * (VOCABULARY * 512 + 12 * (4 * 512 * 512 + 3 * 512 * 1408 + 2 * 512) + 512)  # bytes read for a token
BASELINE = "transformers generate fp32"
LLAMA = "llama.cpp bf16"  # takes part where llama-cpp-python is installed
CONTESTANTS: tuple[str, ...] = (BASELINE, "mycel, packed", "mycel, one copy of weights", "ctranslate2 int8")
CONTESTANTS += (LLAMA,) * (importlib.util.find_spec("llama_cpp") is not None)
Job = tuple[list[int], int]  # a prompt and the number of tokens wanted


def model_of_55m() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def jobs_of(lengths: list[tuple[int, int]]) -> list[Job]:
    source = torch.Generator().manual_seed(1)
    return [(torch.randint(3, VOCABULARY, (prompt,), generator=source).tolist(), most) for prompt, most in lengths]


LOADS = {
    "batch 1": jobs_of([(32, 64)]),
    "batch 8, alike": jobs_of([(32, 64)] * 8),
    "batch 8, unequal": jobs_of([(8 * (1 + index), 16 * (1 + (3 * index) % 8)) for index in range(8)]),
}


def generate(model: PreTrainedModel, jobs: list[Job]) -> None:
    longest = max(len(prompt) for prompt, _ in jobs)
    most = max(wanted for _, wanted in jobs)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in jobs])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in jobs])
    settings = {"max_new_tokens": most, "min_new_tokens": most, "do_sample": False, "pad_token_id": 0}
    model.generate(ids, attention_mask=mask, eos_token_id=None, **settings)


def engine_runner(executor: Whole) -> Callable[[list[Job]], None]:
    def run(jobs: list[Job]) -> None:
        engine = Engine(executor, limits=Limits(share=False))
        for prompt, most in jobs:
            engine.submit(Request(tuple(prompt), most), lambda token: None)
        engine.run()

    return run


def ctranslate_runner(model: PreTrainedModel, folder: Path) -> Callable[[list[Job]], None]:
    import ctranslate2
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from mycel.generation.ctranslate import convert

    words = Tokenizer(models.WordLevel({f"t{index}": index for index in range(VOCABULARY)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2", unk_token="t0", bos_token="t1").save_pretrained(
        folder
    )
    model.save_pretrained(folder)
    convert(folder, folder / "int8", "int8")
    generator = ctranslate2.Generator(str(folder / "int8"), device="cpu", intra_threads=1)

    def run(jobs: list[Job]) -> None:
        generator.generate_batch(
            [[f"t{token}" for token in prompt] for prompt, _ in jobs],
            max_length=max(most for _, most in jobs),
            include_prompt_in_result=False,
            end_token=[],
            sampling_topk=1,
            callback=lambda step: step.step + 1 >= jobs[step.batch_id][1],
        )

    return run


def llama_runner(model: PreTrainedModel, folder: Path) -> Callable[[list[Job]], None]:
    import llama_cpp

    AutoTokenizer.from_pretrained(find_base("micro")).save_pretrained(folder)
    model.save_pretrained(folder)
    write_gguf(folder, folder / "model.gguf", "bf16")
    llama = llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=2048, n_threads=1, n_threads_batch=1, verbose=False)

    def run(jobs: list[Job]) -> None:
        for prompt, most in jobs:
            llama.reset()  # otherwise what it still holds of an equal prompt would be free
            for made, _ in enumerate(llama.generate(prompt, temp=0.0), 1):
                if made == most:
                    break

    return run


def bandwidth() -> float:
    """Bytes a second that one thread reads from memory."""
    block = torch.ones(64 << 20)
    best = 0.0
    for _ in range(8):
        started = time.perf_counter()
        block.sum()
        best = max(best, block.nbytes / (time.perf_counter() - started))
    return best


def contestant(name: str, calls: Connection) -> None:
    """Run in a process of its own, so that no engine's libraries change another's: a load in, seconds out."""
    torch.set_num_threads(1)
    with torch.inference_mode(), tempfile.TemporaryDirectory(prefix="mycel-") as folder:
        model = model_of_55m()
        run: Callable[[list[Job]], None]
        if name == BASELINE:
            run = partial(generate, model)
        elif name == "ctranslate2 int8":
            run = ctranslate_runner(model, Path(folder))
        elif name == LLAMA:
            run = llama_runner(model, Path(folder))
        else:
            run = engine_runner(Whole(model, pack=name == "mycel, packed"))
        run(LOADS["batch 1"])
        calls.send(0.0)
        while (load := calls.recv()) is not None:
            started = time.perf_counter()
            run(LOADS[load])
            calls.send(time.perf_counter() - started)


def measure(repeats: int) -> list[dict[str, Any]]:
    spawn = get_context("spawn")
    calls: dict[str, Connection] = {}
    for name in CONTESTANTS:
        calls[name], theirs = spawn.Pipe()
        spawn.Process(target=contestant, args=(name, theirs), daemon=True).start()
        calls[name].recv()
    best = {(load, name): 0.0 for load in LOADS for name in CONTESTANTS}
    reads = 0.0
    for _ in range(repeats):
        reads = max(reads, bandwidth())
        for load, name in best:
            calls[name].send(load)
            speed = sum(most for _, most in LOADS[load]) / calls[name].recv()
            best[load, name] = max(best[load, name], speed)
    for pipe in calls.values():
        pipe.send(None)
    return [row(load, name, speed, best[load, BASELINE], reads) for (load, name), speed in best.items()]


def row(load: str, name: str, speed: float, baseline: float, reads: float) -> dict[str, Any]:
    share = f"{speed * WEIGHTS / reads:.0%}" if load == "batch 1" and "int8" not in name and "bf16" not in name else ""
    ratio = round(speed / baseline, 2)
    return {"load": load, "engine": name, "tokens/s": round(speed, 1), "ratio": ratio, "of bandwidth": share}


def main() -> None:
    options = arguments(__doc__ or "", repeats={"type": int, "default": 3})
    torch.set_num_threads(1)
    show("Decoding, 55 M parameters, fp32 unless said, one thread", measure(options.repeats), options.json)


if __name__ == "__main__":
    main()
