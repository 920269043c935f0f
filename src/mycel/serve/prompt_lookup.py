"""Prompt look-up: guess that what followed the last few tokens before will follow them again.

Source: Saxena 2023, "Prompt Lookup Decoding"; the n-gram form of speculative decoding (Leviathan et al. 2023). The last
``n`` tokens are sought earlier in the sequence, longest ``n`` first, latest place first; the tokens that followed there
are the guess. Nothing is computed for it, so it costs nothing but wasted verification. Without a repeat it guesses
nothing and the engine decodes as without it.

It is meant for answers that are grounded in their input: edits, quotes, summaries. What it saves there depends on how
much of its prompt the *answer* repeats, so the claim is measured on an edit of code whose answer is given: the engine,
the guessing and the verification are real, the target is a script. What the base makes of prompts of its own is
measured beside it; a small base does not edit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mycel.generation.engine import Engine, Limits, greedy
from mycel.generation.executor import Piece, Whole
from mycel.generation.memory import Memory
from mycel.generation.sampling import Sampler
from mycel.generation.speculation import Proposal
from mycel.rounds.laboratory import Laboratory, Measured


class PromptLookup:
    """The drafter.

    Parameters
    ----------
    longest, shortest : int
        Tokens that must repeat, from most to fewest.
    """

    def __init__(self, longest: int = 3, shortest: int = 1) -> None:
        self.longest, self.shortest = longest, shortest

    def propose(self, sequence: int, tokens: Sequence[int], most: int, sampler: Sampler) -> Proposal:
        """Return what followed the same tokens before."""
        known = list(tokens)
        for size in range(min(self.longest, len(known) - 1), self.shortest - 1, -1):
            last = known[-size:]
            for start in range(len(known) - size - 1, -1, -1):
                if known[start : start + size] == last:
                    return Proposal(tuple(known[start + size : start + size + most]))
        return Proposal(())

    def forget(self, sequence: int) -> None:
        """Nothing is kept."""


class Given:
    """An executor whose target answers with a given text, whatever it costs to find that out.

    Parameters
    ----------
    script : sequence of int
        The prompt and its answer.
    vocabulary : int
        Rows of logits.
    """

    memory: Memory | None = None
    position_bytes = 0

    def __init__(self, script: Sequence[int], vocabulary: int) -> None:
        self.script, self.vocabulary, self.context = script, vocabulary, len(script) + 8

    def reserve(self, pages: int, size: int) -> None:
        """Keep nothing."""

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Favour the script's next token at every wanted place."""
        ends = [piece.start + len(piece.tokens) for piece in pieces]
        places = [at for piece, end in zip(pieces, ends, strict=True) for at in range(end - piece.wanted, end)]
        logits = torch.zeros(len(places), self.vocabulary)
        for row, at in enumerate(places):
            logits[row, self.script[min(at + 1, len(self.script) - 1)]] = 1.0
        return logits

    def forget(self, sequence: int) -> None:
        """Keep nothing."""

    def close(self) -> None:
        """Keep nothing."""


REPETITIVE = "self.first = first\nself.second = second\nself.third = third\nself.fourth = fourth\nself.fifth ="
VARIED = '"""Open the file and return its'
CODE = """class Ledger:
    def __init__(self, owner, limit):
        self.owner = owner
        self.limit = limit
        self.entries = []

    def add(self, amount, note):
        if amount > self.limit:
            raise ValueError("the amount is above the limit")
        self.entries.append((amount, note))
        return len(self.entries)

    def total(self):
        result = 0
        for amount, note in self.entries:
            result += amount
        return result
"""
EDITS = (("entries", "records"), ("above the limit", "too large"), ("result += amount", "result = result + amount"))
TASK = "\nRename entries to records, and say that the amount is too large:\n"


def edit_share(encode: Callable[[str], list[int]], vocabulary: int) -> tuple[float, bool]:
    """Return the share of the target's steps that an edit of code takes, and whether its text is the right one."""
    edited = CODE
    for before, after in EDITS:
        edited = edited.replace(before, after)
    prompt, answer = encode(CODE + TASK), encode(edited)
    executor = Given([*prompt, *answer], vocabulary)
    guessing = Engine(executor, limits=Limits(), drafter=PromptLookup())
    found = greedy(guessing, [prompt], len(answer))
    return guessing.counts.steps / len(answer), found == [answer]


def claim(lab: Laboratory) -> Measured:
    """On an edit of its prompt, at most half the steps of the target; on other text, none is lost."""
    base = lab.open_base()

    def encode(text: str) -> list[int]:
        return list(base.tokenizer(text)["input_ids"])

    executor = Whole(base.model)
    steps, same = {}, True
    steps["edit"], same = edit_share(encode, executor.vocabulary)
    for name, text in (("repetitive", REPETITIVE), ("varied", VARIED)):
        plain, guessing = Engine(executor, limits=Limits()), Engine(executor, limits=Limits(), drafter=PromptLookup())
        prompts = [encode(text)]
        same &= greedy(plain, prompts, 96) == greedy(guessing, prompts, 96)
        steps[name] = guessing.counts.steps / plain.counts.steps
    return Measured(
        f"{steps['edit']:.0%} of the target's steps on an edit of its prompt, whose answer is given; of the base's own "
        f"steps {steps['repetitive']:.0%} on repetitive text and {steps['varied']:.0%} on other text, tokens "
        f"{'identical' if same else 'different'}",
        same and steps["edit"] <= 0.5 and max(steps.values()) <= 1.0,
        {f"steps_{name}": share for name, share in steps.items()},
    )
