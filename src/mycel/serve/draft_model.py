"""Speculative decoding with a draft model: a small model guesses, the large one verifies several tokens in one step.

Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding". The draft draws
``x_1 .. x_k`` from its own distribution ``q`` under the request's own temperature and cuts; the target computes all
``k + 1`` distributions ``p`` at once; the acceptance law of ``generation/speculation.py`` keeps ``p``. With acceptance
rate ``a`` a step yields ``(1 - a**(k+1)) / (1 - a)`` tokens. A draft equal to the target is always accepted; a draft
that guesses badly costs its own time and nothing of the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mycel.errors import ModelError
from mycel.generation.engine import Engine, Limits, greedy
from mycel.generation.executor import Executor, Piece, Whole
from mycel.generation.pages import PagePool
from mycel.generation.sampling import Sampler
from mycel.generation.speculation import Proposal
from mycel.rounds.laboratory import Laboratory, Measured


class DraftModel:
    """The drafter.

    Parameters
    ----------
    executor : Executor
        Of the small model; its vocabulary must be the target's.
    vocabulary : int
        The target's.
    positions : int
        Room of its own key-value store.
    """

    PAGE = 16

    def __init__(self, executor: Executor, vocabulary: int, positions: int = 1 << 15) -> None:
        if executor.vocabulary != vocabulary:
            raise ModelError(
                f"the draft has {executor.vocabulary} tokens and the target {vocabulary}: use one tokeniser"
            )
        self.executor = executor
        executor.reserve(positions // self.PAGE, self.PAGE)
        self.pool = PagePool(positions // self.PAGE, self.PAGE, share=False)
        self._tables: dict[int, list[int]] = {}
        self._known: dict[int, list[int]] = {}

    def propose(self, sequence: int, tokens: Sequence[int], most: int, sampler: Sampler) -> Proposal:
        """Draw up to ``most`` tokens from the small model."""
        known, table = self._known.setdefault(sequence, []), self._tables.setdefault(sequence, [])
        # What was guessed and refused is taken back: only the common beginning has valid keys and values.
        agreed = next((at for at, (a, b) in enumerate(zip(known, tokens, strict=False)) if a != b), len(known))
        agreed = min(agreed, len(tokens) - 1)
        most = min(most, self.executor.context - len(tokens))
        missing = self.pool.pages_for(len(tokens) + most) - len(table)
        if most < 1 or missing > self.pool.available:
            return Proposal(())
        table += self.pool.take(max(0, missing))
        new, guessed, rows = list(tokens[agreed:]), list[int](), list[torch.Tensor]()
        start = agreed
        for _ in range(most):
            logits = self.executor.run([Piece(sequence, tuple(new), start, tuple(table))])[0]
            start += len(new)
            rows.append(sampler.distribution(logits, guessed))
            guessed.append(sampler.draw(rows[-1]))
            new = guessed[-1:]
        self._known[sequence] = [*tokens, *guessed[:-1]]
        return Proposal(tuple(guessed), None if sampler.sampling.greedy else torch.stack(rows))

    def forget(self, sequence: int) -> None:
        """Give a sequence's pages back."""
        self.pool.release(self._tables.pop(sequence, []))
        self._known.pop(sequence, None)


def claim(lab: Laboratory) -> Measured:
    """The smallest base guesses for the next: fewer steps of the target, the same tokens."""
    target, draft = lab.open_base("tiny"), lab.open_base("micro")
    prompts = [target.tokenizer(text)["input_ids"] for text in ("def add(first, second):\n    ", "import os\nimport ")]
    executor, small = Whole(target.model), Whole(draft.model)
    same, plain_steps, steps, kept, guessed = True, 0, 0, 0, 0
    for prompt in prompts:
        plain = Engine(executor, limits=Limits())
        drafter = DraftModel(small, executor.vocabulary)
        guessing = Engine(executor, limits=Limits(), drafter=drafter)
        same &= greedy(plain, [prompt], 64) == greedy(guessing, [prompt], 64)
        plain_steps, steps = plain_steps + plain.counts.steps, steps + guessing.counts.steps
        kept, guessed = kept + guessing.counts.kept, guessed + guessing.counts.guessed
    share = steps / plain_steps
    return Measured(
        f"{share:.0%} of the target's steps, {kept / guessed:.0%} of guesses kept, "
        f"tokens {'identical' if same else 'different'}",
        same and share < 0.8,
        {"steps": share, "kept": kept / guessed},
    )
