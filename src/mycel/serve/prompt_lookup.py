"""Prompt look-up: guess that what followed the last few tokens before will follow them again.

Source: Saxena 2023, "Prompt Lookup Decoding"; the n-gram form of speculative decoding (Leviathan et al. 2023). The last
``n`` tokens are sought earlier in the sequence, longest ``n`` first, latest place first; the tokens that followed there
are the guess. Nothing is computed for it, so it costs nothing but wasted verification. Without a repeat it guesses
nothing and the engine decodes as without it.
"""

from __future__ import annotations

from collections.abc import Sequence

from mycel.generation.engine import Engine, Limits, greedy
from mycel.generation.executor import Whole
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


REPETITIVE = "self.first = first\nself.second = second\nself.third = third\nself.fourth = fourth\nself.fifth ="
VARIED = '"""Open the file and return its'


def claim(lab: Laboratory) -> Measured:
    """On text that repeats itself, fewer steps of the target for the same tokens; on other text, none is lost."""
    base = lab.open_base()
    prompts = [base.tokenizer(text)["input_ids"] for text in (REPETITIVE, VARIED)]
    executor = Whole(base.model)
    steps, same = {}, True
    for index, name in enumerate(("repetitive", "varied")):
        plain, guessing = Engine(executor, limits=Limits()), Engine(executor, limits=Limits(), drafter=PromptLookup())
        same &= greedy(plain, [prompts[index]], 96) == greedy(guessing, [prompts[index]], 96)
        steps[name] = guessing.counts.steps / plain.counts.steps
    return Measured(
        f"{steps['repetitive']:.0%} of the target's steps on repetitive text, {steps['varied']:.0%} on other text, "
        f"tokens {'identical' if same else 'different'}",
        same and steps["repetitive"] < 0.6 and steps["varied"] <= 1.0,
        {f"steps_{name}": share for name, share in steps.items()},
    )
