"""The loop: each iteration a policy chooses, the executor computes, tokens go to whoever asked.

The four parts - key-value store, weights (the executor's), scheduler, executor - know nothing of each other and meet
here alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Many
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mycel.errors import GenerationError
from mycel.generation.aside import Aside
from mycel.generation.executor import Executor, Piece
from mycel.generation.moves import Moved, Moves
from mycel.generation.pages import PagePool
from mycel.generation.request import Request, Spans
from mycel.generation.scheduler import FirstComeFirstServed, Policy, View
from mycel.generation.sequence import Listener, Sequence
from mycel.generation.speculation import Drafter, Proposal, verify


@dataclass(frozen=True)
class Limits:
    """What the engine may use.

    Attributes
    ----------
    memory : int
        Bytes of keys and values.
    page : int
        Positions in a page.
    tokens, jobs : int
        Most tokens and requests in one iteration.
    aside : int
        Bytes for requests set aside; 0: they are computed again.
    share : bool
        Whether requests with the same beginning share its pages.
    guesses : int
        Most tokens guessed ahead, if there is a drafter.
    """

    memory: int = 256 << 20
    page: int = 16
    tokens: int = 256
    jobs: int = 64
    aside: int = 1 << 30
    share: bool = True
    guesses: int = 4


@dataclass
class Counts(Moved):
    """What the engine did so far."""

    steps: int = 0
    computed: int = 0
    generated: int = 0
    shared: int = 0
    guessed: int = 0
    kept: int = 0


class Engine:
    """Generates for many requests at once; one thread calls it.

    Parameters
    ----------
    executor : Executor
        Computes.
    tokenizer : PreTrainedTokenizerFast, optional
        Makes text of tokens; without it tokens have none.
    limits : Limits
        What may be used.
    policy : Policy, optional
        First come, first served by default.
    drafter : Drafter, optional
        Guesses tokens ahead.
    clock : callable
        Seconds.
    background : bool
        Whether pages that the policy moves early are copied beside the computing.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: PreTrainedTokenizerFast | None = None,
        limits: Limits | None = None,
        policy: Policy | None = None,
        drafter: Drafter | None = None,
        clock: Callable[[], float] = time.monotonic,
        background: bool = True,
    ) -> None:
        self.executor, self.tokenizer, self.drafter, self.clock = executor, tokenizer, drafter, clock
        self.limits = limits or Limits()
        self.policy = policy or FirstComeFirstServed()
        page = self.limits.page
        if executor.position_bytes:
            pages = max(1, self.limits.memory // (executor.position_bytes * page))
        else:  # elsewhere there is room for whatever is under way; pages only count it
            pages = self.limits.jobs * -(-executor.context // page)
        executor.reserve(pages, page)
        # Only pages of this process can be shared between sequences or moved aside.
        self.pool = PagePool(pages, page, self.limits.share and executor.memory is not None)
        self.aside = Aside(self.limits.aside, background)
        self.counts = Counts()
        self._moves = Moves(executor, self.pool, self.aside, self.counts)
        self.context = min(executor.context, pages * page)
        self._active: dict[int, Sequence] = {}
        self._memory: Hashable = None
        self._next = 0

    @property
    def waiting(self) -> int:
        """Requests that are not finished."""
        return len(self._active)

    def check(self, request: Request) -> None:
        """Refuse a request that can never be answered."""
        request.check(self.executor.vocabulary, self.context)

    def submit(self, request: Request, listener: Listener, spans: Spans | None = None) -> int:
        """Take a request; ``listener`` is called with each token, ``spans`` told of moments. Returns its identity."""
        self.check(request)
        self._next += 1
        sequence = Sequence.begin(self._next, request, self.clock(), listener, self.tokenizer)
        sequence.spans = spans or sequence.spans
        self._active[self._next] = sequence
        return self._next

    def cancel(self, identity: int) -> None:
        """Stop a request and give back what it holds; nothing happens if it has ended."""
        sequence = self._active.get(identity)
        if sequence is not None:
            sequence.end("cancelled")
            self._leave(sequence)

    def fail_all(self) -> None:
        """End every request with an error and give back what they hold; what failed may have spoilt any page."""
        failed = list(self._active.values())
        for sequence in failed:
            sequence.end("error")
        for sequence in failed:
            with suppress(Exception):  # it failed already; what others hold must come back all the same
                self._leave(sequence)
        self.pool.unshare()

    def step(self) -> bool:
        """Compute one iteration; False when there is nothing to do."""
        if not self._active:
            self._memory = None
            return False
        self._moves.take_note(self._active)
        step = self.policy.decide(self.view())
        self._memory = step.memory
        for identity in step.aside:
            self._moves.set_aside(self._active[identity])
        for identity in step.back:
            # Pages that others share did not come free with whoever was set aside: who misses them comes back later.
            if self._active[identity].aside <= self.pool.available:
                self._moves.bring_back(self._active[identity])
        chosen = [(self._active[identity], tokens) for identity, tokens in step.run]
        chosen = [(sequence, tokens) for sequence, tokens in chosen if sequence.place != "aside"]
        # Requests that find a shared beginning need other pages than planned: they take theirs last.
        chosen.sort(key=lambda pair: pair[0].place == "waiting")
        pieces = [self._piece(sequence, tokens) for sequence, tokens in chosen]
        work = [(sequence, *piece) for (sequence, _), piece in zip(chosen, pieces, strict=True) if piece is not None]
        if not work:
            if step.aside:  # that made room, if less than was planned
                return True
            raise GenerationError(
                f"{type(self.policy).__name__} chose nothing to compute among {len(self._active)} jobs"
            )
        self._moves.begin(step, self._active)
        logits = self.executor.run([piece for _, piece, _ in work])
        self.counts.steps += 1
        self._take(work, logits)
        return True

    def run(self) -> None:
        """Compute until every request has ended."""
        while self.step():
            pass

    def view(self) -> View:
        """Return what the policy sees now."""
        jobs = tuple(sequence.job for sequence in self._active.values())
        limits = self.limits
        return View(self.clock(), jobs, self.pool.available, self.pool.size, limits.tokens, limits.jobs, self._memory)

    def _piece(self, sequence: Sequence, tokens: int) -> tuple[Piece, Proposal] | None:
        if sequence.place == "waiting":
            sequence.table = self.pool.find(sequence.tokens, sequence.request.adapter)
            sequence.computed = len(sequence.table) * self.pool.size
            self.counts.shared += sequence.computed
        self._moves.stand_still(sequence)
        room = (len(sequence.table) + self.pool.available) * self.pool.size - sequence.computed
        count = min(tokens, sequence.left, room)
        if count < 1:
            if sequence.place == "waiting":
                self._moves.release(sequence)
            return None
        sequence.place = "resident"
        sequence.spans.begun = sequence.spans.begun or self.clock()
        proposal = Proposal(())
        if sequence.request.guess is not None and sequence.left == count:
            proposal = sequence.request.guess.first(min(sequence.room - 1, room - count))
        elif self.drafter is not None and sequence.left == count == 1:
            most = min(self.limits.guesses, sequence.room - 1, room - 1)
            if most > 0:
                proposal = self.drafter.propose(sequence.id, sequence.tokens, most, sequence.sampler)
        start = sequence.computed
        new = (*sequence.tokens[start : start + count], *proposal.tokens)
        self.counts.guessed += len(proposal.tokens)
        missing = self.pool.pages_for(start + len(new)) - len(sequence.table)
        if missing > 0:
            sequence.table += self.pool.take(missing)
        wanted = 1 + len(proposal.tokens) if count == sequence.left else 0
        return Piece(sequence.id, new, start, tuple(sequence.table), sequence.request.adapter, wanted), proposal

    def _take(self, work: Many[tuple[Sequence, Piece, Proposal]], logits: Tensor) -> None:
        best = logits.argmax(-1).tolist() if len(logits) else []
        at = 0
        for sequence, piece, proposal in work:
            rows = slice(at, at + piece.wanted)
            at += piece.wanted
            count = len(piece.tokens) - len(proposal.tokens)
            sequence.computed += count
            self.counts.computed += len(piece.tokens)
            if piece.wanted:
                self._extend(sequence, proposal, logits[rows], best[rows])
            if sequence.computed // self.pool.size > sequence.published // self.pool.size:
                computed = sequence.tokens[: sequence.computed]
                self.pool.publish(sequence.table, computed, sequence.request.adapter, sequence.published)
                sequence.published = sequence.computed
            if sequence.ended:
                self._leave(sequence)

    def _extend(self, sequence: Sequence, proposal: Proposal, logits: Tensor, best: list[int]) -> None:
        if sequence.sampler.plain and proposal.probabilities is None:
            kept = 0
            while kept < len(proposal.tokens) and proposal.tokens[kept] == best[kept]:
                kept += 1
            tokens = [*proposal.tokens[:kept], best[kept]]
        else:
            targets = [
                sequence.sampler.distribution(row, proposal.tokens[:index]) for index, row in enumerate(logits.unbind())
            ]
            tokens = verify(proposal, targets, sequence.sampler)
        self.counts.kept += len(tokens) - 1
        for index, token in enumerate(tokens):
            if index > 0:
                sequence.computed += 1
            self.counts.generated += 1
            sequence.accept(token, *sequence.sampler.report(logits[index], token))
            if sequence.ended:
                return
        if sequence.request.guess is not None:
            sequence.end("length")

    def _leave(self, sequence: Sequence) -> None:
        del self._active[sequence.id]
        self._moves.release(sequence)
        if self.drafter is not None:
            self.drafter.forget(sequence.id)


def greedy(engine: Engine, prompts: Many[Many[int]], most: int, adapters: Many[str] = ()) -> list[list[int]]:
    """Return the greedy continuations of several prompts at once, tokens only."""
    found: list[list[int]] = [[] for _ in prompts]
    for index, prompt in enumerate(prompts):
        adapter = adapters[index] if adapters else ""
        engine.submit(Request(tuple(prompt), most, adapter=adapter), _collector(found[index]))
    with torch.inference_mode():
        engine.run()
    return found


def _collector(found: list[int]) -> Listener:
    return lambda token: found.append(token.id)
