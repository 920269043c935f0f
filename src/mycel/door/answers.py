"""The JSON of answers: whole, and in pieces as they come."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerFast

from mycel.generation.request import Token


@dataclass
class Choice:
    """One continuation so far; ``named`` are the characters of those tokens that a stream has named."""

    index: int
    echo: str = ""
    text: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    reason: str | None = None
    named: int = 0

    def take(self, token: Token) -> None:
        """Add a token."""
        self.text.append(token.text)
        self.reason = token.reason
        if token.id >= 0:
            self.tokens.append(token)


class Writer:
    """Writes the answers to one HTTP request.

    Parameters
    ----------
    chat : bool
        Whether the request was a chat.
    model : str
        As it was asked for.
    tokenizer : PreTrainedTokenizerFast
        To name tokens.
    logprobs : bool
        Whether log-probabilities are reported.
    asked : int
        Tokens of the prompts; a prompt with several choices counts once.
    """

    def __init__(self, chat: bool, model: str, tokenizer: PreTrainedTokenizerFast, logprobs: bool, asked: int) -> None:
        self.chat, self.model, self.tokenizer, self.logprobs = chat, model, tokenizer, logprobs
        self.asked = asked
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the answer of a request that did not stream."""
        return {**self._frame(piece=False), "choices": [self._choice(c) for c in choices], "usage": self.usage(choices)}

    def first(self, choice: Choice) -> dict[str, Any] | None:
        """Return what a stream says of a choice before its first token, if anything."""
        if self.chat:
            delta = {"role": "assistant", "content": ""}
            return self._piece({"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None})
        if choice.echo:
            return self._piece({"index": choice.index, "text": choice.echo, "logprobs": None, "finish_reason": None})
        return None

    def piece(self, choice: Choice, token: Token) -> dict[str, Any]:
        """Return what a stream says of one token."""
        scores = self._scores([token], choice) if self.logprobs and token.id >= 0 else None
        said = {"index": choice.index, "logprobs": scores, "finish_reason": token.reason}
        content = {"delta": {"content": token.text} if token.text else {}} if self.chat else {"text": token.text}
        return self._piece({**said, **content})

    def last(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the piece of a stream that holds nothing but the usage."""
        return {**self._frame(piece=True), "choices": [], "usage": self.usage(choices)}

    def usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        """Count tokens."""
        made = sum(len(choice.tokens) for choice in choices)
        return {"prompt_tokens": self.asked, "completion_tokens": made, "total_tokens": self.asked + made}

    def _piece(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._frame(piece=True), "choices": [choice]}

    def _frame(self, piece: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if piece else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        scores = self._scores(choice.tokens, choice) if self.logprobs else None
        text = "".join(choice.text)
        said = {"index": choice.index, "logprobs": scores, "finish_reason": choice.reason}
        if self.chat:
            return {**said, "message": {"role": "assistant", "content": text}}
        return {**said, "text": choice.echo + text}

    def _scores(self, tokens: Sequence[Token], choice: Choice) -> dict[str, Any]:
        if self.chat:
            content = [
                {**self._named(t.id, t.logprob), "top_logprobs": [self._named(*pair) for pair in t.top]} for t in tokens
            ]
            return {"content": content}
        names = [self._name(token.id) for token in tokens]
        *offsets, choice.named = accumulate(map(len, names), initial=choice.named)
        return {
            "tokens": names,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self._name(id): score for id, score in token.top} for token in tokens],
            "text_offset": offsets,
        }

    def _named(self, id: int, logprob: float | None) -> dict[str, Any]:
        name = self._name(id)
        return {"token": name, "logprob": logprob, "bytes": list(name.encode())}

    def _name(self, id: int) -> str:
        return str(self.tokenizer.decode([id]))
