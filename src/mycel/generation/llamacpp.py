"""llama.cpp behind the door, on a GGUF file: the fastest single stream on processors and edge machines."""

from __future__ import annotations

import hashlib
import importlib.util
import secrets
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mycel.errors import ExtraMissing
from mycel.generation.batched import Batched, Ticket
from mycel.generation.gguf import write_gguf
from mycel.generation.request import Request
from mycel.generation.served import Found, Served
from mycel.models.cache import cache_folder


class LlamaCpp(Batched):
    """One llama.cpp context; requests are answered one after another."""

    def __init__(self, file: Path, tokenizer: PreTrainedTokenizerFast, context: int, most: int) -> None:
        import llama_cpp

        threads = torch.get_num_threads()
        many = {"n_threads": threads, "n_threads_batch": threads}
        self.model: Any = llama_cpp.Llama(str(file), n_ctx=context, verbose=False, **many)
        super().__init__(tokenizer, len(tokenizer), context, most, 1)

    def alike(self, request: Request) -> Hashable:
        """Return the request's own identity: nothing is batched."""
        return id(request)

    def generate(self, tickets: Sequence[Ticket]) -> None:
        """Generate for one request."""
        ticket = tickets[0]
        drawn = ticket.request.sampling
        # It keeps the last seed: who names none must not repeat another's draw. Its largest means "any".
        self.model.set_seed((secrets.randbits(32) if drawn.seed is None else drawn.seed) % (2**32 - 1))
        tokens = self.model.generate(
            list(ticket.request.prompt), temp=drawn.temperature, top_k=drawn.top_k, top_p=drawn.top_p, min_p=0.0
        )
        for token in tokens:
            if ticket.give(int(token)):
                return

    def close(self) -> None:
        """End the thread, then the model."""
        super().close()
        self.model.close()


def open_llama_cpp(found: Found, most: int, kind: str = "bf16") -> Served:
    """Serve a model with llama.cpp, writing it as GGUF of a kind first where that was not done before."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise ExtraMissing("llama-cpp-python", "llamacpp")
    from mycel.generation.ctranslate import context_of

    weights = sorted((path.name, path.stat().st_mtime_ns) for path in found.base.glob("*.safetensors"))
    key = hashlib.sha256(repr((str(found.base.resolve()), weights)).encode()).hexdigest()[:16]
    file = cache_folder() / "gguf" / f"{found.base.name}-{kind}-{key}.gguf"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if not file.is_file():
            write_gguf(found.base, file, kind)
    tokenizer = AutoTokenizer.from_pretrained(found.base, local_files_only=True)
    return Served(found.name, tokenizer, LlamaCpp(file, tokenizer, context_of(found.base), most))
