"""Loading weights into owned memory from a cold page cache, beside ``torch.load``, safetensors and the disk itself.

The checkpoint is random half-precision tensors. Before every load its pages are dropped from the cache
(``posix_fadvise``) and counted to be gone; a host below this machine may still hold them. Contestants take turns, each
in a forked process of its own, whose memory is new to it as a starting server's is; the best of ``--repeats`` runs
counts, and the median is printed beside it. What a contestant returns must be memory of its own: views of a mapped
file are cloned. Pooled memory is what a server that has loaded before keeps. ``torch.load`` reads tensors alone
(``weights_only``) from a file that this benchmark has just written; in a process that has loaded before, it takes over
the memory which that load let go. The disk is the file read into one small buffer a reader, which no loader can beat.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from common import arguments, show
from mycel.generation.checkpoint import PIECE, WEIGHTS, Loader, write_checkpoint

TENSORS = 24
BASELINE = "torch.load"


Load = Callable[[], Any]


def drop(path: Path) -> None:
    """Drop a file from the page cache, and see that it is gone."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    told = subprocess.run(["fincore", "-b", "-n", "-o", "RES", path], capture_output=True, text=True, check=True)
    if int(told.stdout):
        raise SystemExit(f"{told.stdout.strip()} bytes of {path} stay in the page cache: nothing is cold here")


def disk(path: Path, readers: int = 2) -> None:
    """Read a file and keep nothing of it."""
    size = path.stat().st_size
    share = -(-size // readers // mmap.PAGESIZE) * mmap.PAGESIZE

    def read(start: int) -> None:
        buffer, end = memoryview(mmap.mmap(-1, PIECE)), min(start + share, size)
        with path.open("rb", buffering=0) as file:
            while start < end:
                start += os.preadv(file.fileno(), [buffer[: min(PIECE, end - start)]], start)

    with ThreadPoolExecutor(readers) as threads:
        list(threads.map(read, range(0, size, share)))


def forked(path: Path, before: Load, load: Load) -> float:
    """Return the seconds of a load in a process of its own, ``before`` having run there."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - no one watches there
        before()
        drop(path)
        started = time.perf_counter()
        found = load()
        os.write(tell, repr(time.perf_counter() - started).encode())
        del found
        os._exit(0)
    os.close(tell)
    with os.fdopen(told) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return float(said)


def contestants(folder: Path) -> dict[str, tuple[Path, Load, Load]]:
    """Return of each its file, what its process does first, and the load."""
    loader, direct = Loader(), Loader(4, direct=True)
    torch_file, weights, fast = folder / "model.pt", folder / "fast" / WEIGHTS, folder / "fast"
    safe = folder / "model.safetensors"

    def torch_load() -> Any:
        return torch.load(torch_file, weights_only=True)

    def cloned() -> Any:
        return {name: tensor.clone() for name, tensor in load_file(safe).items()}

    def nothing() -> None:
        return None

    return {
        BASELINE: (torch_file, nothing, torch_load),
        "torch.load, again": (torch_file, torch_load, torch_load),
        "safetensors, cloned": (safe, nothing, cloned),
        "mycel, new memory": (weights, nothing, lambda: loader.load(fast)),
        "mycel, pooled memory": (weights, lambda: loader.load(fast), lambda: loader.load(fast, reuse=True)),
        "mycel, pooled, direct": (weights, lambda: direct.load(fast), lambda: direct.load(fast, reuse=True)),
        "the disk": (weights, nothing, lambda: disk(weights)),
    }


def measure(size: int, repeats: int, folder: Path) -> list[dict[str, Any]]:
    count = size // (2 * TENSORS)
    source = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (2 * count,), generator=source, dtype=torch.uint8).view(torch.float16)
    state = {f"w{index}": noise.roll(index) for index in range(TENSORS)}
    torch.save(state, folder / "model.pt")
    save_file(state, folder / "model.safetensors")
    write_checkpoint(state, folder / "fast")
    found = Loader().load(folder / "fast")
    assert all(torch.equal(found[name].view(torch.uint8), state[name].view(torch.uint8)) for name in state)
    del found, state, noise
    known = contestants(folder)
    speeds: dict[str, list[float]] = {name: [] for name in known}
    for _ in range(repeats):
        for name, (path, before, load) in known.items():
            speeds[name].append(size / forked(path, before, load) / 1e9)
    baseline = max(speeds[BASELINE])
    return [
        {
            "loader": name,
            "GB/s cold": round(max(found), 2),
            "median": round(median(found), 2),
            "ratio": round(max(found) / baseline, 2),
        }
        for name, found in speeds.items()
    ]


def main() -> None:
    options = arguments(
        __doc__ or "",
        gigabytes={"type": float, "default": 1.0},
        repeats={"type": int, "default": 4},
        folder={"default": ""},
    )
    torch.set_num_threads(1)  # a forked process has no second one of the library's
    size = int(options.gigabytes * 1e9) // (mmap.PAGESIZE * TENSORS) * mmap.PAGESIZE * TENSORS
    with tempfile.TemporaryDirectory(prefix="mycel-", dir=options.folder or None) as folder:
        show(f"Loading {size / 1e9:.2f} GB, cold", measure(size, options.repeats, Path(folder)), options.json)


if __name__ == "__main__":
    main()
