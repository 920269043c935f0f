"""A rank of ``benchmarks/layouts.py``: every layout of this world, its step's seconds, bytes and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from mycel.collectives.apply import lay_out
from mycel.collectives.ranks import make_ranks, process_group
from mycel.collectives.step import Trainer
from mycel.collectives.traffic import Traffic
from mycel.decisions.layout import layouts
from mycel.models.footprint import Footprint
from mycel.models.random_llama import llama_config
from mycel.recipe.schema import Layout

SHAPES = ((128, 4, 8, 64), (128, 4, 16, 64), (192, 4, 8, 128))  # hidden, blocks, rows, tokens
STEPS = 5
PERIOD = 0.01  # seconds in which a slowed rank runs and stands still once
# Kept running for a share of each period; when told to end, it lets go.
DUTY = """
import os, signal, sys, time
pid, share, period = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
try:  # so that it wakes up in time while all cores are busy
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
except OSError:
    pass
ended = []
signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
while not ended and os.getppid() == pid:
    os.kill(pid, signal.SIGSTOP)
    time.sleep(period * (1 - share))
    os.kill(pid, signal.SIGCONT)
    time.sleep(period * share)
"""


@dataclass(frozen=True)
class Scene:
    """What the last rank suffers, and on how many cores all ranks run.

    Attributes
    ----------
    speed : float
        Share of the time in which the last rank is let run; in what is measured, the share that it really had.
    mbps, latency_ms : float
        Of the last rank's link; no rate: as it is.
    cores : int
        0: all.
    """

    name: str = "equal"
    speed: float = 1.0
    mbps: float = 0.0
    latency_ms: float = 0.0
    cores: int = 0


EQUAL = Scene()
SCENES = ("equal", "slow rank", "thin link", "one core")
UNEQUAL = {
    2: (Scene("slow rank", speed=0.5), Scene("thin link", mbps=200, latency_ms=1), Scene("one core", cores=1)),
    4: (Scene("thin link", mbps=200, latency_ms=1),),
}


class Shaped(Traffic):  # type: ignore[no-untyped-call]
    """Holds every message of this rank back as a thin link would, both ways where neighbours hand on."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self.scene = scene

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Wait as long as the message takes, then carry it out."""
        before, calls = self.bytes, sum(self.calls.values())
        name = func._schema.name.rpartition("::")[2]
        if func.namespace == "c10d" and name.startswith("recv"):
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            self._wait(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        done = super().__torch_dispatch__(func, types, args, kwargs)
        if sum(self.calls.values()) > calls:
            self._wait(self.bytes - before)
        return done

    def _wait(self, size: float) -> None:
        time.sleep(self.scene.latency_ms / 1e3 + 8e-6 * size / self.scene.mbps)


@contextmanager
def suffering(scene: Scene) -> Iterator[Scene]:
    """Make this rank as slow, as far away or as crowded as the scene says; yield the speed that the last one has."""
    last = dist.get_rank() == dist.get_world_size() - 1
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        if scene.cores:
            _pin(set(cores[: scene.cores]))
            stack.callback(_pin, set(cores))
        if last and scene.mbps:
            stack.enter_context(Shaped(scene))
        if last and scene.speed < 1:
            words = [sys.executable, "-c", DUTY, str(os.getpid()), str(scene.speed), str(PERIOD)]
            holder = subprocess.Popen(words)
            stack.callback(holder.wait)
            stack.callback(holder.terminate)
        yield replace(scene, speed=_share()) if scene.speed < 1 else scene


def _share() -> float:
    """Share of the last rank's time in which it computes, while all ranks do."""
    dist.barrier()
    wall, busy = time.perf_counter(), time.process_time()
    while time.perf_counter() < wall + 0.4:
        sum(range(1000))
    found = torch.tensor((time.process_time() - busy) / (time.perf_counter() - wall))
    dist.broadcast(found, dist.get_world_size() - 1)
    return float(found)


def _pin(cores: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):
            os.sched_setaffinity(int(thread), cores)


def config(hidden: int, blocks: int) -> LlamaConfig:
    return llama_config(hidden, blocks, 1024, 3 * hidden)


def model(shape: tuple[int, int, int, int]) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(config(shape[0], shape[1]))


def measure(shape: tuple[int, int, int, int], layout: Layout, scene: Scene = EQUAL) -> dict[str, Any]:
    """Time whole steps, then count one step's bytes and memory; the slowest and fullest rank counts."""
    rows = torch.randint(0, 1024, (shape[2], shape[3]), generator=torch.Generator().manual_seed(2))
    ranks = make_ranks(layout, torch.device("cpu"))
    stage = lay_out(model(shape), ranks)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-3)
    trainer = Trainer(stage, ranks, optimizer, clip_norm=0.0)
    trainer.step(rows, 1e-3)
    seconds = []
    with suffering(scene) as scene:
        for _ in range(STEPS):
            dist.barrier()
            started = time.perf_counter()
            trainer.step(rows, 1e-3)
            seconds.append(time.perf_counter() - started)
    with Traffic() as traffic:
        trainer.step(rows, 1e-3)
    with Footprint() as footprint:
        trainer.step(rows, 1e-3)
    held = sum(tensor.numel() * tensor.element_size() for tensor in _kept(stage, optimizer))
    found = torch.tensor([sorted(seconds)[STEPS // 2], float(footprint.peak + held), float(traffic.bytes)])
    total = found.clone()
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return {
        "scene": asdict(scene),
        "shape": shape,
        "layout": layout.model_dump(mode="json"),
        "ranks": dist.get_world_size(),
        "seconds": float(found[0]),
        "memory": float(found[1]),
        "bytes": float(total[2]),
    }


def trials(count: int, index: int) -> Iterator[tuple[Layout, Scene]]:
    """Every layout of equal ranks for a shape; for the first and the last shape also those of unlike ranks."""
    shape = SHAPES[index]
    for pieces in (1, 2) if count > 1 else (1,):
        for layout in layouts(count, config(*shape[:2]), shape[2], shape[3], pieces):
            if layout.pipeline > 1 or pieces == 1:
                yield layout, EQUAL
    for scene in UNEQUAL.get(count, ()) if index != 1 else ():
        for layout in uneven(count, shape):
            yield layout, scene


def uneven(count: int, shape: tuple[int, int, int, int]) -> Iterator[Layout]:
    """Layouts for unlike ranks: also with more blocks on one side of a pipeline."""
    for layout in layouts(count, config(*shape[:2]), shape[2], shape[3], 2):
        yield layout
        if layout.pipeline == 2:
            yield from (layout.model_copy(update={"blocks": blocks}) for blocks in ([3, 1], [1, 3]))


def _kept(stage: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    weights = [getattr(parameter, "_local_tensor", parameter) for parameter in stage.parameters()]
    moments = [
        getattr(value, "_local_tensor", value)
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    return [*weights, *moments]


def bare(shape: tuple[int, int, int, int]) -> float:
    """Median seconds of a step of a plain FSDP2 script on the same work."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plain = model(shape)
    for layer in plain.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(plain, mesh=mesh)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    rows = torch.randint(0, 1024, (shape[2], shape[3]), generator=torch.Generator().manual_seed(2))
    own = rows.chunk(dist.get_world_size())[dist.get_rank()]
    seconds = []
    for _ in range(2 * STEPS + 1):
        dist.barrier()
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        plain(input_ids=own, labels=own).loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds[1:])[STEPS]


def main() -> None:
    torch.set_num_threads(1)
    with process_group():
        count = dist.get_world_size()
        rows: list[dict[str, Any]] = []
        for index, shape in enumerate(SHAPES):
            for layout, scene in trials(count, index):
                if scene.name not in (sys.argv[2:] or SCENES):
                    continue
                rows.append(measure(shape, layout, scene))
                if dist.get_rank() == 0:  # what was measured stays if the rest is cut short
                    Path(sys.argv[1]).write_text(json.dumps(rows), encoding="utf-8")
        if count > 1:
            rows.append({"ranks": count, "bare": bare(SHAPES[0]), "shape": SHAPES[0]})
        if dist.get_rank() == 0:
            Path(sys.argv[1]).write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
