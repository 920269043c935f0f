"""What the coordinator can see: the recipe, the fleet, the nodes' announcements, and its own copy of the base."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from mycel.decisions.layout import check_layout, ranks_of
from mycel.errors import RecipeError
from mycel.fleet.cost import forward_flops, training_flops
from mycel.fleet.device import Device, Fleet
from mycel.models.base import Base
from mycel.models.trainable import Trainable
from mycel.recipe.schema import Recipe
from mycel.rounds.party import Party, initial_state, rank_of
from mycel.rounds.site import Site
from mycel.wire.algebra import seed_of
from mycel.wire.parcel import Tensors


@dataclass(frozen=True)
class Node:
    """What a party says of itself before a run: no example, only counts.

    Attributes
    ----------
    samples : int
        Training examples.
    mean_tokens : float
        Tokens per training example.
    held_out_tokens : int
        Tokens of its held-out examples.
    """

    index: int
    name: str
    samples: int
    mean_tokens: float
    held_out_tokens: int
    rank: int | None = None


@dataclass
class World:
    """The coordinator's side of a run; ``start`` is a state to begin from instead of the trainable's initial one."""

    recipe: Recipe
    fleet: Fleet
    nodes: list[Node]
    site: Site
    start: Tensors | None = None
    sizes: dict[int | None, int] = field(default_factory=dict)

    @property
    def base(self) -> Base:
        """The coordinator's own copy of the base."""
        return self.site.base

    def prepare(self) -> None:
        """Bind the trainable of every rank now: binding changes the model, which arms on other threads share."""
        self._check_objective()
        recipe = self.recipe
        if ranks_of(recipe.layout) > 1:
            config, rows = self.base.model.config, recipe.training.batch_size
            check_layout(recipe.layout, ranks_of(recipe.layout), config, rows, recipe.data.max_length)
        self.sizes = {rank: self.trainable(rank).size() for rank in {node.rank for node in self.nodes}}
        self.trainable()

    def _check_objective(self) -> None:
        closed, objective = bool(self.base.model.config.is_encoder_decoder), self.recipe.training.objective
        if closed != (objective == "seq2seq"):
            kind = "an encoder-decoder" if closed else "a decoder alone"
            raise RecipeError(
                f"training.objective is {objective!r}, and the base {self.recipe.model.base!r} is {kind}: "
                f"set it to {'seq2seq' if closed else 'causal'!r}"
            )

    def trainable(self, rank: int | None = None) -> Trainable:
        """Return the coordinator's trainable, at the largest rank unless ``rank`` says otherwise."""
        return self.site.bind(rank if rank is not None else rank_of(self.recipe, -1))

    def starting_state(self) -> Tensors:
        """Return where training begins: a given state, or the trainable's initial one."""
        return self.start or initial_state(self.recipe, self.trainable())

    def observer(self, node: int = -1, version: int = 0) -> Party:
        """Return a party without examples, through which the coordinator can adopt a brief itself."""
        party = self.site.party(-1, version)
        party.node = node
        return party

    def seed(self, *parts: int | str) -> int:
        """Seed of the coordinator for a named purpose."""
        return seed_of(self.recipe.seed, "coordinator", *parts)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the base."""
        return sum(parameter.numel() for parameter in self.base.model.parameters())

    def device(self, node: int) -> Device:
        """The device that a node runs on."""
        return self.fleet[node]

    def compute_seconds(self, node: int, steps: int, evaluates: int) -> float:
        """Predicted seconds of one request: ``steps`` local steps, and ``evaluates`` held-out passes."""
        training, about = self.recipe.training, self.nodes[node]
        flops = forward_flops(self.parameters, about.held_out_tokens) * evaluates
        if steps:
            tokens = steps * training.batch_size * about.mean_tokens
            flops += training_flops(self.parameters, self.sizes[about.rank], tokens, training.gradient)
        return self.device(node).compute_seconds(flops)
