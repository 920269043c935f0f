"""A model that a swarm holds, seen from its owner: embedding and head are here, the blocks are with the peers.

A session keeps what it sent into each hop. When a peer is lost, answers too late, or answers what cannot be, another
one gets these inputs in one call, which rebuilds its keys and values; all other hops are left as they are.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mycel.decisions.routing import Leg
from mycel.engines.peers import Peers
from mycel.errors import EngineError, ModelError
from mycel.models.cut import Cut
from mycel.models.linear import quicken
from mycel.segments.boundary import Boundary
from mycel.segments.crossing import Crossing
from mycel.segments.directory import Directory
from mycel.segments.session import Hop, Session
from mycel.segments.steps import Forms

Found = TypeVar("Found")


@dataclass(frozen=True)
class Turn:
    """New tokens of one session.

    Attributes
    ----------
    session : Session
        Whose.
    tokens : sequence of int
        At positions ``start`` and on.
    start : int, optional
        By default where the session ends; an earlier one takes back what follows it.
    wanted : int
        Number of last tokens whose logits are wanted.
    """

    session: Session
    tokens: Sequence[int]
    start: int | None = None
    wanted: int = 1


class SwarmModel:
    """A model whose blocks are held by the peers of a swarm; made by ``open``.

    Attributes
    ----------
    cut : Cut
        Embedding and head.
    directory : Directory
        Who serves what.
    boundary : Boundary
        What left here: bytes, and the codec's error.
    pauses : list of float
        Seconds from the call that a lost peer left unanswered to the answer of the one that took its place.
    notice : callable
        Told when a peer is lost (``lost``) and when its sessions go on (``resumed``), with facts by name.
    """

    def __init__(self, peers: Peers, cut: Cut, model: str, codec: str, patience: float) -> None:
        self.peers, self.cut, self.model, self.patience = peers, cut, model, patience
        self.forms, self.turns = Forms(), itertools.count(1)
        self.width = int(cut.config.hidden_size)
        self.vocabulary = int(cut.config.vocab_size)
        self.context = int(getattr(cut.config, "max_position_embeddings", 0) or 2048)
        self.directory = Directory(peers, model, cut.depth)
        self.boundary = Boundary(codec)
        self.pauses: list[float] = []
        self.notice: Callable[..., None] = lambda kind, **facts: None
        self.replays = 0

    @classmethod
    async def open(cls, peers: Peers, folder: Path, codec: str = "raw", patience: float = 30.0) -> SwarmModel:
        """Read embedding and head from ``folder`` and look for peers that serve the rest.

        Parameters
        ----------
        peers : Peers
            This member of the swarm.
        folder : Path
            The model in Hugging Face's format; the blocks' weights are not read.
        codec : str
            How states cross (``mycel.wire.codecs``).
        patience : float
            Seconds to wait for blocks that nobody holds.
        """
        cut = await asyncio.to_thread(Cut.open, folder, 0, 0)
        quicken(cut.model, pack=False)
        return cls(peers, cut, fingerprint(folder), codec, patience)

    async def step(self, turns: Sequence[Turn]) -> Tensor:
        """Compute new tokens of distinct sessions of unequal lengths together.

        Calls for disjoint sessions may run at the same time, which keeps all peers of a chain busy.

        Returns
        -------
        Tensor
            Logits ``[sum of wanted, vocabulary]``, turns in the given order.

        Raises
        ------
        EngineError
            When some block stays without a peer for ``patience`` seconds (the message says which), or peers are
            lost faster than they can be replaced. Sessions can be stepped again from where they were.
        """
        starts = [turn.session.length if turn.start is None else turn.start for turn in turns]
        for turn, start in zip(turns, starts, strict=True):
            if not 0 <= start <= turn.session.length or not turn.tokens:
                raise EngineError(f"a turn begins at {start} in a session of {turn.session.length} positions")
            if start + len(turn.tokens) > self.context:
                raise EngineError(
                    f"a sequence of {start + len(turn.tokens):,} tokens; the model takes {self.context:,}"
                )
        routes: dict[tuple[Leg, ...], list[int]] = {}
        for place, turn in enumerate(turns):
            if not turn.session.hops:
                turn.session.hops = await self._route()
            self._enter(turn, starts[place])
            turn.session.length = starts[place]  # should the way end early, the session goes on from here
            routes.setdefault(turn.session.route, []).append(place)
        crossings = [
            Crossing(self, [turns[place].session for place in places], [starts[place] for place in places])
            for places in routes.values()
        ]
        if len(crossings) == 1:
            await crossings[0].run()
        else:
            await all_of(*(crossing.run() for crossing in crossings))
        wanted = []
        for turn, start in zip(turns, starts, strict=True):
            turn.session.length = start + len(turn.tokens)
            states = turn.session.out
            wanted.append(states[len(states) - turn.wanted :])
        with torch.inference_mode():
            return self.cut.head((wanted[0] if len(wanted) == 1 else torch.cat(wanted))[None])[0]

    async def generate(self, prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> list[int]:
        """Return ``count`` greedy tokens, fewer when one of ``stop`` comes."""
        session, tokens = Session(), list[int]()
        new: Sequence[int] = prompt
        try:
            while len(tokens) < count and not (tokens and tokens[-1] in stop):
                new = [int((await self.step([Turn(session, new)]))[0].argmax())]
                tokens += new
        finally:
            await self.forget([session])
        return tokens

    async def forget(self, sessions: Sequence[Session]) -> None:
        """Let the peers drop what they hold for these sessions."""
        keys: dict[str, list[str]] = {}
        for session in sessions:
            for hop in session.hops:
                keys.setdefault(hop.leg.peer, []).append(hop.key)
            session.hops = []
        await asyncio.gather(*(self._close(peer, names) for peer, names in keys.items()))

    async def close(self) -> None:
        """Stop watching the swarm; the member itself stays."""
        await self.directory.close()

    async def _close(self, peer: str, names: list[str]) -> None:
        frame = self.boundary.pack("close", {"sessions": names})
        with suppress(EngineError):  # a peer that is gone has dropped them already
            await self.peers.call(peer, "close", frame, within=5.0)

    async def _route(self) -> list[Hop]:
        legs = await self.directory.route(0, self.cut.depth, self.patience)
        return [Hop(leg, torch.empty(0, self.width)) for leg in legs]

    def _enter(self, turn: Turn, start: int) -> None:
        if min(turn.tokens) < 0 or max(turn.tokens) >= self.vocabulary:
            raise ModelError(f"a token is outside the vocabulary of {self.vocabulary:,}")
        with torch.inference_mode():
            ids = torch.tensor([list(turn.tokens)])
            states = self.cut.embed(ids, torch.arange(start, start + ids.shape[1])[None])[0]
        turn.session.hops[0].receive(states, start)

    def count_replay(self, hops: list[Hop]) -> None:
        """Take note that all inputs of these hops are sent again."""
        for hop in hops:
            self.replays += 1
            hop.held = 0


async def all_of(*works: Awaitable[Found]) -> list[Found]:
    """Return what all of them return; when one fails, it is raised after the others have ended too."""
    done = await asyncio.gather(*works, return_exceptions=True)
    for each in done:
        if isinstance(each, BaseException):
            raise each
    return [each for each in done if not isinstance(each, BaseException)]


def fingerprint(folder: Path) -> str:
    """Return 16 hexadecimal digits of a model: its configuration, its weights' names and shapes, and some of them."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            for place in range(8):
                file.seek(place * size // 8)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()[:16]
