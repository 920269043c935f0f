"""An island whose rank 0 is a node of the rounds: it is told and answers; all ranks train, and the others only follow.

A party's work is the same code with and without an island. Where it would train in one process it asks the leader,
which tells every rank the weights, the optimiser's memory, the rows and the rates, takes part itself, and returns what
came of it, whole. Between two pieces of work the ranks keep nothing that a result depends on, so an island that lost a
rank begins again from its brief and gives the same answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mycel.collectives.program import Program
from mycel.collectives.ranks import make_ranks
from mycel.collectives.waiting import LIMITS, group_of
from mycel.decisions.layout import layout_of
from mycel.errors import ModelError
from mycel.models.base import Base, find_base, open_base
from mycel.recipe.load import check
from mycel.recipe.schema import Recipe
from mycel.wire.algebra import group, with_role
from mycel.wire.parcel import Parcel, Tensors


@dataclass
class Crew:
    """One rank's part in whatever the leader asks for."""

    device: torch.device
    _programs: dict[str, Program] = field(default_factory=dict)
    _bases: dict[str, Base] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.line = group_of()  # on which ranks wait for their next work as long as it takes

    def spread(self, order: Parcel | None) -> Parcel:
        """Tell every rank the leader's order; the others pass None."""
        frame = order.to_bytes() if order is not None else b""
        length = torch.tensor([len(frame)])
        dist.broadcast(length, 0, group=self.line)
        content = torch.frombuffer(bytearray(frame), dtype=torch.uint8) if frame else None
        if content is None:
            content = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(content, 0, group=self.line)
        return order or Parcel.from_bytes(content.numpy().tobytes(), LIMITS)

    def carry_out(self, order: Parcel) -> tuple[Tensors, list[float]]:
        """Do what is asked and return what came of it, whole, and each step's loss."""
        program = self._program(str(order.header["recipe"]))
        tensors = order.tensors
        program.load(group(tensors, "weight"), group(tensors, "memory"))
        if order.kind == "train":
            rates: list[float] = order.header["rates"]
            losses = [program.trainer.step(rows, rate) for rows, rate in zip(tensors["rows"], rates, strict=True)]
            found = with_role("weight", program.collect()) | with_role("memory", program.remember())
            return found, losses
        return _gradients(program, tensors["rows"])

    def _program(self, recipe_json: str) -> Program:
        if recipe_json not in self._programs:
            recipe = check(json.loads(recipe_json), "the leader's recipe")
            name = recipe.model.base
            if name not in self._bases:
                self._bases[name] = open_base(find_base(name))
            ranks = make_ranks(recipe.layout, self.device)
            self._programs[recipe_json] = Program(recipe, ranks, self._bases[name], {}, lambda step: 0.0)
        return self._programs[recipe_json]


def _gradients(program: Program, rows_SBT: Tensor) -> tuple[Tensors, list[float]]:
    """Sum over the batches of each one's gradient times its target tokens, and each one's mean loss."""
    total: Tensors = {}
    losses = []
    for rows in rows_SBT:
        program.optimizer.zero_grad(set_to_none=True)
        losses.append(program.trainer.gradients(rows))
        for name, weight in program.weights.items():
            if weight.grad is not None:
                share = weight.grad.detach() * targets(rows)
                total[name] = total[name] + share if name in total else share
    program.optimizer.zero_grad(set_to_none=True)
    return with_role("gradient", program.gather(total)), losses


def targets(rows: Tensor) -> int:
    """Tokens that a batch of full rows (B, T) has to predict."""
    return rows.shape[0] * (rows.shape[1] - 1)


class Leader:
    """Rank 0's side: what a party's work asks of its island.

    Parameters
    ----------
    device : torch.device
        Where rank 0 computes; its process group has been joined.
    """

    def __init__(self, device: torch.device) -> None:
        self._crew = Crew(device)
        self.size = dist.get_world_size()

    def train(
        self, recipe: Recipe, weights: Tensors, memory: Tensors, rows: Sequence[Tensor], rates: Sequence[float]
    ) -> tuple[Tensors, Tensors, list[float]]:
        """Take one step on each batch (B, T) at its rate; return weights, the optimiser's memory and the losses."""
        tensors = with_role("weight", weights) | with_role("memory", memory)
        found, losses = self._ask("train", recipe, {"rates": list(rates)}, tensors, rows)
        return group(found, "weight"), group(found, "memory"), losses

    def gradient(self, recipe: Recipe, weights: Tensors, rows: Sequence[Tensor]) -> tuple[Tensors, int, float]:
        """Return the gradient summed over all target tokens of the batches, their number, and the mean loss."""
        found, losses = self._ask("gradient", recipe, {}, with_role("weight", weights), rows)
        tokens = [targets(each) for each in rows]
        loss = math.fsum(loss * count for loss, count in zip(losses, tokens, strict=True)) / max(sum(tokens), 1)
        return group(found, "gradient"), sum(tokens), loss

    def _ask(
        self, kind: str, recipe: Recipe, header: dict[str, Any], tensors: Tensors, rows: Sequence[Tensor]
    ) -> tuple[Tensors, list[float]]:
        told = recipe.model_copy(update={"layout": layout_of(recipe.layout, self.size)})
        header = {**header, "recipe": told.model_dump_json()}
        try:
            return self._crew.carry_out(
                self._crew.spread(Parcel(kind, header, {**tensors, "rows": torch.stack(list(rows))}))
            )
        except FloatingPointError as error:  # every rank has seen the same loss, so all of them wait again
            raise ModelError(str(error)) from error

    def dismiss(self) -> None:
        """Let the other ranks end."""
        self._crew.spread(Parcel("end", {}, {}))


def follow(crew: Crew) -> None:
    """Be any rank but the first: take part in whatever is asked until the leader lets go."""
    while True:
        try:
            order = crew.spread(None)
        except RuntimeError:  # the line is cut: the leader has gone
            return
        if order.kind == "end":
            return
        with suppress(FloatingPointError):
            crew.carry_out(order)
