"""The program that every rank of an island runs: the same batches, its own part of the model, one loss curve."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from mycel.collectives.apply import Stage, lay_out, named_weights, whole
from mycel.collectives.hooks import CodecExchange
from mycel.collectives.layout import check_layout
from mycel.collectives.ranks import Ranks
from mycel.collectives.saving import Checkpoints
from mycel.collectives.step import Trainer
from mycel.collectives.traffic import Traffic
from mycel.data.stream import sample_rows
from mycel.data.table import TokenTable
from mycel.models.base import Base
from mycel.recipe.schema import Recipe
from mycel.rounds.algebra import seed_of
from mycel.rounds.training import make_optimizer
from mycel.wire.parcel import Tensors


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
        self.stage: Stage = lay_out(model, self.ranks)
        self.weights = named_weights(self.stage)
        self.optimizer = make_optimizer(self.weights, recipe.training)
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

    def collect(self) -> Tensors:
        """The whole model's weights, on every rank."""
        own = {name: whole(weight.detach()).cpu().clone() for name, weight in self.weights.items()}
        if self.ranks.layout.pipeline == 1:
            return own
        stages: list[Tensors | None] = [None] * self.ranks.layout.pipeline
        shapes = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()]
        named: list[list[tuple[str, tuple[int, ...], torch.dtype]] | None] = [None] * len(stages)
        group = self.ranks.group("pipeline")
        dist.all_gather_object(named, shapes, group=group)
        collected: Tensors = {}
        for stage, parts in enumerate(named):
            source = dist.get_global_rank(group, stage)
            for name, shape, dtype in parts or []:
                tensor = own[name] if stage == self.ranks.place("pipeline") else torch.empty(shape, dtype=dtype)
                dist.broadcast(tensor, source, group=group)
                collected[name] = tensor
        return collected


def checkpoint_folder(run: Path) -> Path:
    """Where the checkpoints of an island's run lie."""
    return run / "work" / "island"
