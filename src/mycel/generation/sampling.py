"""From logits to a token: cuts, temperature, penalties, and one generator per request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from mycel.generation.request import Sampling


class Sampler:
    """Draws the tokens of one request; what it draws depends on the request alone.

    Parameters
    ----------
    sampling : Sampling
        How.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed % 2**63)
        self._penalised = sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
        self._seen: Counter[int] = Counter()

    @property
    def plain(self) -> bool:
        """Whether the token is the row's largest logit and nothing else is asked."""
        return self.sampling.greedy and not self._penalised and self.sampling.logprobs < 0

    def distribution(self, logits: Tensor, ahead: Sequence[int] = ()) -> Tensor:
        """Return the probabilities that the next token is drawn from, shape (vocabulary,).

        ``ahead`` are tokens assumed to be generated before this one, which were not yet noted.
        """
        chosen = self.sampling
        if self._penalised:
            logits = self._penalise(logits, ahead)
        if chosen.greedy:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        # From the largest down, so that no temperature, however small, leads beyond what numbers can say.
        logits = (logits - logits.max()).double() / chosen.temperature
        if 0 < chosen.top_k < logits.shape[-1]:
            least = logits.topk(chosen.top_k).values[-1]
            logits = logits.masked_fill(logits < least, float("-inf"))
        probabilities = torch.softmax(logits, -1)
        if chosen.top_p < 1.0:
            ordered, places = probabilities.sort(descending=True)
            before = ordered.cumsum(-1) - ordered
            ordered = ordered.masked_fill(before >= chosen.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter_(-1, places, ordered)
            probabilities /= probabilities.sum()
        return probabilities

    def draw(self, probabilities: Tensor) -> int:
        """Draw a token by one uniform number."""
        return pick(probabilities, self.uniform())

    def uniform(self) -> float:
        """Return the next number of the request's generator, in [0, 1)."""
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def note(self, token: int) -> None:
        """Take account of a token that was generated."""
        if self._penalised:
            self._seen[token] += 1

    def report(self, logits: Tensor, token: int) -> tuple[float | None, tuple[tuple[int, float], ...]]:
        """Return the token's log-probability and the likeliest alternatives, if they were asked for."""
        count = self.sampling.logprobs
        if count < 0:
            return None, ()
        scores = torch.log_softmax(logits.double(), -1)
        top = scores.topk(min(count, len(scores)))
        pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return float(scores[token]), pairs

    def _penalise(self, logits: Tensor, ahead: Sequence[int]) -> Tensor:
        seen = self._seen + Counter(ahead)
        if not seen:
            return logits
        counts = torch.tensor(list(seen.values()), dtype=logits.dtype)
        penalties = self.sampling.presence_penalty + counts * self.sampling.frequency_penalty
        return logits.index_add(0, torch.tensor(list(seen)), penalties, alpha=-1)


def pick(probabilities: Tensor, uniform: float) -> int:
    """Return the token whose share of the unit interval holds ``uniform``."""
    sums = probabilities.double().cumsum(-1)
    at = int(torch.searchsorted(sums, uniform * float(sums[-1]), right=True))
    last = int(probabilities.nonzero()[-1])  # rounding must not lead past the last token that can be drawn
    return min(at, last)
