"""Loading weights into owned memory from a cold page cache, beside ``torch.load`` and safetensors.

The checkpoint is random half-precision tensors. Before every load its pages are dropped from the cache
(``posix_fadvise``) and checked to be gone; a host below this machine may still hold them. Contestants take turns; the
best of ``--repeats`` runs counts. What a contestant returns must be memory of its own: views of a mapped file are
cloned. ``torch.load`` reads tensors alone (``weights_only``) from a file that this benchmark has just written.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common import arguments, show
from mycel.generation.checkpoint import WEIGHTS, Loader, write_checkpoint

TENSORS = 24


def drop(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(size: int, repeats: int, folder: Path) -> list[dict[str, Any]]:
    count = size // (2 * TENSORS)
    source = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (2 * count,), generator=source, dtype=torch.uint8).view(torch.float16)
    state = {f"w{index}": noise.roll(index) for index in range(TENSORS)}
    torch.save(state, folder / "model.pt")
    save_file(state, folder / "model.safetensors")
    write_checkpoint(state, folder / "fast")
    loader, direct = Loader(threads=4), Loader(threads=4, direct=True)
    contestants: dict[str, tuple[Path, Callable[[], dict[str, Tensor]]]] = {
        "torch.load": (folder / "model.pt", lambda: torch.load(folder / "model.pt", weights_only=True)),
        "safetensors, cloned": (
            folder / "model.safetensors",
            lambda: {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()},
        ),
        "mycel, new memory": (folder / "fast" / WEIGHTS, lambda: Loader(threads=4).load(folder / "fast")),
        "mycel, pooled memory": (folder / "fast" / WEIGHTS, lambda: loader.load(folder / "fast", reuse=True)),
        "mycel, pooled, direct": (folder / "fast" / WEIGHTS, lambda: direct.load(folder / "fast", reuse=True)),
    }
    for _, load in contestants.values():
        found = load()
        assert all(torch.equal(found[name].view(torch.uint8), state[name].view(torch.uint8)) for name in state)
        del found
    best = dict.fromkeys(contestants, 0.0)
    for _ in range(repeats):
        for name, (path, load) in contestants.items():
            drop(path)
            started = time.perf_counter()
            load()
            best[name] = max(best[name], size / (time.perf_counter() - started))
    baseline = best["torch.load"]
    return [
        {"loader": name, "GB/s cold": round(speed / 1e9, 2), "ratio": round(speed / baseline, 2)}
        for name, speed in best.items()
    ]


def main() -> None:
    options = arguments(
        __doc__ or "",
        gigabytes={"type": float, "default": 1.0},
        repeats={"type": int, "default": 4},
        folder={"default": ""},
    )
    size = int(options.gigabytes * 1e9) // (mmap.PAGESIZE * TENSORS) * mmap.PAGESIZE * TENSORS
    with tempfile.TemporaryDirectory(prefix="mycel-", dir=options.folder or None) as folder:
        show(f"Loading {size / 1e9:.2f} GB, cold", measure(size, options.repeats, Path(folder)), options.json)


if __name__ == "__main__":
    main()
