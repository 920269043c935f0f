"""What every pre-training system shares: a fresh start, a rate that rises and falls, and optimisers with a memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import nn

from mycel.data.stream import stream_batches
from mycel.data.tokens import Batch
from mycel.decisions.layout import ranks_of
from mycel.errors import RecipeError
from mycel.models.layers import weight_sites
from mycel.models.optimizer import make_optimizer
from mycel.recipe.schema import Training
from mycel.rounds.system import Knobs, State, System
from mycel.rounds.training import TrainingResult, batch_loss
from mycel.wire.algebra import group, seed_of, with_role
from mycel.wire.parcel import Parcel, Tensors

if TYPE_CHECKING:
    from mycel.models.base import Base
    from mycel.models.trainable import Trainable
    from mycel.recipe.schema import Recipe
    from mycel.rounds.party import Party
    from mycel.rounds.world import World


class PretrainKnobs(Knobs):
    """Settings that every pre-training system has."""

    fresh: bool = Field(True, description="begin from random weights of the base's shape, not from the base's own")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps over which the rate rises from zero")
    final_rate: float = Field(0.1, ge=0, le=1, description="share of the peak rate that is left at the end")
    horizon: int = Field(0, ge=0, description="steps over which the rate falls; 0: rounds x local steps")


class Pretraining(System):
    """A system whose shared state is every weight of the model."""

    Knobs: ClassVar[type[Knobs]] = PretrainKnobs
    inside = True

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        if recipe.trainable.kind != "full":
            raise RecipeError(
                f"trainable.kind is {recipe.trainable.kind!r}, and the system {recipe.system!r} pre-trains every "
                'weight: set trainable.kind = "full"'
            )
        if ranks_of(recipe.layout) > 1 and not recipe.data.pack:
            raise RecipeError("data.pack is false, and the ranks of an island need rows of one length: set it to true")

    def begin(self, world: World) -> State:
        """Start from random weights, the same for every system and island of a seed, or from the base's own."""
        if world.start is not None or not self.knobs.fresh:
            return State(shared=world.starting_state())
        return State(shared=fresh_weights(world.base, world.seed("fresh weights")))

    def brief(self, state: State, node: int) -> Parcel:
        """Tell the island every weight."""
        return Parcel("work", {}, with_role("shared", state.shared))

    def adopt(self, brief: Parcel, party: Party) -> Trainable:
        """Load every weight."""
        trainable = party.trainable()
        trainable.load(group(brief.tensors, "shared"))
        return trainable

    @property
    def horizon(self) -> int:
        """Steps over which the learning rate falls."""
        return int(self.knobs.horizon or self.recipe.rounds.count * self.recipe.rounds.local_steps)

    def rate(self, step: int) -> float:
        """Learning rate of an inner step, counted from 0."""
        peak = self.recipe.training.learning_rate
        return peak * schedule(step, self.horizon, self.knobs.warmup, self.knobs.final_rate)


def fresh_weights(base: Base, seed: int) -> Tensors:
    """Random weights of the base's architecture, by the names of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = type(base.model)(base.model.config)
    weights = {}
    for name, places in weight_sites(model).items():
        module, leaf = places[0]
        weights[name] = getattr(module, leaf).detach().clone()
    return weights


def schedule(step: int, horizon: int, warmup: float, final: float) -> float:
    """Share of the peak rate at ``step``: a line up from zero, then half a cosine down to ``final``."""
    rising = warmup * horizon
    if step < rising:
        return (step + 1) / (rising + 1)
    passed = min(1.0, (step - rising) / max(horizon - rising, 1))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * passed))


def island_batches(party: Party, first: int, steps: int) -> Iterator[Batch]:
    """The island's own stream, from its step ``first`` on: the same samples however the steps fall into rounds."""
    seed = seed_of(party.recipe.seed, "stream", party.node)
    return stream_batches(party.examples, party.recipe.training.batch_size, first, steps, seed, party.pad_id)


def train_on(
    party: Party,
    trainable: Trainable,
    batches: Iterator[Batch],
    rate: Callable[[int], float],
    memory: Tensors,
) -> tuple[TrainingResult, Tensors]:
    """Train in place, one optimiser step per batch, from the optimiser's ``memory``; return what it remembers then.

    ``rate`` gives the learning rate of the k-th step here, from 0.
    """
    if party.leader is not None:
        return _led(party, trainable, batches, rate, memory)
    training = party.recipe.training
    losses, tokens = [], 0
    with trainable.active():
        parameters = trainable.parameters()
        optimizer = make_optimizer(parameters, training)
        recall(optimizer, parameters, memory)
        for index, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = rate(index)
            optimizer.zero_grad(set_to_none=True)
            loss = batch_loss(party.base.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            if training.clip_norm:
                nn.utils.clip_grad_norm_(parameters.values(), training.clip_norm)
            optimizer.step()
            losses.append(float(loss.detach()))
            tokens += batch.tokens()
        remembered = memory_of(optimizer, parameters)
    return TrainingResult(sum(losses) / max(len(losses), 1), len(losses), tokens), remembered


def _led(
    party: Party, trainable: Trainable, batches: Iterator[Batch], rate: Callable[[int], float], memory: Tensors
) -> tuple[TrainingResult, Tensors]:
    """``train_on`` by all ranks of the party's island."""
    assert party.leader is not None
    rows = [batch.input_ids for batch in batches]
    rates = [rate(index) for index in range(len(rows))]
    weights, memory, losses = party.leader.train(party.recipe, trainable.state(), memory, rows, rates)
    trainable.load(weights)
    tokens = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in rows)
    return TrainingResult(math.fsum(losses) / max(len(losses), 1), len(losses), tokens), memory


def gradient_on(party: Party, trainable: Trainable, batches: Iterator[Batch]) -> tuple[Tensors, int, float]:
    """Sum over all target tokens of the loss's gradient, the number of tokens, and the mean loss."""
    if party.leader is not None:
        return party.leader.gradient(party.recipe, trainable.state(), [batch.input_ids for batch in batches])
    total, tokens, loss_sum = dict[str, torch.Tensor](), 0, 0.0
    with trainable.active():
        parameters = trainable.parameters()
        for batch in batches:
            count = batch.tokens()
            loss = batch_loss(party.base.model, batch)
            gradients = torch.autograd.grad(loss * count, list(parameters.values()))
            for name, gradient in zip(parameters, gradients, strict=True):
                total[name] = total[name] + gradient if name in total else gradient
            tokens, loss_sum = tokens + count, loss_sum + float(loss.detach()) * count
    return total, tokens, loss_sum / max(tokens, 1)


def advance(
    weights: Tensors, gradient: Tensors, memory: Tensors, training: Training, rate: float
) -> tuple[Tensors, Tensors]:
    """One step of the recipe's optimiser along a gradient; returns new weights and what the optimiser remembers."""
    parameters = {name: nn.Parameter(tensor.clone()) for name, tensor in weights.items()}
    for name, parameter in parameters.items():
        parameter.grad = gradient[name].clone()
    if training.clip_norm:
        nn.utils.clip_grad_norm_(parameters.values(), training.clip_norm)
    optimizer = make_optimizer(parameters, training.model_copy(update={"learning_rate": rate}))
    recall(optimizer, parameters, memory)
    optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}, memory_of(optimizer, parameters)


def memory_of(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Tensors:
    """What an optimiser remembers of each parameter, as ``moment/parameter``."""
    return {
        f"{moment}/{name}": value.detach().clone()
        for name, parameter in parameters.items()
        for moment, value in optimizer.state[parameter].items()
        if isinstance(value, torch.Tensor)
    }


def recall(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], memory: Tensors) -> None:
    """Give an optimiser back what ``memory_of`` took from one of the same kind."""
    for key, value in memory.items():
        moment, _, name = key.partition("/")
        optimizer.state[parameters[name]][moment] = value.clone()
