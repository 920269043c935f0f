"""A model over peers: against one process, far apart, against weights read from disk, and when a peer is killed.

A Llama of 55 M parameters with random weights, one thread per process, peers as real processes on loopback with mutual
TLS. Each part is measured beside its baseline: ``python benchmarks/swarm.py --part pipeline --json``.

``pipeline`` has two baselines: the same blocks in one process with the products that peers use, and with
transformers' own. ``far`` delays every frame, between peers too. ``disk`` gives every process ``--room`` MiB beyond its
libraries and links, which the kernel enforces: the whole model is shown not to fit, then streamed; the peers hold a
quarter each.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from common import arguments, show
from mycel.cli.demo_swarm import loopback_swarm, present
from mycel.models.cut import Cut
from mycel.models.linear import quicken
from mycel.models.random_llama import write_llama
from mycel.segments.client import SwarmModel, Turn
from mycel.segments.mesh import REDUCES, Pace
from mycel.segments.session import Session
from mycel.segments.window import Window
from mycel.serve.tpi_llm import add_up
from peer_under import hold_back, limit_memory

PROMPT = list(range(100, 132))
TOKENS = 48
FAR = 0.02  # seconds one way
UNDER = str(Path(__file__).parent / "peer_under.py")
PARTS = ("pipeline", "far", "disk", "sums", "pause")
SUMS = (("5 ms, one token", Pace(0.005), 512), ("20 MB/s, 512 tokens", Pace(1e-4, 20e6), 1 << 18))


def main() -> None:
    parts = (*PARTS, "whole", "streamed")
    chosen: dict[str, dict[str, Any]] = {
        "part": {"choices": parts, "default": "pipeline"},
        "room": {"type": int, "default": 200},
    }
    options = arguments(__doc__ or "", model={"default": ""}, **chosen)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if options.model:
        limited(options.part, Path(options.model), options.room)
        return
    with tempfile.TemporaryDirectory(prefix="mycel-") as scratch:
        if options.part == "sums":
            rows = sums()
        else:
            folder = write_llama(Path(scratch) / "llama", 512, 12, 32000, num_key_value_heads=8)
            parts_of: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
                "pipeline": pipeline,
                "far": far,
                "pause": pause,
            }
            parts_of["disk"] = partial(disk, room=options.room)
            rows = parts_of[options.part](folder)
    show(f"swarm: {options.part}", rows, options.json)


def pipeline(folder: Path) -> list[dict[str, Any]]:
    """One process against two peers, batch 1; each several times, the best one counts."""
    plain = max(_alone(folder, quick=False) for _ in range(2))
    alone = max(_alone(folder, quick=True) for _ in range(3))

    async def over_peers() -> float:
        async with loopback_swarm(folder, 2) as (door, processes):
            await present(door, 2, processes)
            model = await SwarmModel.open(door, folder)
            try:
                return max([await _decode(model, 1) for _ in range(4)])
            finally:
                await model.close()

    found = asyncio.run(over_peers())
    rows = [("one process", alone), ("two peers on loopback", found), ("one process, transformers' products", plain)]
    return [_row(name, speed, alone) for name, speed in rows]


def far(folder: Path) -> list[dict[str, Any]]:
    """One request against eight at once, every frame 20 ms on its way."""

    async def measure() -> tuple[float, float]:
        async with loopback_swarm(folder, 2, launch=(UNDER, str(FAR), "0")) as (door, processes):
            await present(door, 2, processes)
            hold_back(type(door), FAR)
            model = await SwarmModel.open(door, folder)
            try:
                await _decode(model, 1, 8)
                return await _decode(model, 1, 24), await _decode(model, 8, 24)
            finally:
                await model.close()

    one, eight = asyncio.run(measure())
    return [_row("one request, 20 ms apart", one, one), _row("eight requests, 20 ms apart", eight, one)]


def disk(folder: Path, room: int) -> list[dict[str, Any]]:
    """Weights read from disk for every token, against four peers that hold a quarter each, under one limit."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    folder = folder.with_name("shards")  # a file is mapped as a whole, which the limit counts
    model.save_pretrained(folder, max_shard_size="20MB")
    del model
    whole, streamed = _under_limit("whole", folder, room), _under_limit("streamed", folder, room)

    async def measure() -> float:
        quarters = ("0:3", "3:6", "6:9", "9:12")
        async with loopback_swarm(folder, 4, quarters, launch=(UNDER, "0", str(room))) as (door, processes):
            await present(door, 4, processes)
            model = await SwarmModel.open(door, folder)
            try:
                return max([await _decode(model, 1) for _ in range(2)])
            finally:
                await model.close()

    base = float(streamed)
    rows = [_row("weights from disk, 2 blocks in memory", base, base), _row("four peers", asyncio.run(measure()), base)]
    return [{**row, f"whole model in {room} MiB": whole} for row in rows]


def _under_limit(what: str, folder: Path, room: int) -> str:
    """Return what a process of its own says that has no more memory than a peer."""
    command = [sys.executable, __file__, "--part", what, "--model", str(folder), "--room", str(room)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else "does not fit"


def limited(what: str, folder: Path, room: int) -> None:
    """Be that process."""
    limit_memory(room)
    print(_alone(folder, quick=True) if what == "whole" else _streamed(folder))


def sums() -> list[dict[str, Any]]:
    """Star against ring over four ranks."""
    rows = []
    for name, pace, numbers in SUMS:
        found = {kind: add_up(kind, pace, numbers, 5) for kind in REDUCES}
        rows += [
            {"links": name, "sum": kind, "ms": 1e3 * seconds, "over star": seconds / found["star"]}
            for kind, seconds in found.items()
        ]
    return rows


def pause(folder: Path) -> list[dict[str, Any]]:
    """Kill a peer in the middle of an answer, and stop another one so that only the deadline tells."""

    async def measure() -> list[dict[str, Any]]:
        async with loopback_swarm(folder, 4) as (door, processes):
            await present(door, 4, processes)
            model = await SwarmModel.open(door, folder)
            session, tokens, new = Session(), list[int](), list(PROMPT)
            rows, prefill = [], 0.0
            try:
                for place in range(TOKENS):
                    if place in (16, 32):
                        peer = session.hops[place // 32].leg.peer
                        deadline = model.directory.known[peer].allowance(1, model.patience)
                        os.kill(processes[peer].pid, 9 if place == 16 else 19)
                    started = time.perf_counter()
                    new = [int((await model.step([Turn(session, new)]))[0].argmax())]
                    tokens += new
                    if place == 0:
                        prefill = time.perf_counter() - started
                    if place in (16, 32):
                        how = "killed" if place == 16 else "stopped"
                        row = {"peer": how, "pause s": model.pauses[-1], "learnt deadline s": deadline}
                        rows.append({**row, "prefill s": prefill * (len(PROMPT) + place) / len(PROMPT)})
            finally:
                for process in processes.values():
                    if process.poll() is None:
                        os.kill(process.pid, 18)
                await model.close()
            same = tokens == _greedy(folder)
            return [{**row, "same tokens": str(same)} for row in rows]

    return asyncio.run(measure())


async def _decode(model: SwarmModel, count: int, tokens: int = TOKENS) -> float:
    """Return tokens a second of ``count`` requests, prefill left out; halves of many go round at the same time."""
    sessions = [Session() for _ in range(count)]
    new: list[Sequence[int]] = [PROMPT[: len(PROMPT) - 2 * place] for place in range(count)]
    halves = [range(count)] if count < 4 else [range(count // 2), range(count // 2, count)]
    await model.step([Turn(session, prompt) for session, prompt in zip(sessions, new, strict=True)])

    async def go(half: range) -> None:
        following = [[3] for _ in half]
        for _ in range(tokens):
            logits = await model.step([Turn(sessions[p], f) for p, f in zip(half, following, strict=True)])
            following = [[int(row)] for row in logits.argmax(-1)]

    started = time.perf_counter()
    await asyncio.gather(*(go(half) for half in halves))
    seconds = time.perf_counter() - started
    await model.forget(sessions)
    return count * tokens / seconds


def _alone(folder: Path, quick: bool) -> float:
    """Return tokens a second of the same blocks in this process, with the products that peers use or without."""
    cut = Cut.open(folder)
    if quick:
        quicken(cut.model, pack=False)
    cache = cut.new_cache()
    cut.head(cut.run(cut.embed(torch.tensor([PROMPT])), cache=cache)[:, -1:])
    ids = torch.tensor([[3]])
    started = time.perf_counter()
    for place in range(TOKENS):
        hidden = cut.run(cut.embed(ids, torch.tensor([[len(PROMPT) + place]])), cache=cache)
        ids = cut.head(hidden)[:, -1].argmax(-1, keepdim=True)
    return TOKENS / (time.perf_counter() - started)


def _greedy(folder: Path) -> list[int]:
    cut, ids, tokens = Cut.open(folder), torch.tensor([PROMPT]), list[int]()
    cache = cut.new_cache()
    for place in range(TOKENS):
        start = 0 if place == 0 else len(PROMPT) + place - 1
        hidden = cut.run(cut.embed(ids, torch.arange(start, start + ids.shape[1])[None]), cache=cache)
        ids = cut.head(hidden[:, -1:])[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(ids))
    return tokens


def _streamed(folder: Path) -> float:
    """Return tokens a second when blocks come from disk for every token, the page cache emptied as they are read."""
    window = Window(folder, 2)
    files = [os.open(path, os.O_RDONLY) for path in folder.glob("*.safetensors")]

    def forget(index: int, weights: Any) -> Any:
        for file in files:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        return weights

    window.prepare = forget
    try:
        ids, cut, cache = torch.tensor([PROMPT]), window.cut, window.cut.new_cache()
        cut.run(cut.embed(ids), cache=cache)
        started = time.perf_counter()
        for place in range(8):
            hidden = cut.run(cut.embed(torch.tensor([[3]]), torch.tensor([[len(PROMPT) + place]])), cache=cache)
            cut.head(hidden).argmax(-1)
        return 8 / (time.perf_counter() - started)
    finally:
        window.close()
        for file in files:
            os.close(file)


def _row(name: str, speed: float, baseline: float) -> dict[str, Any]:
    return {"how": name, "tokens/s": speed, "ms/token": 1e3 / speed, "over baseline": speed / baseline}


if __name__ == "__main__":
    main()
