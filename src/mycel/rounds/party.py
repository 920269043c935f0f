"""What a party has at home while it works: data, a personal state, a seed, and a model over the shared base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from mycel.data.tokens import Batch, TokenTable, batches
from mycel.recipe.schema import Recipe
from mycel.rounds.algebra import seed_of
from mycel.rounds.system import with_role
from mycel.rounds.training import Correction, TrainingResult, train
from mycel.wire.parcel import Parcel, Tensors

if TYPE_CHECKING:
    from mycel.models.base import Base
    from mycel.models.trainable import Trainable


@dataclass
class Party:
    """One node's view of itself during one piece of work.

    Attributes
    ----------
    node : int
        Index in the fleet; -1 stands for the coordinator when it looks at a state itself.
    version : int
        Version of the shared state that the brief carries.
    base : Base
        The frozen base, one copy per process.
    examples : TokenTable
        The private training examples.
    personal : Tensors
        What stays at home between rounds; it has no path into a parcel.
    bind : callable
        Returns the trainable of a given rank over the base.
    """

    node: int
    version: int
    recipe: Recipe
    base: Base
    examples: TokenTable
    bind: Callable[[int | None], Trainable]
    personal: Tensors = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Training examples held here."""
        return len(self.examples)

    @property
    def seed(self) -> int:
        """Seed of this party's work on this version; asking again gives the same answer."""
        return seed_of(self.recipe.seed, "party", self.node, self.version)

    @property
    def rank(self) -> int | None:
        """This party's LoRA rank, when the recipe gives one per party."""
        return rank_of(self.recipe, self.node)

    def trainable(self, rank: int | None = None) -> Trainable:
        """Return the trainable at this party's rank, or at ``rank``."""
        return self.bind(rank if rank is not None else self.rank)

    def batches(self, steps: int | None = None, stream: int = 0) -> Iterator[Batch]:
        """Yield training batches; ``stream`` tells apart several uses within one round."""
        training = self.recipe.training
        return batches(
            self.examples,
            training.batch_size,
            steps or self.recipe.rounds.local_steps,
            seed_of(self.seed, stream),
            self.pad_id,
            training.objective,
        )

    def train(
        self, trainable: Trainable, steps: int | None = None, correct: Correction | None = None
    ) -> TrainingResult:
        """Train ``trainable`` in place on this party's examples, with the recipe's optimiser."""
        with trainable.active():
            return train(
                self.base.model,
                trainable.parameters(),
                self.batches(steps),
                self.recipe.training,
                self.seed,
                correct,
            )

    @property
    def pad_id(self) -> int:
        """Token id that fills short rows of a batch."""
        return int(self.base.tokenizer.pad_token_id or 0)

    def answer(self, loss: float, update: Tensors, **others: dict[str, Tensor]) -> Parcel:
        """Build what leaves: ``update`` and other declared roles, the sample count, and the training loss."""
        tensors = with_role("update", update)
        for role, group in others.items():
            tensors |= with_role(role, group)
        return Parcel("answer", {"samples": self.samples, "loss": loss}, tensors)


def rank_of(recipe: Recipe, node: int) -> int | None:
    """Rank that a recipe gives to ``node``; the coordinator (-1) works at the largest; None without LoRA."""
    if recipe.trainable.kind != "lora":
        return None
    ranks = recipe.trainable.rank
    if isinstance(ranks, int):
        return ranks
    return max(ranks) if node < 0 else ranks[node % len(ranks)]
