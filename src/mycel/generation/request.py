"""What is asked of the generation service, and what comes back, token by token."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from mycel.errors import GenerationError

if TYPE_CHECKING:
    from mycel.generation.speculation import Proposal

Reason = Literal["stop", "length", "cancelled", "error"]
MOST_LOGPROBS = 20
MOST_STOPS = 16
MOST_STOP_CHARACTERS = 256


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes
    ----------
    temperature : float
        0 takes the most likely token; otherwise logits are divided by it. 0 to 100.
    top_p : float
        Least probability mass of the tokens kept, most likely first; above 0, at most 1.
    top_k : int
        Number of tokens kept; 0 keeps all.
    frequency_penalty, presence_penalty : float
        Taken from the logits of tokens generated before: per occurrence, and once. -2 to 2.
    seed : int or None
        Of the request's own generator; None draws one.
    logprobs : int
        Number of alternatives reported with each token, 0 to 20; -1 reports nothing.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logprobs: int = -1

    def __post_init__(self) -> None:
        _between("temperature", self.temperature, 0.0, 100.0)
        _between("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise GenerationError("top_p is 0, which keeps no token: use a value above 0, at most 1")
        _between("top_k", self.top_k, 0, 1_000_000)
        _between("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _between("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _between("logprobs", self.logprobs, -1, MOST_LOGPROBS)
        if self.seed is not None:
            _between("seed", self.seed, -(2**63), 2**63 - 1)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0.0


@dataclass(frozen=True)
class Request:
    """One continuation to be generated.

    Attributes
    ----------
    prompt : tuple of int
        Token ids, at least one.
    most : int
        Largest number of tokens to generate.
    sampling : Sampling
        How tokens are drawn.
    stop : tuple of str
        Texts that end the continuation; none of them is in what is returned.
    ends : frozenset of int
        Token ids that end the continuation.
    adapter : str
        Name of a loaded adapter; empty: the base.
    guess : Proposal or None
        How somebody else thinks that the prompt goes on: what stands of it and one token more are returned, and no
        more.
    """

    prompt: tuple[int, ...]
    most: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ends: frozenset[int] = frozenset()
    adapter: str = ""
    guess: Proposal | None = None

    def check(self, vocabulary: int, context: int) -> None:
        """Refuse what no model of this vocabulary and context (in tokens) can answer.

        Raises
        ------
        GenerationError
            With a sentence for whoever asked.
        """
        if not self.prompt:
            raise GenerationError("the prompt has no token: give at least one character")
        if min(self.prompt) < 0 or max(self.prompt) >= vocabulary:
            raise GenerationError(
                f"the prompt holds token ids outside 0 to {vocabulary - 1}: use this model's tokeniser"
            )
        if self.most < 1:
            raise GenerationError(f"max_tokens is {self.most}: ask for at least 1")
        if len(self.prompt) + self.most > context:
            raise GenerationError(
                f"the prompt has {len(self.prompt)} tokens and max_tokens is {self.most}, together more than the"
                f" context of {context}: shorten the prompt or lower max_tokens"
            )
        if len(self.stop) > MOST_STOPS or any(not 0 < len(text) <= MOST_STOP_CHARACTERS for text in self.stop):
            raise GenerationError(f"stop takes up to {MOST_STOPS} texts of 1 to {MOST_STOP_CHARACTERS} characters")


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes
    ----------
    id : int
        In the vocabulary.
    text : str
        What the reader may now see: complete characters, nothing that may yet become a stop text.
    logprob : float or None
        Natural logarithm of its probability under the model, before temperature and cuts.
    top : tuple of (int, float)
        The likeliest tokens with their log-probabilities.
    reason : str or None
        Why generation ended with this token; None while it goes on.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    reason: Reason | None = None


@dataclass
class Spans:
    """Where the time of one request went: moments on the monotonic clock in seconds, 0 where one is not known.

    Attributes
    ----------
    arrived, parsed, tokenised : float
        Its head was read; its body was read and checked; its prompt is tokens.
    submitted, begun : float
        Given to the engine; first computed.
    made_first, made_last : float
        The engine had the first token, the last token.
    first, last : float
        The door had them.
    reading : float
        Seconds between the first and the last moment in which tokens became text.
    sent : float
        Everything was handed to the socket.
    tokens : int
        Generated.
    """

    arrived: float = field(default_factory=time.monotonic)
    parsed: float = 0.0
    tokenised: float = 0.0
    submitted: float = 0.0
    begun: float = 0.0
    made_first: float = 0.0
    made_last: float = 0.0
    first: float = 0.0
    last: float = 0.0
    reading: float = 0.0
    sent: float = 0.0
    tokens: int = 0

    def made(self, before: float, after: float) -> None:
        """Take note of a token that the engine had at one moment and its text at another."""
        if self.made_first:
            self.reading += after - before
        else:
            self.made_first = after
        self.made_last = after

    def shares(self) -> dict[str, float]:
        """Return the seconds of each part of the way; together they are all of it, from arrival to the last byte."""
        if not self.made_last or not self.begun:  # an engine of others does not tell
            moments = [self.arrived, self.parsed, self.tokenised, self.submitted, self.last, self.sent]
            names: tuple[str, ...] = ("parse", "tokenise", "enter", "generate", "send")
        else:
            moments = [self.arrived, self.parsed, self.tokenised, self.submitted, self.begun]
            moments += [self.made_first, self.made_last, self.sent]
            names = ("parse", "tokenise", "enter", "queue", "prefill", "decode", "send")
        if not all(moments):
            return {}
        lasted = (max(0.0, after - before) for before, after in pairwise(moments))
        found = dict(zip(names, lasted, strict=True))
        if "decode" in found:
            # Text is made of tokens while others are decoded; only the first token's falls into prefill.
            found["detokenise"] = min(self.reading, found["decode"])
            found["decode"] -= found["detokenise"]
        return found


def _between(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not math.isfinite(value) or not low <= value <= high:
        raise GenerationError(f"{name} is {value}: use a number from {low} to {high}")
