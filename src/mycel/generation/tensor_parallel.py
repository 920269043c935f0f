"""The tensor-parallel executor: every block shared out over ranks, each with the pages of its own heads.

The engine's pieces become the same batch on every rank: the master embeds tokens and sends states and the numbers of
pages, all ranks compute their heads and columns and add up (``segments/ranks.py``), the master alone computes logits.
So pages are shared, set aside and given back by the engine as on one machine; what is set aside comes from the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from mycel.decisions.shares import shares
from mycel.errors import EngineError
from mycel.generation.attention import NAME, Paged, Span, register
from mycel.generation.executor import ANY_MASK, Piece
from mycel.generation.memory import Memory, Shape
from mycel.segments.mesh import Mesh
from mycel.segments.ranks import COMMAND, END, MOST_TOKENS, Group, Master, Rank, Worker, ranks_of

PAGES, BATCH, OUT, IN = range(10, 14)
MOST_PAGES = 1 << 24


@dataclass(frozen=True)
class Extent:
    """One piece as every rank needs it: positions ``start`` to ``end``, and the pages of all up to there."""

    start: int
    end: int
    table: tuple[int, ...]


class PagedRank:
    """What master and workers share: pages for this rank's heads, and a batch computed over them."""

    def __init__(self, rank: Rank) -> None:
        register()
        self.rank, self.cut = rank, rank.cut
        self.cut.model.set_attn_implementation(NAME)
        self.memory: Memory | None = None
        self.shapes = _shapes(rank.group, self.cut.config, rank.mesh.rank)

    def reserve(self, pages: int, size: int) -> None:
        """Make room for this many pages of ``size`` positions."""
        self.memory = Memory(self.shapes, pages, size)

    def compute(self, hidden_ND: Tensor, extents: Sequence[Extent]) -> Tensor:
        """Run all blocks on the extents' states, one after another in a row; returns the states behind them."""
        memory, spans, slots, at = self.held, list[Span](), list[int](), 0
        for extent in extents:
            after = at + extent.end - extent.start
            spans.append(Span(at, after, extent.end, memory.where(extent.table, extent.end)))
            slots += memory.slots(extent.table, extent.start, extent.end)
            at = after
        positions = torch.tensor([[p for extent in extents for p in range(extent.start, extent.end)]])
        paged = Paged(memory, torch.tensor(slots), spans)
        with torch.inference_mode():
            return self.cut.run(hidden_ND[None], positions_BT=positions, mask_BS=ANY_MASK, paged=paged)[0]

    def likes(self, pages: int) -> list[Tensor]:
        """Return tensors of the shapes in which so many pages are moved."""
        return _likes(self.shapes, pages, self.held.size)

    @property
    def held(self) -> Memory:
        """The pages."""
        if self.memory is None:
            raise EngineError("a batch came before there was room for its keys and values")
        return self.memory


class PagedMaster(Master):
    """Rank 0, whose pages stand for everyone's."""

    def __init__(self, group: Group, mesh: Mesh) -> None:
        super().__init__(group, mesh)
        self.paged = PagedRank(self)

    def tell(self, what: int, first: int, second: int) -> None:
        """Say to all workers what comes next."""
        self._command(what, first, second)

    def batch(self, tokens: Sequence[int], extents: Sequence[Extent]) -> Tensor:
        """Return the states behind the last block."""
        positions = torch.tensor([[p for extent in extents for p in range(extent.start, extent.end)]])
        with torch.inference_mode():
            hidden = self.cut.embed(torch.tensor([list(tokens)]), positions)[0]
        plan = pack_plan(extents)
        self.tell(BATCH, len(tokens), len(plan))
        for other in range(1, self.mesh.size):
            self.mesh.send_tensor(other, plan)
            self.mesh.send_tensor(other, hidden)
        return self.paged.compute(hidden, extents)


class PagedWorker(Worker):
    """Any other rank; computes batches until it is told to end."""

    def __init__(self, group: Group, mesh: Mesh) -> None:
        super().__init__(group, mesh)
        self.paged = PagedRank(self)

    def work(self) -> None:
        """Serve; ends when told, or when the master is gone."""
        while True:
            what, first, second, _ = COMMAND.unpack(bytes(self.mesh.receive(0, COMMAND.size)))
            if what == END:
                return
            if what == PAGES:
                self.paged.reserve(first, second)
            elif what == BATCH:
                self._batch(first, second)
            elif what in (OUT, IN):
                self._move(what, first)
            else:
                raise EngineError(f"rank {self.mesh.rank} is told {what}, which is nothing that it does")

    def _batch(self, tokens: int, numbers: int) -> None:
        if not 0 < tokens <= MOST_TOKENS or not 0 < numbers <= MOST_PAGES:
            raise EngineError(f"a batch of {tokens} tokens in {numbers} numbers; at most {MOST_TOKENS:,} are taken")
        plan = self.mesh.receive_tensor(0, torch.empty(numbers, dtype=torch.int32)).tolist()
        hidden = self.mesh.receive_tensor(0, torch.empty(tokens, int(self.cut.config.hidden_size)))
        self.paged.compute(hidden, read_plan(plan, tokens, self.paged.held))

    def _move(self, what: int, count: int) -> None:
        memory = self.paged.held
        if not 0 < count <= memory.pages:
            raise EngineError(f"{count} pages are to be moved; there are {memory.pages}")
        table = self.mesh.receive_tensor(0, torch.empty(count, dtype=torch.int32)).tolist()
        if what == OUT:
            for tensor in memory.copy_out(table):
                self.mesh.send_tensor(0, tensor)
        else:
            memory.copy_in(table, [self.mesh.receive_tensor(0, like) for like in self.paged.likes(count)])


class Spread(Memory):
    """The pages of all ranks, as the engine sees them: what is set aside comes from everyone and goes back there."""

    def __init__(self, master: PagedMaster, pages: int, size: int) -> None:
        self.pages, self.size, self.master, self.own = pages, size, master, master.paged.held

    def copy_out(self, table: Sequence[int]) -> list[Tensor]:
        """Return a copy of what a table's pages hold, rank after rank."""
        self._tell(OUT, table)
        found = self.own.copy_out(table)
        for other in range(1, self.master.mesh.size):
            found += [self.master.mesh.receive_tensor(other, like) for like in self._likes(other, len(table))]
        return found

    def copy_in(self, table: Sequence[int], content: Sequence[Tensor]) -> None:
        """Put back what ``copy_out`` returned, into pages of as many positions."""
        self._tell(IN, table)
        count = 2 * len(self.master.paged.shapes)
        self.own.copy_in(table, content[:count])
        for other in range(1, self.master.mesh.size):
            for tensor in content[other * count : (other + 1) * count]:
                self.master.mesh.send_tensor(other, tensor)

    def _tell(self, what: int, table: Sequence[int]) -> None:
        self.master.tell(what, len(table), 0)
        for other in range(1, self.master.mesh.size):
            self.master.mesh.send_tensor(other, torch.tensor(table, dtype=torch.int32))

    def _likes(self, other: int, count: int) -> list[Tensor]:
        return _likes(_shapes(self.master.group, self.master.cut.config, other), count, self.size)


class TensorParallel:
    """An executor over ranks of this machine, started here and ended with it.

    A rank that is lost fails the batch under way; the next one starts all ranks anew, whose pages are empty then.

    Parameters
    ----------
    group : Group
        The model, and how it is shared out.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.memory: Memory | None = None
        self._room = (0, 0)
        self._stack = ExitStack()
        self._master: PagedMaster | None = None
        master = self._started()
        config = master.cut.config
        self.vocabulary = int(config.vocab_size)
        self.context = int(getattr(config, "max_position_embeddings", 0) or 2048)
        ranked = (_shapes(group, config, rank) for rank in range(len(group.weights)))
        self.position_bytes = sum(shape.bytes for shapes in ranked for shape in shapes)

    def reserve(self, pages: int, size: int) -> None:
        """Make room for this many pages of ``size`` positions on every rank."""
        self._room = (pages, size)
        master = self._started()
        master.tell(PAGES, pages, size)
        master.paged.reserve(pages, size)
        self.memory = Spread(master, pages, size)

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Return logits of shape (sum of ``wanted``, vocabulary), pieces in the given order."""
        if any(piece.adapter for piece in pieces):
            raise EngineError("adapters are not shared out over ranks: serve them whole")
        extents = [Extent(piece.start, piece.start + len(piece.tokens), piece.table) for piece in pieces]
        master = self._started()
        try:
            states = master.batch([token for piece in pieces for token in piece.tokens], extents)
        except BaseException:  # the ranks may stand in the middle of it: none of them can go on
            self._end()
            raise
        wanted, at = list[int](), 0
        for piece in pieces:
            at += len(piece.tokens)
            wanted += range(at - piece.wanted, at)
        if not wanted:
            return torch.empty(0, self.vocabulary)
        with torch.inference_mode():
            return master.cut.head(states[wanted][None])[0]

    def forget(self, sequence: int) -> None:
        """Pages are the caller's: there is nothing to drop."""

    def close(self) -> None:
        """End the ranks."""
        self._end()

    def _started(self) -> PagedMaster:
        if self._master is None:
            self._master = self._stack.enter_context(ranks_of(self.group, PagedMaster, PagedWorker))
            if self._room[0]:
                self.reserve(*self._room)
        return self._master

    def _end(self) -> None:
        self._master, self.memory = None, None
        stack, self._stack = self._stack, ExitStack()
        with suppress(EngineError):  # a rank that is gone cannot be told to end
            stack.close()


def _shapes(group: Group, config: PreTrainedConfig, rank: int) -> list[Shape]:
    """Return what one rank keeps of a position: its share of the heads, in every block."""
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    shape = Shape(len(shares(heads, group.weights)[rank]), width, width)
    return [shape] * int(config.num_hidden_layers)


def _likes(shapes: Sequence[Shape], pages: int, size: int) -> list[Tensor]:
    """Return tensors like those that ``Memory.copy_out`` returns for so many pages."""
    keys = [torch.empty(pages, size * shape.heads * shape.key_width) for shape in shapes]
    return [*keys, *(torch.empty(pages, size * shape.heads * shape.value_width) for shape in shapes)]


def pack_plan(extents: Sequence[Extent]) -> Tensor:
    """Write what a worker must know of a batch beside its states."""
    numbers = [number for each in extents for number in (each.start, each.end, len(each.table), *each.table)]
    return torch.tensor(numbers, dtype=torch.int32)


def read_plan(numbers: Sequence[int], tokens: int, memory: Memory) -> list[Extent]:
    """Read what ``pack_plan`` wrote; ``EngineError`` when it is not for these tokens and pages."""
    extents, at = list[Extent](), 0
    while at + 3 <= len(numbers):
        start, end, count = numbers[at : at + 3]
        table = tuple(numbers[at + 3 : at + 3 + count])
        at += 3 + max(count, 0)
        inside = len(table) == count and all(0 <= page < memory.pages for page in table)
        if not inside or not 0 <= start < end <= count * memory.size:
            raise EngineError(f"positions {start} to {end} do not lie in {count} pages of {memory.size}")
        extents.append(Extent(start, end, table))
    if at != len(numbers) or sum(each.end - each.start for each in extents) != tokens:
        raise EngineError(f"a batch of {tokens} tokens comes with a plan for others")
    return extents
