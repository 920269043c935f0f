"""A decoder as a chain of operators with costs, which every planner reads.

Per token of a row of T tokens, for hidden width h, feed-forward width f, V entries of the vocabulary, k the width of
all keys (h where heads do not share them):

    block    weights  2 h^2 + 2 h k + 3 h f + 2 h          forward  2 x weights + 4 T h, masked or not
    head     weights  V h (shared with the embedding where tied)                        forward  2 V h

The way back takes twice the forward operations; recomputation once more the blocks' forward. Source: Kaplan et al.
2020, section 2.1; Korthikanti et al. 2022 for what is kept: here 4 bytes of ``KEPT`` numbers a hidden unit and token,
the attention's T numbers a head, and three times the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

KEPT = 12.0  # numbers of a block's width that are kept per token besides the feed-forward's, see docs/planning.md
FEED = 4.0  # the same, of the feed-forward's width


@dataclass(frozen=True)
class Operator:
    """One piece of the chain.

    Attributes
    ----------
    kind : str
        "embedding", "block" or "head".
    weights : int
        Parameters that it owns.
    flops : float
        Of the forward pass, per token.
    kept : float
        Numbers kept per token for the way back.
    leaves : float
        Numbers per token that go on to the next operator.
    """

    kind: str
    weights: int
    flops: float
    kept: float
    leaves: float


@dataclass(frozen=True)
class Graph:
    """A decoder's chain for rows of one length, and what its layouts must divide."""

    operators: tuple[Operator, ...]
    hidden: int
    vocabulary: int
    tied: bool
    length: int

    @property
    def blocks(self) -> tuple[Operator, ...]:
        """The blocks alone, between the embedding and the head."""
        return self.operators[1:-1]

    @property
    def weights(self) -> int:
        """Parameters of the model; a tied head owns none."""
        return sum(operator.weights for operator in self.operators)

    def flops(self, tokens: float, recompute: bool = False) -> float:
        """Operations to train on so many tokens."""
        inner = sum(block.flops for block in self.blocks)
        return tokens * (3 * (inner + self.operators[-1].flops) + (inner if recompute else 0.0))


def graph_of(config: Any, length: int) -> Graph:
    """Return the chain of a decoder of the Llama family, from its ``transformers`` configuration."""
    h, f, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    heads = config.num_attention_heads
    keys = h * getattr(config, "num_key_value_heads", heads) // heads
    weights = 2 * h * h + 2 * h * keys + 3 * h * f + 2 * h
    block = Operator("block", weights, 2.0 * weights + 4.0 * length * h, KEPT * h + FEED * f, float(h))
    tied = bool(config.tie_word_embeddings)
    head = Operator("head", h + (0 if tied else vocabulary * h), 2.0 * vocabulary * h, 3.0 * vocabulary, 0.0)
    embedding = Operator("embedding", vocabulary * h, 0.0, float(h), float(h))
    return Graph((embedding, *[block] * config.num_hidden_layers, head), h, vocabulary, tied, length)
