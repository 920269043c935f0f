"""A model on several ranks, each a process: the master knows the tokens, the workers only sums of hidden states."""

from __future__ import annotations

import multiprocessing as mp
import secrets
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache

from mycel.errors import EngineError
from mycel.models.cut import Cut
from mycel.segments.mesh import REDUCES, Mesh, Pace, Reduce, listening
from mycel.segments.tensor_parallel import Sharded
from mycel.segments.window import Window

STEP, FRESH, END = range(3)
COMMAND = struct.Struct("<BIII")  # what, rows, tokens, and whether ids or states follow
MOST_TOKENS = 1 << 16
FREE = Pace()


@dataclass(frozen=True)
class Group:
    """How a model is shared out.

    Attributes
    ----------
    folder : Path
        In Hugging Face's format.
    weights : tuple of float
        The ranks' shares in proportion; their number is the number of ranks.
    reduce : str
        ``star`` or ``ring``.
    pace : Pace
        What links are made to cost.
    syncs : int
        Sums per block, 2 or 1.
    window, held : int
        Blocks whose weights are in memory at a time, 0: all; and how many of the first stay there.
    mapped : bool
        Whether shares stay in the model's file, from which pages are read as they are used.
    ids : bool
        Whether workers receive token ids and embed them themselves, or states from a master that alone sees tokens.
    """

    folder: Path
    weights: tuple[float, ...]
    reduce: str = "star"
    pace: Pace = FREE
    syncs: int = 2
    window: int = 0
    held: int = 0
    mapped: bool = False
    ids: bool = False


class Rank:
    """One rank of a group: its share of every block, and the cache of its heads."""

    def __init__(self, group: Group, mesh: Mesh) -> None:
        torch.set_num_threads(1)
        self.group, self.mesh = group, mesh
        self.sums: Reduce = REDUCES[group.reduce](mesh)
        master = mesh.rank == 0
        ends: dict[str, Any] = {"embed": master or group.ids, "head": master}
        self.past = 0
        self.window = Window(group.folder, group.window, held=group.held, **ends) if group.window else None
        self.cut = self.window.cut if self.window else Cut.open(group.folder, mapped=group.mapped, **ends)
        sharded = Sharded(self.cut, mesh.rank, group.weights, self.sums, group.syncs, copied=not group.mapped)
        if self.window is not None:
            self.window.prepare = lambda index, whole: sharded.share(self.cut.block(index), whole)
        self.cache: DynamicCache = self.cut.new_cache()

    def run(self, hidden_BTD: Tensor) -> Tensor:
        """Run all blocks on new positions; every rank calls this with the same state."""
        self.past += hidden_BTD.shape[1]
        with torch.inference_mode():
            return self.cut.run(hidden_BTD, cache=self.cache)

    def restart(self) -> None:
        """Forget all positions, here alone."""
        self.past, self.cache = 0, self.cut.new_cache()

    def close(self) -> None:
        """Stop reading weights."""
        if self.window is not None:
            self.window.close()


class Master(Rank):
    """Rank 0: holds embedding and head, and tells the others what to do."""

    def step(self, ids_BT: Tensor) -> Tensor:
        """Return the logits ``[rows, vocabulary]`` behind the last of new tokens."""
        with torch.inference_mode():
            hidden = self.cut.embed(ids_BT, torch.arange(self.past, self.past + ids_BT.shape[1])[None])
            self._tell(STEP, ids_BT, hidden)
            return self.cut.head(self.run(hidden)[:, -1:])[:, -1]

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return greedy tokens of one sequence."""
        self.fresh()
        ids, tokens = torch.tensor([list(prompt)]), list[int]()
        while len(tokens) < count:
            ids = self.step(ids).argmax(-1, keepdim=True)
            tokens.append(int(ids))
        return tokens

    def fresh(self) -> None:
        """Forget all positions, here and everywhere."""
        self._command(FRESH, 0, 0)
        self.restart()

    def end(self) -> None:
        """Let the workers end."""
        self._command(END, 0, 0)

    def _tell(self, what: int, ids_BT: Tensor, hidden_BTD: Tensor) -> None:
        self._command(what, *ids_BT.shape)
        for other in range(1, self.mesh.size):
            self.mesh.send_tensor(other, ids_BT.int() if self.group.ids else hidden_BTD)

    def _command(self, what: int, rows: int, tokens: int) -> None:
        for other in range(1, self.mesh.size):
            self.mesh.send(other, COMMAND.pack(what, rows, tokens, self.group.ids))


class Worker(Rank):
    """Any other rank: does what the master says until it ends."""

    def work(self) -> None:
        """Serve; ends when told, or when the master is gone."""
        width = int(self.cut.config.hidden_size)
        while True:
            what, rows, tokens, _ = COMMAND.unpack(bytes(self.mesh.receive(0, COMMAND.size)))
            if what == END:
                return
            if what == FRESH:
                self.restart()
                continue
            if not 0 < rows * tokens <= MOST_TOKENS:
                raise EngineError(f"a step of {rows} rows of {tokens} tokens; at most {MOST_TOKENS:,} are taken")
            if self.group.ids:
                ids = self.mesh.receive_tensor(0, torch.empty(rows, tokens, dtype=torch.int32))
                with torch.inference_mode():
                    hidden = self.cut.embed(ids.long(), torch.arange(self.past, self.past + tokens)[None])
            else:
                hidden = self.mesh.receive_tensor(0, torch.empty(rows, tokens, width))
            self.run(hidden)


Head = TypeVar("Head", bound=Master)


@contextmanager
def ranks(group: Group) -> Iterator[Master]:
    """Start the workers of a group as processes of this machine; this process is the master."""
    with ranks_of(group, Master, Worker) as master:
        yield master


@contextmanager
def ranks_of(group: Group, head: type[Head], hand: type[Worker]) -> Iterator[Head]:
    """Start the workers of a group as processes of this machine; this process is the master.

    Parameters
    ----------
    group : Group
        How the model is shared out.
    head, hand : type
        What the master and the workers are.
    """
    context, servers, secret = workers_context(), listening(len(group.weights)), secrets.token_hex(16)
    ports = [server.getsockname()[1] for server in servers]
    processes: list[Any] = [
        context.Process(target=_worker, args=(hand, group, rank, server, ports, secret), daemon=True)
        for rank, server in enumerate(servers[1:], 1)
    ]
    try:
        for process, server in zip(processes, servers[1:], strict=True):
            process.start()
            server.close()  # the worker has it
    except BaseException:
        for server in servers:
            server.close()
        raise
    mesh = None
    try:
        mesh = Mesh.connect(0, servers[0], ports, secret, group.pace)
        master = head(group, mesh)
        try:
            yield master
            master.end()
        finally:
            master.close()
    finally:
        if mesh is not None:
            mesh.close()
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()


def workers_context() -> ForkServerContext:
    """Return the way workers are started: forked from a server that has imported the libraries once."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["mycel.segments.ranks"])
    return context


def _worker(
    hand: type[Worker], group: Group, rank: int, server: socket.socket, ports: Sequence[int], secret: str
) -> None:
    mesh = Mesh.connect(rank, server, ports, secret, group.pace)
    worker = hand(group, mesh)
    try:
        worker.work()
    except EngineError:
        return  # the master is gone, and with it whatever there was to do
    finally:
        worker.close()
        mesh.close()
