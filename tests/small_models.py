"""Helpers: a server process over a small base, started for a test and ended with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from mycel.models.base import Base, find_base, open_base
from mycel.models.lora import Lora

SOURCE = Path(__file__).parent.parent / "src"


@contextmanager
def server(*arguments: str) -> Iterator[str]:
    """Start ``mycel serve`` on a free port; yield its address."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
    command = [sys.executable, "-m", "mycel", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    drain = None
    try:
        for line in process.stderr:
            lines.append(line)
            found = re.search(r"at (http://\S+?)/v1", line)
            if found:
                drain = threading.Thread(target=process.stderr.read, daemon=True)
                drain.start()
                yield found[1]
                break
        else:
            raise AssertionError("the server did not start:\n" + "".join(lines))
    finally:
        process.terminate()
        try:
            assert process.wait(20) in {0, 1, 143}, "SIGTERM ended it with nothing closed"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if drain is not None:
            drain.join()
        process.stderr.close()


def write_adapter_folder(base: Base, folder: Path, seed: int, rank: int = 4, size: float = 3.0) -> None:
    """Write a LoRA adapter that visibly changes what the base says."""
    lora = Lora(base, rank, 1.0)
    state = lora.initial(seed)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in state.items():
        if name.endswith("lora_B"):
            state[name] = size * torch.randn(tensor.shape, generator=generator) / tensor.shape[0] ** 0.5
    lora.load(state)
    lora.save(folder)


def greedy_text(base: Base, prompt: str, most: int, merged: Sequence[Path] = ()) -> str:
    """Continue a text as plain transformers and PEFT do, greedily."""
    model = base.model
    for folder in merged:
        from peft import PeftModel

        model = PeftModel.from_pretrained(open_base(base.folder).model, str(folder)).merge_and_unload()
    ids = base.tokenizer(prompt, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=0)
    return str(base.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def ends_early(base: Base, prompt: str, most: int) -> bool:
    """Whether plain transformers ends its greedy continuation before it is ``most`` tokens long."""
    ids = base.tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = base.model.generate(ids, max_new_tokens=most, do_sample=False, pad_token_id=0)
    return bool(int(out[0, -1]) == base.tokenizer.eos_token_id)


def micro() -> Base:
    """Open the smallest built-in base."""
    return open_base(find_base("micro"))
