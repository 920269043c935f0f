"""A model that a swarm holds, seen from its owner: embedding and head are here, the blocks are with the peers.

A session keeps what it sent into each hop. When a peer is lost, answers too late, or answers what cannot be, another
one gets these inputs in one call, which rebuilds its keys and values; all other hops are left as they are.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mycel.decisions.routing import Leg
from mycel.engines.peers import PeerLost, PeerRefused, Peers
from mycel.errors import EngineError, ModelError, ParcelError
from mycel.models.cut import Cut
from mycel.segments.boundary import Boundary, sound
from mycel.segments.directory import Directory
from mycel.segments.session import Hop, Session

MOST_ATTEMPTS = 32  # replacements in one step, after which the swarm is too unsteady to go on


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
    """

    def __init__(self, peers: Peers, cut: Cut, model: str, codec: str, patience: float) -> None:
        self.peers, self.cut, self.model, self.patience = peers, cut, model, patience
        self.width = int(cut.config.hidden_size)
        self.vocabulary = int(cut.config.vocab_size)
        self.context = int(getattr(cut.config, "max_position_embeddings", 0) or 2048)
        self.directory = Directory(peers, model, cut.depth)
        self.boundary = Boundary(codec)
        self.pauses: list[float] = []
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
            routes.setdefault(turn.session.route, []).append(place)
        await asyncio.gather(
            *(self._travel([turns[place].session for place in places], [starts[place] for place in places])
              for places in routes.values())
        )  # fmt: skip
        wanted = []
        for turn, start in zip(turns, starts, strict=True):
            turn.session.length = start + len(turn.tokens)
            states = turn.session.out
            wanted.append(states[len(states) - turn.wanted :])
        with torch.inference_mode():
            return self.cut.head(torch.cat(wanted)[None])[0]

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
        for peer, names in keys.items():
            frame = self.boundary.pack("close", {"sessions": names})
            try:
                await self.peers.call(peer, "close", frame, within=5.0)
            except EngineError:
                continue  # a peer that is gone has dropped them already

    async def close(self) -> None:
        """Stop watching the swarm; the member itself stays."""
        await self.directory.close()

    async def _route(self) -> list[Hop]:
        legs = await self.directory.route(0, self.cut.depth, self.patience)
        return [Hop(leg, torch.empty(0, self.width)) for leg in legs]

    def _enter(self, turn: Turn, start: int) -> None:
        ids = torch.tensor([list(turn.tokens)])
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary:
            raise ModelError(f"a token is outside the vocabulary of {self.vocabulary:,}")
        with torch.inference_mode():
            states = self.cut.embed(ids, torch.arange(start, start + ids.shape[1])[None])[0]
        turn.session.hops[0].receive(states.clone(), start)

    async def _travel(self, sessions: list[Session], starts: list[int]) -> None:
        """Take sessions that share a route from its first block to its last."""
        place = attempts = 0
        lost_at: float | None = None
        loop = asyncio.get_running_loop()
        while place < len(sessions[0].hops):
            hops = [session.hops[place] for session in sessions]
            began = loop.time()
            try:
                answers = await self._cross(hops)
            except (PeerLost, PeerRefused, ParcelError) as error:
                attempts += 1
                if attempts > MOST_ATTEMPTS:
                    raise EngineError(f"{attempts} peers failed in one step, last: {error}") from error
                lost_at = began if lost_at is None else lost_at
                await self._replace(sessions, place, error)
                continue
            if lost_at is not None:
                self.pauses.append(loop.time() - lost_at)
                lost_at = None
            for session, hop, (begin, states), start in zip(sessions, hops, answers, starts, strict=True):
                if place + 1 < len(session.hops):
                    follower = session.hops[place + 1]
                    enter = max(begin, min(len(follower.inputs), start))
                    follower.receive(states[enter - begin :], enter)
                else:
                    session.out = states[start - begin :]
                hop.held = len(hop.inputs)
            place += 1

    async def _cross(self, hops: list[Hop]) -> list[tuple[int, Tensor]]:
        """Send what a peer does not hold yet; return for each session from where on it answered, and the states."""
        leg, known = hops[0].leg, self.directory.known[hops[0].leg.peer]
        if self.directory.banned(leg.peer):  # it failed at other blocks a moment ago: waiting again would be in vain
            raise PeerRefused(f"the peer {leg.peer!r} has just failed")
        counts = [len(hop.inputs) - hop.held for hop in hops]
        rows = [[hop.key, hop.held, count] for hop, count in zip(hops, counts, strict=True)]
        total = sum(counts)
        header = {"rows": rows, "first": leg.first, "last": leg.last, "model": self.model}
        frame = self.boundary.pack("step", header, hidden=torch.cat([hop.inputs[hop.held :] for hop in hops]))
        loop = asyncio.get_running_loop()
        started = loop.time()
        answer = await self.peers.call(leg.peer, "step", frame, known.allowance(total) or self.patience)
        parcel = Boundary.unpack(answer, ("stepped", "lost"))
        if parcel.kind == "lost":
            if all(hop.held == 0 for hop in hops):
                raise ParcelError(f"the peer {leg.peer!r} says that it lost what it was never sent")
            self._count_replay(hops)
            return await self._cross(hops)
        states = sound(parcel, "hidden", (total, self.width))
        known.learn(total, loop.time() - started)
        parts = torch.split(states, counts)
        return [(hop.held, part) for hop, part in zip(hops, parts, strict=True)]

    async def _replace(self, sessions: list[Session], place: int, error: EngineError | ParcelError) -> None:
        leg = sessions[0].hops[place].leg
        if isinstance(error, ParcelError):
            self.directory.lied(leg.peer)
        elif isinstance(error, PeerLost):
            self.directory.late(leg.peer)
        legs = await self.directory.route(leg.first, leg.last, self.patience, avoid=leg.peer)
        for session in sessions:
            self._count_replay([session.hops[place]])
            session.replayed += len(session.hops[place].inputs)
            session.hops[place : place + 1] = session.hops[place].replaced(legs)

    def _count_replay(self, hops: list[Hop]) -> None:
        for hop in hops:
            self.replays += 1
            hop.held = 0


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
