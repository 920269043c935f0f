"""``mycel demo swarm``: four peers and a door; one peer is killed in the middle of an answer, which goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from mycel.cli.serve import need
from mycel.errors import EngineError

PROMPT = "Return the"
TOKENS, KILL_AT = 48, 16
PEERS = 4
STARTING = 180.0  # seconds in which four processes must have come up


def demo_swarm_command(model: str, as_json: bool) -> None:
    """Run the demonstration and print what came of it."""
    need("zenoh", "cryptography", extra="swarm")
    messages = Console(stderr=True)
    with messages.status("loading libraries") as status:
        import torch

        from mycel.models.base import find_base, open_base

        torch.set_num_threads(1)
        folder = find_base(model, lambda phase, done, total: status.update(f"{phase} {done}/{total}"))
        base = open_base(folder)
        ids = base.tokenizer(PROMPT).input_ids
        whole = greedy(base.model, ids, TOKENS)
        status.update("starting four peers")
        found = asyncio.run(_demonstrate(folder, ids, messages))
    tokens = found.pop("tokens_found")
    text = base.tokenizer.decode(tokens)
    result = {"identical_tokens": tokens == whole, **found}
    if as_json:
        print(json.dumps(result, indent=2))
        return
    messages.print(f"[bold]{PROMPT}[/bold]{text}")
    same = "the same tokens as" if result["identical_tokens"] else "[red]other tokens than[/red]"
    messages.print(f"{same} the whole model; a peer was killed after {KILL_AT}, pause {result['pause_seconds']:.3f} s")


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Return the whole model's greedy tokens, ended by nothing but their count."""
    import torch
    from transformers import DynamicCache

    cache, ids, tokens = DynamicCache(config=model.config), torch.tensor([prompt]), list[int]()
    with torch.inference_mode():
        for _ in range(count):
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(ids))
    return tokens


async def _demonstrate(folder: Path, ids: list[int], messages: Console) -> dict[str, Any]:
    from mycel.segments.client import SwarmModel, Turn
    from mycel.segments.session import Session

    async with loopback_swarm(folder, PEERS) as (door, processes):
        model = await SwarmModel.open(door, folder)
        session, tokens, new, victim = Session(), list[int](), ids, ""
        try:
            await present(door, PEERS, processes)
            while len(tokens) < TOKENS:
                if len(tokens) == KILL_AT:
                    victim = session.hops[-1].leg.peer
                    processes[victim].kill()
                    messages.print(f"killed {victim}, which held blocks {session.hops[-1].leg.first} and on")
                new = [int((await model.step([Turn(session, new)]))[0].argmax())]
                tokens += new
            await model.forget([session])
        finally:
            await model.close()
        return {
            "tokens_found": tokens,
            "pause_seconds": round(sum(model.pauses), 4),
            "peers": PEERS,
            "killed": victim,
            "replayed_positions": session.replayed,
            "tokens": len(tokens),
        }


@asynccontextmanager
async def loopback_swarm(
    folder: Path,
    count: int,
    ranges: Sequence[str] = (),
    reach: str = "127.0.0.1:0",
    launch: Sequence[str] = ("-m", "mycel"),
) -> AsyncIterator[tuple[Any, dict[str, subprocess.Popen[bytes]]]]:
    """Start real peers on loopback around a door that is their meeting place; everything ends with the block.

    Parameters
    ----------
    folder : Path
        The model.
    count : int
        Peers.
    ranges : sequence of str
        Blocks of each, ``first:last``; by default halves of the model, in turn.
    reach : str
        Where peers listen; empty: outbound only, everything passes the door.
    launch : sequence of str
        What the interpreter is to run as ``mycel``.
    """
    import socket

    from mycel.models.anatomy import anatomy
    from mycel.models.cut import read_config
    from mycel.segments.swarm import Swarm

    depth = anatomy(read_config(folder)).depth
    halves = (f"0:{(depth + 1) // 2}", f"{(depth + 1) // 2}:{depth}") if depth > 1 else ("0:1", "0:1")
    with tempfile.TemporaryDirectory(prefix="mycel-swarm-") as scratch, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        swarm = Swarm.create(Path(scratch) / "swarm", f"127.0.0.1:{port}")
        door = await swarm.join("door", router=True)
        processes: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for index in range(count):
                blocks = ranges[index] if ranges else halves[index % 2]
                command = [sys.executable, *launch, "peer", "--join", str(swarm.folder), "--model", str(folder)]
                options = ["--blocks", blocks, "--name", f"peer-{index}", "--threads", "1", "--listen", reach]
                processes[f"peer-{index}"] = subprocess.Popen(
                    [*command, *options], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
                )
            yield door, processes
        finally:
            try:
                await door.close()
            finally:
                _end(processes.values())


def _end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


async def present(door: Any, count: int, processes: dict[str, subprocess.Popen[bytes]]) -> None:
    """Wait until ``count`` peers have announced themselves; a peer that ended meanwhile says why."""
    loop = asyncio.get_running_loop()
    until = loop.time() + STARTING
    while len(door.members()) < count:
        for name, process in processes.items():
            if process.poll() is not None:
                said = process.stderr.read().decode(errors="replace") if process.stderr else ""
                raise EngineError(f"{name} ended with status {process.returncode}: {said.strip()[-300:]}")
        if loop.time() > until:
            raise EngineError(f"only {len(door.members())} of {count} peers came up within {STARTING:g} s")
        await asyncio.sleep(0.05)
