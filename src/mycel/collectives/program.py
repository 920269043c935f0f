"""The program that every rank of an island runs: the same batches, its own part of the model, one loss curve."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from mycel.collectives.apply import Stage, lay_out, named_weights, spread, whole
from mycel.collectives.hooks import CodecExchange, gather_frames
from mycel.collectives.keeping import mapped
from mycel.collectives.ranks import Ranks
from mycel.collectives.saving import Checkpoints, prime
from mycel.collectives.step import Trainer
from mycel.collectives.traffic import Traffic
from mycel.collectives.waiting import LIMITS
from mycel.data.stream import sample_rows
from mycel.data.table import TokenTable
from mycel.decisions.layout import check_layout
from mycel.models.base import Base
from mycel.models.optimizer import make_optimizer
from mycel.recipe.schema import Recipe
from mycel.wire.algebra import seed_of
from mycel.wire.parcel import Parcel, Tensors


@dataclass
class Course:
    """What an island's training came to.

    Attributes
    ----------
    losses : list of float
        Before each step, from the one that this run began with.
    seconds : list of float
        Wall seconds of each step on this rank.
    sent : int
        Bytes that this rank's collectives carried, by `mycel.collectives.traffic`.
    """

    first: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    sent: int = 0


@dataclass
class Program:
    """One rank's part in training a decoder over an island.

    Parameters
    ----------
    start : Tensors
        The whole model's weights to begin from, by name.
    rate : callable
        Learning rate of a step, from 0.
    """

    recipe: Recipe
    ranks: Ranks
    base: Base
    start: Tensors
    rate: Callable[[int], float]

    def __post_init__(self) -> None:
        recipe, config = self.recipe, self.base.model.config
        check_layout(recipe.layout, dist.get_world_size(), config, recipe.training.batch_size, recipe.data.max_length)
        model = type(self.base.model)(config)
        model.load_state_dict(self.start, strict=False)
        if config.tie_word_embeddings:
            model.tie_weights()
        layout = recipe.layout
        rows = recipe.training.batch_size // layout.data // layout.micro_batches
        self.stage: Stage = lay_out(model, self.ranks, (rows, recipe.data.max_length // layout.sequence))
        self.weights = named_weights(self.stage)
        self.optimizer = make_optimizer(self.weights, recipe.training)
        if layout.offload_optimizer:
            prime(self.weights, self.optimizer)
            mapped(self.optimizer)
        exchange = CodecExchange(self.ranks, recipe.layout.codec) if recipe.layout.codec else None
        self.trainer = Trainer(self.stage, self.ranks, self.optimizer, recipe.training.clip_norm, exchange)

    def train(
        self, table: TokenTable, steps: int, saves: Checkpoints | None, note: Callable[[int, float], None]
    ) -> Course:
        """Train from the latest checkpoint to ``steps``; ``note`` is told of each step on rank 0."""
        every = self.recipe.layout.checkpoint_every or steps
        first = saves.load(self.weights, self.optimizer) if saves else 0
        course, size = Course(first), self.recipe.training.batch_size
        seed = seed_of(self.recipe.seed, "stream", 0)
        for step in range(first, steps):
            rows = table.batch(sample_rows(len(table), step * size, size, seed).tolist(), 0).input_ids
            started = time.perf_counter()
            with Traffic() as traffic:
                course.losses.append(self.trainer.step(rows, self.rate(step)))
            course.seconds.append(time.perf_counter() - started)
            course.sent += traffic.bytes
            if self.ranks.first:
                note(step, course.losses[-1])
            if saves and ((step + 1) % every == 0 or step + 1 == steps):
                saves.save(step + 1, self.weights, self.optimizer)
        if saves:
            saves.finish()
        return course

    @torch.no_grad()
    def evaluate(self, table: TokenTable) -> float:
        """Mean loss over the rows of a table, in batches as large as a step's; what fills no batch is left out."""
        size = self.recipe.training.batch_size
        losses = [
            self.trainer.loss(table.batch(range(start, start + size), 0).input_ids)
            for start in range(0, len(table) - size + 1, size)
        ]
        return math.fsum(losses) / len(losses) if losses else math.nan

    def load(self, weights: Tensors, memory: Tensors) -> None:
        """Go on from whole weights and what an optimiser remembered of them (``moment/weight``), the same on each rank.

        What else ranks keep between steps is dropped, so that the same load is followed by the same steps.
        """
        self.optimizer = self.trainer.optimizer = make_optimizer(self.weights, self.recipe.training)
        if self.recipe.layout.codec:
            self.trainer.exchange = CodecExchange(self.ranks, self.recipe.layout.codec)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(spread(weights[name].to(self.ranks.device), weight))
        for key, value in memory.items():
            moment, _, name = key.partition("/")
            if name in self.weights:
                kept = spread(value.to(self.ranks.device), self.weights[name]) if value.dim() else value.clone()
                self.optimizer.state[self.weights[name]][moment] = kept
        if self.recipe.layout.offload_optimizer:
            mapped(self.optimizer)

    def collect(self) -> Tensors:
        """The whole model's weights, on every rank."""
        return self.gather(dict(self.weights))

    def remember(self) -> Tensors:
        """What the optimiser remembers of the whole model, as ``moment/weight``, on every rank."""
        own = {
            f"{moment}/{name}": value
            for name, weight in self.weights.items()
            for moment, value in self.optimizer.state[weight].items()
            if isinstance(value, torch.Tensor)
        }
        return self.gather(own)

    def gather(self, own: Mapping[str, torch.Tensor]) -> Tensors:
        """Put together what lies on this rank's stage and on the others', on every rank."""
        held: Tensors = {name: whole(tensor.detach()).cpu().clone() for name, tensor in own.items()}
        if self.ranks.layout.pipeline == 1:
            return held
        frames = gather_frames(Parcel("stage", {}, held).to_bytes(), self.ranks.group("pipeline"))
        # A tied weight lies in the first and the last stage; it is the same in both.
        return {name: tensor for frame in frames for name, tensor in Parcel.from_bytes(frame, LIMITS).tensors.items()}


def checkpoint_folder(run: Path) -> Path:
    """Where the checkpoints of an island's run lie."""
    return run / "work" / "island"
