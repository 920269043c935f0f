"""CTranslate2 behind the door: int8 and fused kernels on the processor (Klein et al., OpenNMT)."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mycel.errors import ExtraMissing, GenerationError, ModelError
from mycel.generation.batched import Batched, Ticket
from mycel.generation.request import Request
from mycel.generation.served import Found, Served
from mycel.models.cache import cache_folder

BATCH = 32
KINDS = ("int8", "float32", "bfloat16", "int8_float32")


def convert(folder: Path, out: Path, kind: str = "int8") -> None:
    """Write a model in Hugging Face's format as a CTranslate2 model.

    Raises
    ------
    ModelError
        When CTranslate2 does not know the family.
    """
    require()
    if kind not in KINDS:
        raise ModelError(f"the quantization is {kind!r}: CTranslate2 takes {', '.join(KINDS)}")
    from ctranslate2.converters import TransformersConverter

    try:
        TransformersConverter(str(folder)).convert(str(out), quantization=kind, force=True)
    except Exception as error:  # the converter raises whatever the family led to
        raise ModelError(f"CTranslate2 cannot convert {folder}: {error}"[:400]) from error
    for path in (*folder.glob("token*"), *folder.glob("special*"), folder / "config.json"):
        if path.is_file() and not (out / path.name).exists():
            shutil.copy(path, out / path.name)


class CTranslate(Batched):
    """A CTranslate2 generator; requests that are drawn alike share a batch."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast, context: int, most: int) -> None:
        import ctranslate2

        threads = torch.get_num_threads()
        self.generator: Any = ctranslate2.Generator(str(folder), device="cpu", intra_threads=threads)
        self._names: list[str] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        super().__init__(tokenizer, len(self._names), context, most, BATCH)

    def alike(self, request: Request) -> Hashable:
        """Return the sampling and the ends, which a batch shares."""
        drawn = request.sampling
        if drawn.seed is not None and not drawn.greedy:
            # Its generators are seeded once for each thread of its own: the same seed does not repeat a draw.
            raise GenerationError("this engine cannot repeat a draw: leave seed out, or use --engine mycel")
        return drawn.temperature, drawn.top_k, drawn.top_p, request.ends

    def generate(self, tickets: Sequence[Ticket]) -> None:
        """Generate for a batch; each request is stopped at its own end."""
        drawn = tickets[0].request.sampling
        prompts = [[self._names[token] for token in ticket.request.prompt] for ticket in tickets]
        most, ends = max(ticket.request.most for ticket in tickets), sorted(tickets[0].request.ends)
        self.generator.generate_batch(
            prompts,
            max_length=most,
            min_length=0 if ends else most,  # without an end, the model's own must not come either
            include_prompt_in_result=False,
            end_token=ends or None,
            return_end_token=True,
            sampling_topk=1 if drawn.greedy else drawn.top_k,
            sampling_topp=drawn.top_p,
            sampling_temperature=drawn.temperature or 1.0,
            callback=lambda step: tickets[step.batch_id].give(step.token_id),
        )


def open_ctranslate(found: Found, most: int, kind: str = "int8") -> Served:
    """Serve a model with CTranslate2, converting it first where that was not done before."""
    require()
    folder = found.base if (found.base / "model.bin").is_file() else _converted(found.base, kind)
    tokenizer = AutoTokenizer.from_pretrained(found.base, local_files_only=True)
    return Served(found.name, tokenizer, CTranslate(folder, tokenizer, context_of(found.base), most))


def context_of(folder: Path) -> int:
    """Return a model's largest number of positions, from its configuration."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return int(getattr(config, "max_position_embeddings", 0) or getattr(config, "seq_length", 0) or 2048)


def require() -> None:
    """Refuse with the line that installs CTranslate2 when it is missing."""
    if importlib.util.find_spec("ctranslate2") is None:
        raise ExtraMissing("ctranslate2", "ctranslate2")


def _converted(base: Path, kind: str) -> Path:
    weights = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in base.glob("*.safetensors"))
    key = hashlib.sha256(repr((str(base.resolve()), weights, kind)).encode()).hexdigest()[:16]
    folder = cache_folder() / "ctranslate2" / f"{base.name}-{kind}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            convert(base, partial, kind)
            partial.rename(folder)
    return folder
