"""Speculation between edge and cloud: the edge drafts, the far model verifies; only guesses and verdicts travel.

Source: the edge-cloud form of speculative decoding (Leviathan et al. 2023; for small devices LLMCad, Xu et al. 2023).
The edge holds the small model and the text; each exchange carries the tokens so far and a few guesses up (with their
distributions when tokens are drawn), and the tokens that stand down. One round trip then yields several tokens, where
a plain remote stream pays one for each when the client must see a token before the next.

The far side keeps nothing of a conversation: what it computed before is found among its shared pages, or computed
again. So a client may vanish, a question may go to another replica, and many clients' questions share one batch. What
travels is a parcel, checked like anything from a wire. With ``most = 0`` guesses it is plain remote decoding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mycel.errors import ParcelError
from mycel.generation.engine import Engine, greedy
from mycel.generation.executor import Whole
from mycel.generation.request import Request, Sampling, Token
from mycel.generation.sampling import Sampler
from mycel.generation.speculation import Drafter, Proposal
from mycel.rounds.laboratory import Laboratory, Measured
from mycel.serve.draft_model import DraftModel
from mycel.wire.parcel import Limits, Parcel

MOST_GUESSES = 32
MOST_TOKENS = 1 << 20
LIMITS = Limits(frame_bytes=4 << 20, elements=2 << 20, tensors=8)
MOST_ROWS = 3 << 20  # bytes of distributions in one question; a door takes 4 MiB


def question(tokens: Sequence[int], proposal: Proposal, sampling: Sampling, model: str = "") -> bytes:
    """Write what the edge asks: does this guess stand behind these tokens, under this way of drawing?"""
    header = {
        "model": model,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": sampling.seed,
    }
    tensors = {"tokens": _ids(tokens), "guessed": _ids(proposal.tokens)}
    if proposal.probabilities is not None:
        tensors["rows"] = proposal.probabilities.double()
    return Parcel("guesses", header, tensors).to_bytes()


def read_question(frame: bytes, vocabulary: int) -> tuple[str, Request]:
    """Return the model that is asked, and the request that verifies the guess.

    Raises
    ------
    ParcelError
        When the frame is no sound question for a vocabulary of this size.
    GenerationError
        When tokens cannot be drawn as it says.
    """
    asked = Parcel.from_bytes(frame, LIMITS)
    tokens, guessed = (_checked(asked.tensors.get(name), name, vocabulary) for name in ("tokens", "guessed"))
    rows, header = asked.tensors.get("rows"), asked.header
    if not 0 < len(tokens) <= MOST_TOKENS or len(guessed) > MOST_GUESSES:
        raise ParcelError(
            f"{len(tokens)} tokens and {len(guessed)} guesses were sent: at least one token is needed, and at most"
            f" {MOST_GUESSES} guesses are verified at once"
        )
    if rows is not None and (rows.shape != (len(guessed), vocabulary) or not _distributions(rows)):
        raise ParcelError("the guesses' distributions have the wrong shape or do not sum to one")
    numbers = [header.get(name) for name in ("temperature", "top_p", "top_k", "seed")]
    kinds: tuple[type | tuple[type, ...], ...] = ((int, float), (int, float), int, (int, type(None)))
    model = header.get("model")
    if not isinstance(model, str) or not all(map(_is, numbers, kinds)):
        raise ParcelError("a question names a model, a temperature, top_p, top_k and a seed or none")
    temperature, top_p, top_k, seed = numbers
    sampling = Sampling(temperature, top_p, top_k, seed=seed)  # type: ignore[arg-type]
    guess = Proposal(guessed, None if rows is None or not guessed else rows)
    return model, Request(tokens, len(guessed) + 1, sampling, guess=guess)


def verdict(kept: Sequence[int]) -> bytes:
    """Write what the far side answers: the guesses that stand, and one token of its own."""
    return Parcel("verdict", {}, {"kept": _ids(kept)}).to_bytes()


def read_verdict(frame: bytes, guesses: int, vocabulary: int) -> list[int]:
    """Return the tokens that stand; ``ParcelError`` when that cannot be an answer to so many guesses."""
    kept = _checked(Parcel.from_bytes(frame, LIMITS).tensors.get("kept"), "kept", vocabulary)
    if not 1 <= len(kept) <= guesses + 1:
        raise ParcelError("a verdict must keep at least one token and at most one more than was guessed")
    return list(kept)


class Verifier:
    """The far side in one process, over an engine that is asked by nobody else meanwhile."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def answer(self, frame: bytes) -> bytes:
        """Take a question, return a verdict."""
        _, request = read_question(frame, self.engine.executor.vocabulary)
        kept: list[int] = []

        def listener(token: Token) -> None:
            if token.id >= 0:
                kept.append(token.id)

        self.engine.submit(request, listener)
        self.engine.run()
        return verdict(kept)


class EdgeDraft:
    """The near side.

    Parameters
    ----------
    drafter : Drafter
        The small model.
    ask : callable
        Carries a question to the far side and its verdict back.
    sampling : Sampling
        How tokens are drawn, here and there; the far side gets a seed of its own for each question.
    vocabulary : int
        Of both models.
    most : int
        Guesses in one exchange.
    model : str
        What the far side is asked for.
    """

    def __init__(
        self,
        drafter: Drafter,
        ask: Callable[[bytes], bytes],
        sampling: Sampling,
        vocabulary: int,
        most: int = 4,
        model: str = "",
    ) -> None:
        self.drafter, self.ask, self.sampling, self.vocabulary, self.model = drafter, ask, sampling, vocabulary, model
        fitting = MOST_GUESSES if sampling.greedy else MOST_ROWS // (8 * vocabulary)
        self.most = min(most, MOST_GUESSES, fitting)
        self.sampler = Sampler(sampling)
        self.exchanges = self.bytes = 0

    def tokens(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        """Yield ``count`` tokens that continue the prompt; leaving early is allowed."""
        known = list(prompt)
        try:
            while (room := len(prompt) + count - len(known)) > 0:
                most = min(self.most, room - 1)
                proposal = self.drafter.propose(0, known, most, self.sampler) if most else Proposal(())
                frame = question(known, proposal, self._sampling(len(known)), self.model)
                answer = self.ask(frame)
                self.exchanges, self.bytes = self.exchanges + 1, self.bytes + len(frame) + len(answer)
                kept = read_verdict(answer, len(proposal.tokens), self.vocabulary)
                known += kept
                yield from kept
        finally:
            self.drafter.forget(0)

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return ``count`` tokens that continue the prompt."""
        return list(self.tokens(prompt, count))

    def _sampling(self, place: int) -> Sampling:
        """Return the far side's way of drawing: its numbers must owe nothing to those that drew the guesses."""
        if self.sampling.seed is None:
            return self.sampling
        digest = hashlib.blake2b(f"{self.sampling.seed} {place}".encode(), digest_size=8).digest()
        return replace(self.sampling, seed=int.from_bytes(digest) >> 1)


def _ids(tokens: Sequence[int]) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.int64)


def _checked(tensor: Tensor | None, name: str, vocabulary: int) -> tuple[int, ...]:
    if tensor is None or tensor.dtype is not torch.int64 or tensor.ndim != 1:
        raise ParcelError(f"the tensor {name!r} is missing or no row of token ids")
    if len(tensor) and not 0 <= int(tensor.min()) <= int(tensor.max()) < vocabulary:
        raise ParcelError(f"{name!r} holds token ids outside 0 to {vocabulary - 1}")
    return tuple(tensor.tolist())


def _is(value: object, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _distributions(rows: Tensor) -> bool:
    if not rows.is_floating_point():
        return False
    sums = rows.sum(-1)
    sound = bool(torch.isfinite(rows).all()) and bool((rows >= 0).all())
    return sound and bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-4))


def claim(lab: Laboratory) -> Measured:
    """Fewer exchanges than tokens, and the far model's own greedy text."""
    target, draft = lab.open_base("tiny"), lab.open_base("micro")
    prompt = target.tokenizer("def add(first, second):\n    ")["input_ids"]
    executor = Whole(target.model)
    wanted = greedy(Engine(executor), [prompt], 64)[0]
    drafter, verifier = DraftModel(Whole(draft.model), executor.vocabulary), Verifier(Engine(executor))
    edge = EdgeDraft(drafter, verifier.answer, Sampling(), executor.vocabulary)
    same = edge.generate(prompt, 64) == wanted
    return Measured(
        f"{edge.exchanges} exchanges and {edge.bytes:,} bytes for 64 tokens, text "
        f"{'identical' if same else 'different'}; a plain remote stream needs 64 exchanges",
        same and edge.exchanges <= 48,
        {"exchanges": float(edge.exchanges), "bytes": float(edge.bytes)},
    )
