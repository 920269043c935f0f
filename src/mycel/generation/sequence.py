"""One request on its way through the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerFast

from mycel.generation.request import Reason, Request, Spans, Token
from mycel.generation.sampling import Sampler
from mycel.generation.scheduler import Job, Moving, Place
from mycel.generation.text import Reader

Listener = Callable[[Token], None]


@dataclass
class Sequence:
    """A request, what was generated for it, and where its keys and values are.

    Attributes
    ----------
    tokens : list of int
        The prompt and what was generated.
    computed : int
        How many of them have keys and values.
    table : list of int
        Pages held.
    aside : int
        Pages needed to come back; 0: none are kept, everything is computed again.
    """

    id: int
    request: Request
    arrived: float
    listener: Listener
    reader: Reader | None
    sampler: Sampler
    tokens: list[int]
    computed: int = 0
    table: list[int] = field(default_factory=list)
    place: Place = "waiting"
    moving: Moving = ""
    aside: int = 0
    published: int = 0
    ended: Reason | None = None
    spans: Spans = field(default_factory=Spans)

    @classmethod
    def begin(
        cls, id: int, request: Request, arrived: float, listener: Listener, tokenizer: PreTrainedTokenizerFast | None
    ) -> Sequence:
        """Return a request that waits."""
        reader = Reader(tokenizer, request.stop) if tokenizer is not None else None
        return cls(id, request, arrived, listener, reader, Sampler(request.sampling), list(request.prompt))

    @property
    def left(self) -> int:
        """Tokens without keys and values."""
        return len(self.tokens) - self.computed

    @property
    def job(self) -> Job:
        """What a policy may know."""
        held = self.aside if self.place == "aside" else len(self.table)
        prompt, length = len(self.request.prompt), len(self.tokens)
        return Job(self.id, self.arrived, prompt, length, self.computed, held, self.place, self.moving)

    @property
    def room(self) -> int:
        """How many tokens may still be generated."""
        return len(self.request.prompt) + self.request.most - len(self.tokens)

    def accept(self, token: int, logprob: float | None, top: tuple[tuple[int, float], ...]) -> None:
        """Take a generated token and tell the listener; sets ``ended`` where it is the last."""
        self.tokens.append(token)
        self.sampler.note(token)
        ends = token in self.request.ends
        made = time.monotonic()
        text = "" if self.reader is None or ends else self.reader.read(token)
        if ends or (self.reader is not None and self.reader.stopped):
            self.ended = "stop"
        elif self.room == 0:
            self.ended = "length"
        if self.ended and self.reader is not None:
            text += self.reader.finish()
        self.spans.made(made, time.monotonic())
        self.listener(Token(token, text, logprob, top, self.ended))

    def end(self, reason: Reason) -> None:
        """Tell the listener that no further token comes."""
        self.ended = reason
        self.listener(Token(-1, "", reason=reason))
