"""One training step of an island: forward and back through every stage, one gradient for all replicas, one update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from mycel.collectives.apply import Stage, gradient_norm, named_weights, settle, whole
from mycel.collectives.bubbles import TimedStage, Trace
from mycel.collectives.hooks import CodecExchange
from mycel.collectives.ranks import Ranks
from mycel.decisions.layout import rank_of
from mycel.errors import ModelError

IGNORED = -100
ALONE: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}  # one stage a rank
LOOPED: dict[str, Any] = {
    "interleaved": ScheduleInterleaved1F1B,
    "breadth_first": ScheduleLoopedBFS,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


def targets_of(rows: Tensor) -> Tensor:
    """What each token is to predict: the next one; nothing at a row's end."""
    return torch.cat([rows[:, 1:], torch.full_like(rows[:, :1], IGNORED)], dim=1)


def own_part(rows: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """This rank's rows and tokens of a step's batch (B, T), and their targets."""
    targets = targets_of(rows)
    rows, targets = (part.chunk(ranks.layout.data)[ranks.place("data")] for part in (rows, targets))
    sequence = ranks.layout.sequence
    rows, targets = (part.chunk(sequence, dim=1)[ranks.place("sequence")] for part in (rows, targets))
    return rows.contiguous().to(ranks.device), targets.contiguous().to(ranks.device)


@dataclass
class Trainer:
    """Takes steps on one rank's stage; every rank calls the same methods in the same order."""

    stage: Stage
    ranks: Ranks
    optimizer: torch.optim.Optimizer
    clip_norm: float = 1.0
    exchange: CodecExchange | None = None
    trace: Trace = field(default_factory=Trace)
    _schedules: dict[tuple[int, ...], Any] = field(default_factory=dict)

    def gradients(self, rows: Tensor) -> float:
        """Fill every parameter's gradient with that of the mean loss over the whole batch; return that loss.

        Parameters
        ----------
        rows : Tensor
            int64, (B, T): the step's whole batch, the same on every rank.
        """
        ids, targets = own_part(rows, self.ranks)
        count = rows.shape[0] * (rows.shape[1] - 1)
        # Replicas average their gradients, so each one's share of the sum is weighed by their number.
        replicas = self.ranks.layout.data * self.ranks.layout.sequence

        def loss_of(logits: Tensor, wanted: Tensor) -> Tensor:
            flat = logits.reshape(-1, logits.shape[-1])
            flat = flat.float() if flat.dtype in {torch.bfloat16, torch.float16} else flat
            total = nn.functional.cross_entropy(flat, wanted.reshape(-1), ignore_index=IGNORED, reduction="sum")
            return total * (replicas / count)

        losses = (
            self._pipelined(ids, targets, loss_of)
            if self.ranks.layout.pipeline > 1
            else self._plain(ids, targets, loss_of)
        )
        _complete(self.stage)
        if self.exchange is not None:
            self.exchange.average(named_weights(self.stage))
        settle(self.stage, self.ranks)
        total = losses.detach().double()
        self._sum(total)
        return float(total) / replicas

    def loss(self, rows: Tensor) -> float:
        """Mean loss over a batch; nothing is trained. A pipeline's stages pass it on one after another."""
        ids, targets = own_part(rows, self.ranks)
        count = rows.shape[0] * (rows.shape[1] - 1)
        self.stage.eval()
        hidden = self._handed_on(ids)
        total = torch.zeros((), device=self.ranks.device, dtype=torch.float64)
        if self.stage.last:
            flat = hidden.reshape(-1, hidden.shape[-1]).float()
            total += nn.functional.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORED, reduction="sum")
        self.stage.train()
        self._sum(total)
        return float(total) / count

    def _sum(self, total: Tensor) -> None:
        """Add up a number over the replicas and the stages, where there is more than one."""
        layout = self.ranks.layout
        if layout.data * layout.sequence > 1:
            dist.all_reduce(total, group=self.ranks.replicas.get_group())
        if layout.pipeline > 1:
            dist.all_reduce(total, group=self.ranks.group("pipeline"))

    def _handed_on(self, ids: Tensor) -> Tensor:
        group, place = self.ranks.group("pipeline"), self.ranks.place("pipeline")
        layout, hidden = self.ranks.layout, ids
        dtype = next(self.stage.parameters()).dtype
        for chunk in self.stage.held():
            before = place if chunk.first else rank_of(layout, chunk.place - 1)
            if before != place:
                hidden = torch.empty(*ids.shape, self.stage.width, device=self.ranks.device, dtype=dtype)
                dist.recv(hidden, group=group, group_src=before)
            hidden = chunk(hidden)
            after = place if chunk.last else rank_of(layout, chunk.place + 1)
            if after != place:
                dist.send(hidden.contiguous(), group=group, group_dst=after)
        return hidden

    def step(self, rows: Tensor, rate: float) -> float:
        """Take one optimiser step at a learning rate and return the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.gradients(rows)
        check_loss(loss)
        norm = gradient_norm(self.stage, self.ranks) if self.clip_norm else 0.0
        if self.clip_norm and norm > self.clip_norm:
            for parameter in self.stage.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.clip_norm / (norm + 1e-6))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return loss

    def _plain(self, ids: Tensor, targets: Tensor, loss_of: Any) -> Tensor:
        pieces = self.ranks.layout.micro_batches
        total = torch.zeros((), device=self.ranks.device, dtype=torch.float64)
        [chunk] = self.stage.held()
        for index, (part, wanted) in enumerate(zip(ids.chunk(pieces), targets.chunk(pieces), strict=True)):
            if isinstance(chunk, FSDPModule):
                chunk.set_requires_gradient_sync(index == pieces - 1)
            loss = loss_of(chunk(part), wanted)
            loss.backward()
            total += loss.detach()
        return total

    def _pipelined(self, ids: Tensor, targets: Tensor, loss_of: Any) -> Tensor:
        layout = self.ranks.layout
        key = tuple(ids.shape)
        if key not in self._schedules:
            stages, group = layout.pipeline * layout.chunks, self.ranks.group("pipeline")
            held = [
                TimedStage(chunk, chunk.place, stages, self.ranks.device, group, self.trace)
                for chunk in self.stage.held()
            ]
            kind, parts = (
                (ALONE[layout.schedule], held[0]) if layout.schedule in ALONE else (LOOPED[layout.schedule], held)
            )
            self._schedules[key] = kind(parts, layout.micro_batches, loss_fn=loss_of, scale_grads=False)
        schedule, losses = self._schedules[key], list[Tensor]()
        schedule._loss_fn = loss_of
        last = {"target": targets, "losses": losses} if self.stage.last else {}
        schedule.step(*([ids] if self.stage.first else []), return_outputs=False, **last)
        return torch.stack([loss.detach() for loss in losses]).sum() if losses else torch.zeros((), device=ids.device)


def check_loss(loss: float) -> None:
    """Refuse to step along a loss that is infinite or no number; every rank sees the same one."""
    if not math.isfinite(loss):
        raise FloatingPointError("the loss is not a finite number: lower training.learning_rate")


def _complete(stage: Stage) -> None:
    """Every weight of a decoder has a gradient after a step's way back, or a schedule has passed it by."""
    missed = [name for name, weight in named_weights(stage).items() if weight.grad is None]
    if missed:
        raise ModelError(
            f"{len(missed)} weights of this rank have no gradient, {missed[0]!r} first: try another layout"
        )


def full_gradients(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    """Every gradient of this rank's stage as all ranks together hold it; all of them must ask."""
    for name, parameter in named_weights(trainer.stage).items():
        assert parameter.grad is not None
        yield name, whole(parameter.grad).detach().cpu()
