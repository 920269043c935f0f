"""Engines that others keep and that answer a batch at a time: a queue, a thread, and tokens handed on as they come."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerFast

from mycel.errors import GenerationError
from mycel.generation.request import Reason, Request, Spans, Token
from mycel.generation.sequence import Listener
from mycel.generation.streaming import Streamer
from mycel.generation.text import Reader


@dataclass(eq=False)
class Ticket:
    """One request in the queue or under way."""

    request: Request
    listener: Listener
    reader: Reader
    made: int = 0
    abandoned: bool = False
    ended: Reason | None = field(default=None)

    def give(self, token: int, logprob: float | None = None) -> bool:
        """Take a token from the engine; return whether the engine should stop this request."""
        if self.ended or self.abandoned:
            return True
        self.made += 1
        ends = token in self.request.ends
        text = "" if ends else self.reader.read(token)
        if ends or self.reader.stopped:
            self.ended = "stop"
        elif self.made == self.request.most:
            self.ended = "length"
        if self.ended:
            text += self.reader.finish()
        self.listener(Token(token, text, logprob, (), self.ended))
        return self.ended is not None

    def finish(self, reason: Reason) -> None:
        """End a request that the engine ended by itself."""
        if self.ended is None:
            text = "" if reason == "error" else self.reader.finish()
            self.ended = reason
            self.listener(Token(-1, text, reason=reason))


class Batched(Streamer):
    """A back end over an engine that takes a batch and returns when all of it is done.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
        The model's.
    vocabulary, context, most : int
        As for any back end.
    batch : int
        Most requests given to the engine at once.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, vocabulary: int, context: int, most: int, batch: int
    ) -> None:
        super().__init__(vocabulary, context, most)
        self.tokenizer, self.batch = tokenizer, batch
        self._queue: deque[Ticket] = deque()
        self._lock = threading.Lock()  # of the queue
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    def alike(self, request: Request) -> Hashable:
        """Return what requests of one batch must have in common.

        Raises
        ------
        GenerationError
            When the engine cannot do what is asked.
        """
        raise NotImplementedError

    def generate(self, tickets: Sequence[Ticket]) -> None:
        """Generate for alike requests, giving each its tokens."""
        raise NotImplementedError

    def check(self, request: Request) -> None:
        """Refuse a request that can never be answered."""
        super().check(request)
        if request.sampling.frequency_penalty or request.sampling.presence_penalty or request.sampling.logprobs >= 0:
            raise GenerationError("this engine knows no penalties and reports no logprobs: use --engine mycel")
        if request.guess is not None:
            raise GenerationError("this engine verifies no guesses: use --engine mycel")
        self.alike(request)

    async def begin(self, request: Request, listener: Listener, spans: Spans) -> Ticket:
        """Put a request into the queue."""
        ticket = Ticket(request, listener, Reader(self.tokenizer, request.stop))
        with self._lock:
            self._queue.append(ticket)
        self._wake.set()
        return ticket

    def abandon(self, started: Ticket) -> None:
        """Let the engine stop at the request's next token."""
        started.abandoned = True

    def close(self) -> None:
        """Stop the thread when the batch under way has ended."""
        self._stopping = True
        for ticket in list(self._queue):
            ticket.abandoned = True
        self._wake.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stopping:
            self._wake.clear()
            tickets = self._next()
            if not tickets:
                self._wake.wait()
                continue
            try:
                self.generate(tickets)
                for ticket in tickets:
                    ticket.finish("stop")
            except Exception as error:  # one bad batch must not end the service
                self.failure = f"{type(error).__name__}: {error}"[:300]
                for ticket in tickets:
                    ticket.finish("error")

    def _next(self) -> list[Ticket]:
        with self._lock:
            waiting = [ticket for ticket in self._queue if not ticket.abandoned]
            alike = [ticket for ticket in waiting if self.alike(ticket.request) == self.alike(waiting[0].request)]
            chosen = alike[: self.batch]
            self._queue = deque(ticket for ticket in waiting if ticket not in chosen)
        return chosen
