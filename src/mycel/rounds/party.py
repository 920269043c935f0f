"""What a party has at home while it works: data, a personal state, a seed, and a model over the shared base."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mycel.data.tokens import Batch, TokenTable, batches
from mycel.guard.example import Privacy, train_private
from mycel.models.optimizer import make_optimizer
from mycel.recipe.schema import Recipe
from mycel.rounds.sealing import noise_of
from mycel.rounds.training import Correction, TrainingResult, train
from mycel.wire.algebra import seed_of, with_role
from mycel.wire.parcel import Parcel, Tensors

if TYPE_CHECKING:
    from mycel.collectives.leading import Leader
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
    leader : Leader, optional
        Of the island that trains this party's whole models; without one this process does.
    """

    node: int
    version: int
    recipe: Recipe
    base: Base
    examples: TokenTable
    bind: Callable[[int | None], Trainable]
    personal: Tensors = field(default_factory=dict)
    leader: Leader | None = None

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
        self,
        trainable: Trainable,
        steps: int | None = None,
        correct: Correction | None = None,
        only: Collection[str] | None = None,
        after: Correction | None = None,
    ) -> TrainingResult:
        """Train ``trainable`` in place on this party's examples, with the recipe's optimiser.

        ``only`` names the parameters that move; the others need no gradient and no optimiser state.
        """
        with trainable.active(), free(trainable.parameters(), only) as parameters:
            if self.recipe.guard.private == "example":
                return self._train_private(parameters, steps, correct, after)
            return train(
                self.base.model,
                parameters,
                self.batches(steps),
                self.recipe.training,
                self.seed,
                correct,
                after,
            )

    def _train_private(
        self,
        parameters: Mapping[str, nn.Parameter],
        steps: int | None,
        correct: Correction | None,
        after: Correction | None,
    ) -> TrainingResult:
        """Train so that no single example can be told from what leaves."""
        training, guard = self.recipe.training, self.recipe.guard
        steps = steps or self.recipe.rounds.local_steps
        noise = noise_of(self.recipe, min(1.0, training.batch_size / self.samples), self.recipe.rounds.local_steps)
        privacy = Privacy(guard.clip_norm, noise, self.seed if guard.replayable else None)
        optimizer = make_optimizer(parameters, training)
        loss, tokens = train_private(
            self.base.model,
            parameters,
            optimizer,
            self.examples,
            training.batch_size,
            steps,
            self.pad_id,
            privacy,
            correct,
            after,
        )
        return TrainingResult(loss, steps, tokens)

    def initial(self, trainable: Trainable) -> Tensors:
        """Return where training begins, which every node makes for itself from the recipe."""
        return initial_state(self.recipe, trainable)

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


def initial_state(recipe: Recipe, trainable: Trainable) -> Tensors:
    """Return the state that training begins from: the same at the coordinator and at every party."""
    return trainable.initial(seed_of(recipe.seed, "coordinator", "initial"))


@contextmanager
def free(parameters: Mapping[str, nn.Parameter], only: Collection[str] | None) -> Iterator[Mapping[str, nn.Parameter]]:
    """Hold every parameter still that ``only`` does not name, and yield the others; None names all."""
    held = [parameter for name, parameter in parameters.items() if only is not None and name not in only]
    for parameter in held:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield {name: parameter for name, parameter in parameters.items() if only is None or name in only}
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


def rank_of(recipe: Recipe, node: int) -> int | None:
    """Rank that a recipe gives to ``node``; the coordinator (-1) works at the largest; None without LoRA."""
    if recipe.trainable.kind != "lora":
        return None
    ranks = recipe.trainable.rank
    if isinstance(ranks, int):
        return ranks
    return max(ranks) if node < 0 else ranks[node % len(ranks)]
