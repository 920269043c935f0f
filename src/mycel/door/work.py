"""One HTTP request at work: its prompts as token ids, its choices under way, its answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from mycel.door.answers import Choice, Writer
from mycel.door.chat import chat_prompt
from mycel.door.metrics import Metrics
from mycel.door.schema import ChatBody, CompletionBody, Refused
from mycel.door.sending import Parts, unless_gone
from mycel.generation.request import Request, Spans, Token
from mycel.generation.served import Served
from mycel.serve.edge_draft import verdict

Burst = list[tuple[Choice, Token]]
"""Tokens that have come, each with the choice that it belongs to."""


class Work:
    """The choices of one request.

    Parameters
    ----------
    served : Served
        What generates.
    requests : list of (Request, str)
        One for each choice, and the text to echo before it.
    writer : Writer
        Forms the answer.
    spans : Spans
        What is known of the request's way so far.
    """

    def __init__(self, served: Served, requests: list[tuple[Request, str]], writer: Writer, spans: Spans) -> None:
        self.served, self.writer = served, writer
        spans = replace(spans, tokenised=time.monotonic())
        self.spans = [replace(spans) for _ in requests]
        self.requests = [request for request, _ in requests]
        self.choices = [Choice(index, echo) for index, (_, echo) in enumerate(requests)]
        self.streams = False
        self._noted: set[int] = set()

    def check(self) -> None:
        """Refuse at once what cannot be answered."""
        if len(self.requests) > self.served.backend.most:
            raise Refused(
                400,
                f"{len(self.requests)} choices are asked for at once, and at most {self.served.backend.most} requests"
                " are under way here: send fewer prompts, or lower n",
            )
        for request in self.requests:
            request.check(self.served.backend.vocabulary, self.served.backend.context)

    async def whole(self, http: HttpRequest, metrics: Metrics) -> bytes:
        """Return the finished answer, as JSON.

        Raises
        ------
        ClientDisconnect
            When the client has gone; what was under way is cancelled.
        """
        try:
            return _json(self.writer.whole(await unless_gone(http.receive, self._gather(metrics))))
        finally:
            for index in range(len(self.requests)):
                self._note(index, metrics)

    async def verdict(self, http: HttpRequest, metrics: Metrics) -> bytes:
        """Return which tokens of the request's guess stand, as a parcel."""
        try:
            choices = await unless_gone(http.receive, self._gather(metrics))
            return verdict([token.id for token in choices[0].tokens])
        finally:
            self._note(0, metrics)

    async def streamed(self, http: HttpRequest, metrics: Metrics, usage: bool) -> Response:
        """Return a response that sends tokens as they come; the first is awaited, so that a refusal has its status."""
        self.streams = True
        pieces = self._pieces(metrics)
        try:
            first = await unless_gone(http.receive, anext(pieces))
        except BaseException:
            await pieces.aclose()
            raise
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return Parts(self._events(first, pieces, usage), 200, headers, "text/event-stream", pieces.aclose)

    async def _events(self, first: Burst, rest: AsyncGenerator[Burst], usage: bool) -> AsyncGenerator[bytes]:
        """Yield events; those of tokens that came together are one part, and take one write."""
        openings = [self.writer.first(choice) for choice in self.choices]
        yield b"".join(_event(opening) for opening in openings if opening is not None) + self._said(first)
        try:
            async for burst in rest:
                yield self._said(burst)
        except Exception as error:
            # The status is long sent: the stream itself says what happened, and ends without its mark.
            yield _event({"error": {"message": str(error)[:300], "type": "server_error"}})
            return
        yield (_event(self.writer.last(self.choices)) if usage else b"") + b"data: [DONE]\n\n"

    def _said(self, burst: Burst) -> bytes:
        return b"".join([_event(self.writer.piece(choice, token)) for choice, token in burst])

    async def _gather(self, metrics: Metrics) -> list[Choice]:
        async with aclosing(self._pieces(metrics)) as pieces:
            async for _ in pieces:
                pass
        return self.choices

    async def _pieces(self, metrics: Metrics) -> AsyncGenerator[Burst]:
        """Yield the tokens of all choices as they come; the first failure ends all of them."""
        if len(self.requests) == 1:
            async with aclosing(self._bursts(0, metrics)) as bursts:
                async for burst in bursts:
                    yield burst
            return
        arrived: asyncio.Queue[Burst | Exception | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._forward(index, metrics, arrived)) for index in range(len(self.requests))]
        left = len(tasks)
        try:
            while left:
                found = await arrived.get()
                if isinstance(found, Exception):
                    raise found
                if found is None:
                    left -= 1
                else:
                    yield found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _forward(self, index: int, metrics: Metrics, arrived: asyncio.Queue[Burst | Exception | None]) -> None:
        try:
            async with aclosing(self._bursts(index, metrics)) as bursts:
                async for burst in bursts:
                    arrived.put_nowait(burst)
        except Exception as error:  # raised by whoever reads
            arrived.put_nowait(error)
        else:
            arrived.put_nowait(None)

    async def _bursts(self, index: int, metrics: Metrics) -> AsyncGenerator[Burst]:
        choice = self.choices[index]
        try:
            async with aclosing(self.served.backend.bursts(self.requests[index], self.spans[index])) as bursts:
                async for burst in bursts:
                    for token in burst:
                        choice.take(token)
                    yield [(choice, token) for token in burst]
        finally:
            if self.streams:  # its last token is with the socket; a whole answer is still to be formed
                self._note(index, metrics)

    def _note(self, index: int, metrics: Metrics) -> None:
        if index in self._noted:
            return
        self._noted.add(index)
        spans, ended = self.spans[index], self.choices[index].reason is not None
        spans.sent = time.monotonic()
        metrics.finished(len(self.requests[index].prompt), spans, ended)
        if spans.tokens and not ended:
            metrics.left()


def completion_work(served: Served, body: CompletionBody, adapter: str, spans: Spans) -> Work:
    """Make work of a completion's body."""
    logprobs = -1 if body.logprobs is None else body.logprobs
    if body.echo and logprobs >= 0:
        raise Refused(400, "echo with logprobs is not served here: leave one out", "echo")
    requests: list[tuple[Request, str]] = []
    asked = 0
    for prompt in body.prompts():
        ids = _tokens(served, prompt) if isinstance(prompt, str) else prompt
        asked += len(ids)
        text = prompt if isinstance(prompt, str) else ""
        for choice in range(body.n):
            sampling = body.drawing(choice, logprobs)
            request = Request(tuple(ids), body.max_tokens or 16, sampling, body.stops(), _ends(served, body), adapter)
            requests.append((request, (text or served.tokenizer.decode(ids)) if body.echo else ""))
    return Work(served, requests, Writer(False, body.model, served.tokenizer, logprobs >= 0, asked), spans)


def chat_work(served: Served, body: ChatBody, adapter: str, spans: Spans) -> Work:
    """Make work of a chat's body."""
    ids, ends = chat_prompt(served.tokenizer, body.messages)
    # Without a limit the answer may fill the context.
    most = body.max_completion_tokens or body.max_tokens or max(1, served.backend.context - len(ids))
    logprobs = (body.top_logprobs or 0) if body.logprobs else -1
    requests = []
    for choice in range(body.n):
        sampling = body.drawing(choice, logprobs)
        requests.append((Request(tuple(ids), most, sampling, body.stops() + ends, _ends(served, body), adapter), ""))
    return Work(served, requests, Writer(True, body.model, served.tokenizer, logprobs >= 0, len(ids)), spans)


def _tokens(served: Served, text: str) -> list[int]:
    ids: list[int] = served.tokenizer(text, add_special_tokens=True)["input_ids"]
    if not ids and served.tokenizer.bos_token_id is not None:
        return [int(served.tokenizer.bos_token_id)]
    return ids


def _ends(served: Served, body: CompletionBody | ChatBody) -> frozenset[int]:
    return frozenset() if body.ignore_eos else served.ends


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + _json(content) + b"\n\n"


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()
