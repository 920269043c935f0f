"""TPI-LLM: a model that no device can hold, over devices of one owner, in parallel inside every block.

Li et al., "TPI-LLM: Serving 70B-scale LLMs Efficiently on Low-resource Edge Devices", 2024.

Heads and feed-forward columns are split in proportion to the devices' capacity. The master alone holds tokeniser,
prompt, embedding and head; workers see sums of hidden states. Partial results are added up by *star*: everyone sends
to the master, which adds up and sends back. That is two hops where a ring takes 2 (n - 1), which wins while latency
dominates, as it does with one token's states, and loses once bandwidth does. Weights pass through a *sliding window*:
a background thread reads the next blocks while one computes and earlier ones are let go, so that peak memory does not
grow with depth.

Here: ``segments.ranks``, ``segments.tensor_parallel``, ``segments.mesh``, ``segments.window``. With one rank and no
window it is plain decoding. The paper's window moves over attention and feed-forward parts; ours over whole blocks.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil
import torch

from mycel.models.cut import Cut
from mycel.models.random_llama import write_llama
from mycel.rounds.laboratory import Laboratory, Measured
from mycel.segments.mesh import REDUCES, Mesh, Pace, listening
from mycel.segments.ranks import Group, ranks

PROMPT, TOKENS = [7, 99, 12, 5, 300], 12
SHALLOW, DEEP, HIDDEN = 8, 24, 256
FAR, THIN = Pace(latency=0.005), Pace(latency=1e-4, bandwidth=20e6)
SIZE = 4  # ranks that add up


def claim(lab: Laboratory) -> Measured:
    """Measure tokens, memory against depth, and both sums over far and over thin links."""
    grown, same = {}, True
    for window in (2, 0):
        peaks = []
        for depth in (SHALLOW, DEEP):
            folder = lab.folder / f"llama-{depth}"
            if not (folder / "config.json").is_file():
                write_llama(folder, HIDDEN, depth)
            found, peak = _measure(Group(folder, (3.0, 1.0), window=window))
            peaks.append(peak)
            same = same and found == _whole(folder)
        grown[window] = (peaks[1] - peaks[0]) / 2**20
    weights = 4 * (DEEP - SHALLOW) * (4 * HIDDEN**2 + 3 * HIDDEN * (HIDDEN * 11 // 4)) / 2**20
    far = {name: add_up(name, FAR, 256) for name in REDUCES}
    thin = {name: add_up(name, THIN, 1 << 18) for name in REDUCES}
    return Measured(
        f"{'the same' if same else 'other'} tokens as the whole model; from {SHALLOW} to {DEEP} blocks"
        f" ({weights:.0f} MiB of weights) a worker's peak memory grows by {grown[2]:.1f} MiB with a"
        f" window of 2, {grown[0]:.1f} MiB"
        f" without; at 5 ms latency star takes {far['star'] * 1e3:.1f} ms and ring"
        f" {far['ring'] * 1e3:.1f}; with 1 MiB at 20"
        f" MB/s {thin['star'] * 1e3:.0f} and {thin['ring'] * 1e3:.0f}",
        same and grown[2] < 0.25 * grown[0] and far["star"] < far["ring"] and thin["ring"] < thin["star"],
        {"identical": float(same), "grown_window_mib": grown[2], "grown_whole_mib": grown[0], "far_star": far["star"],
         "far_ring": far["ring"], "thin_star": thin["star"], "thin_ring": thin["ring"]},
    )  # fmt: skip


def add_up(name: str, pace: Pace, numbers: int, times: int = 3) -> float:
    """Return the seconds of one sum of ``numbers`` over four ranks whose links have a pace; the best of a few."""
    servers, best = listening(SIZE), [float("inf")]
    ports = [server.getsockname()[1] for server in servers]
    start = threading.Barrier(SIZE, timeout=30)

    def work(rank: int) -> None:
        mesh = Mesh.connect(rank, servers[rank], ports, "between threads", pace)
        try:
            reduce = REDUCES[name](mesh)
            for _ in range(times):
                start.wait()
                began = time.perf_counter()
                reduce(torch.ones(numbers))
                start.wait()
                if rank == 0:
                    best[0] = min(best[0], time.perf_counter() - began)
        finally:
            mesh.close()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return best[0]


def _measure(group: Group) -> tuple[list[int], int]:
    """Return the tokens, and the most memory of its own that the worker had in bytes."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with ranks(group) as master:
        workers = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
        peak, done = [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.002):
                peak[0] = max(peak[0], max((_own(p.pid) for p in workers), default=0))

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            tokens = master.generate(PROMPT, TOKENS)
        finally:
            done.set()
            watching.join()
        return tokens, peak[0]


def _own(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def _whole(folder: Path) -> list[int]:
    cut = Cut.open(folder)
    ids, tokens, cache = torch.tensor([PROMPT]), list[int](), cut.new_cache()
    with torch.inference_mode():
        while len(tokens) < TOKENS:
            places = torch.arange(cache.get_seq_length(), cache.get_seq_length() + ids.shape[1])[None]
            ids = cut.head(cut.run(cut.embed(ids, places), cache=cache)[:, -1:])[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(ids))
    return tokens
