"""Speculation between edge and cloud: the edge drafts, the far model verifies; only guesses and verdicts travel.

Source: the edge-cloud form of speculative decoding (Leviathan et al. 2023; for small devices LLMCad, Xu et al. 2023).
The edge holds the small model and the text; each exchange carries a few guessed tokens up (with their distributions
when tokens are drawn, cut to the tokens that can be drawn) and the tokens that stand down. One round trip then yields
several tokens, where a plain remote stream pays one for each when the client must see a token before the next.

What travels is a parcel; a verdict is checked like anything from a wire. With ``most = 0`` guesses it is plain remote
decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mycel.errors import GenerationError, ParcelError
from mycel.generation.executor import Executor, Piece, Whole
from mycel.generation.pages import PagePool
from mycel.generation.request import Sampling
from mycel.generation.sampling import Sampler
from mycel.generation.speculation import Drafter, Proposal, verify
from mycel.rounds.laboratory import Laboratory, Measured
from mycel.wire.parcel import Parcel

MOST_GUESSES = 32
PAGE = 16


@dataclass
class Verifier:
    """The far side: keeps one conversation's keys and values, and says which guesses stand.

    Parameters
    ----------
    executor : Executor
        Of the large model.
    sampling : Sampling
        How tokens are drawn.
    positions : int
        Longest conversation.
    """

    executor: Executor
    sampling: Sampling
    positions: int = 1024
    steps: int = 0
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.executor.reserve(-(-self.positions // PAGE), PAGE)
        self._pool = PagePool(-(-self.positions // PAGE), PAGE, share=False)
        self._table: list[int] = []
        self._computed = 0
        self._sampler = Sampler(self.sampling)

    def answer(self, frame: bytes) -> bytes:
        """Take a parcel of new text and guesses, return a parcel of the tokens that stand."""
        asked = Parcel.from_bytes(frame)
        told, guessed, rows = self._checked(asked)
        self.tokens += told
        new = (*self.tokens[self._computed :], *guessed)
        if not self.tokens or self._computed + len(new) > self.positions:
            length = self._computed + len(new)
            raise GenerationError(f"the conversation would have {length} tokens: 1 to {self.positions} fit")
        self._table += self._pool.take(max(0, self._pool.pages_for(self._computed + len(new)) - len(self._table)))
        piece = Piece(0, new, self._computed, tuple(self._table), "", len(guessed) + 1)
        logits = self.executor.run([piece])
        self.steps += 1
        targets = [self._sampler.distribution(row, guessed[:index]) for index, row in enumerate(logits.unbind())]
        kept = verify(Proposal(guessed, rows), targets, self._sampler)
        self._computed += len(new) - len(guessed) + len(kept) - 1
        self.tokens += kept
        return Parcel("verdict", {}, {"kept": _ids(tuple(kept))}).to_bytes()

    def _checked(self, asked: Parcel) -> tuple[list[int], tuple[int, ...], Tensor | None]:
        told, guessed, rows = (asked.tensors.get(name) for name in ("told", "guessed", "rows"))
        vocabulary = self.executor.vocabulary
        for tensor in (told, guessed):
            if tensor is None or tensor.dtype is not torch.int64 or tensor.ndim != 1:
                raise ParcelError("a question for a verdict needs 'told' and 'guessed', each a row of token ids")
            if len(tensor) and not 0 <= int(tensor.min()) <= int(tensor.max()) < vocabulary:
                raise ParcelError(f"a question for a verdict holds token ids outside 0 to {vocabulary - 1}")
        assert told is not None and guessed is not None  # noqa: PT018
        if len(guessed) > MOST_GUESSES:
            raise ParcelError(f"{len(guessed)} guesses were sent: at most {MOST_GUESSES} are verified at once")
        if rows is not None and (rows.shape != (len(guessed), vocabulary) or not _distributions(rows)):
            raise ParcelError("the guesses' distributions have the wrong shape or do not sum to one")
        return told.tolist(), tuple(guessed.tolist()), rows


class EdgeDraft:
    """The near side.

    Parameters
    ----------
    drafter : Drafter
        The small model.
    ask : callable
        Carries a parcel to the verifier and its answer back.
    sampling : Sampling
        How tokens are drawn; the seed serves the drafts.
    most : int
        Guesses in one exchange.
    """

    def __init__(self, drafter: Drafter, ask: Callable[[bytes], bytes], sampling: Sampling, most: int = 4) -> None:
        self.drafter, self.ask, self.most = drafter, ask, most
        self.sampler = Sampler(sampling)
        self.exchanges = self.bytes = 0

    def generate(self, prompt: list[int], count: int) -> list[int]:
        """Return ``count`` tokens that continue the prompt."""
        tokens, told = list(prompt), list(prompt)
        while len(tokens) < len(prompt) + count:
            room = len(prompt) + count - len(tokens) - 1
            proposal = self.drafter.propose(0, tokens, min(self.most, room), self.sampler) if room else Proposal(())
            tensors = {"told": torch.tensor(told, dtype=torch.int64), "guessed": _ids(proposal.tokens)}
            if proposal.probabilities is not None:
                tensors["rows"] = proposal.probabilities.double()
            frame = Parcel("guesses", {}, tensors).to_bytes()
            answer = self.ask(frame)
            self.exchanges, self.bytes = self.exchanges + 1, self.bytes + len(frame) + len(answer)
            kept = Parcel.from_bytes(answer).tensors.get("kept")
            if kept is None or kept.ndim != 1 or not 1 <= len(kept) <= len(proposal.tokens) + 1:
                raise ParcelError("a verdict must keep at least one token and at most one more than was guessed")
            tokens += [int(token) for token in kept]
            told = []
        self.drafter.forget(0)
        return tokens[len(prompt) :]


def _ids(tokens: tuple[int, ...]) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int64)


def _distributions(rows: Tensor) -> bool:
    sums = rows.sum(-1)
    sound = bool(torch.isfinite(rows).all()) and bool((rows >= 0).all())
    return sound and bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-4))


def claim(lab: Laboratory) -> Measured:
    """Fewer exchanges than tokens, and the far model's own greedy text."""
    from mycel.generation.engine import Engine, greedy
    from mycel.serve.draft_model import DraftModel

    target, draft = lab.open_base("tiny"), lab.open_base("micro")
    prompt = target.tokenizer("def add(first, second):\n    ")["input_ids"]
    executor = Whole(target.model)
    wanted = greedy(Engine(executor), [prompt], 64)[0]
    drafter, verifier = DraftModel(Whole(draft.model), executor.vocabulary), Verifier(executor, Sampling())
    edge = EdgeDraft(drafter, verifier.answer, Sampling())
    same = edge.generate(prompt, 64) == wanted
    return Measured(
        f"{edge.exchanges} exchanges and {edge.bytes:,} bytes for 64 tokens, text "
        f"{'identical' if same else 'different'}; a plain remote stream needs 64 exchanges",
        same and edge.exchanges <= 48,
        {"exchanges": float(edge.exchanges), "bytes": float(edge.bytes)},
    )
