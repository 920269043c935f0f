"""The contract of a system that works in rounds: five functions, plus what a party becomes when it is told.

Federated averaging (`mycel.finetune.fedavg`) is the plain system that the others vary; a file overrides only what
its paper changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from mycel.decisions.layout import ranks_of
from mycel.errors import RecipeError
from mycel.recipe.load import explain
from mycel.recipe.schema import Recipe
from mycel.wire.algebra import group, with_role
from mycel.wire.parcel import Parcel, Tensors
from mycel.wire.waiting import Loadable

if TYPE_CHECKING:
    from mycel.models.trainable import Trainable
    from mycel.rounds.party import Party
    from mycel.rounds.world import World


class Knobs(BaseModel):
    """A system's own settings; a subclass adds fields with units in their descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class State:
    """What the coordinator knows between rounds.

    Attributes
    ----------
    shared : Tensors
        The trained state that all parties share.
    parties : dict of int to Tensors
        A state of its own for each party that has one.
    base : Tensors
        A change to the base's weights, by weight name.
    server : Tensors
        What only the coordinator keeps (moments, control variates).
    facts : dict
        Small JSON values.
    """

    shared: Tensors = field(default_factory=dict)
    parties: dict[int, Tensors] = field(default_factory=dict)
    base: Tensors = field(default_factory=dict)
    server: Tensors = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> State:
        """Return a copy with the named fields replaced."""
        return replace(self, **changes)

    def to_parcel(self) -> Parcel:
        """Lay the state out as one parcel, roles before names."""
        tensors = with_role("shared", self.shared) | with_role("base", self.base) | with_role("server", self.server)
        for node, own in sorted(self.parties.items()):
            tensors |= with_role(f"party.{node}", own)
        # The order of names is kept, for a sum over them has to come to the same bits after a run was resumed.
        header = {"facts": self.facts, "parties": sorted(self.parties), "names": list(tensors)}
        return Parcel("state", header, tensors)

    @classmethod
    def from_parcel(cls, parcel: Parcel) -> State:
        """Inverse of ``to_parcel``."""
        tensors = {name: parcel.tensors[name] for name in parcel.header.get("names", parcel.tensors)}
        parties = {int(node): group(tensors, f"party.{node}") for node in parcel.header.get("parties", [])}
        roles = {role: group(tensors, role) for role in ("shared", "base", "server")}
        return cls(parties=parties, facts=parcel.header.get("facts", {}), **roles)

    def sha256(self) -> str:
        """Hash of every name, shape and value that the coordinator keeps."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.to_parcel().tensors.items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        return digest.hexdigest()


@dataclass(frozen=True)
class Answer:
    """One party's sound answer as it reaches ``combine``.

    Attributes
    ----------
    node : int
        Who answered.
    sent : Parcel or Loadable
        What came, checked.
    samples : int
        Training examples the party holds.
    staleness : int
        Versions that passed between brief and arrival.
    weight : float
        ``samples`` discounted by staleness; not normalised.
    """

    node: int
    sent: Parcel | Loadable
    samples: int
    staleness: int
    weight: float

    @property
    def parcel(self) -> Parcel:
        """What came."""
        return self.sent if isinstance(self.sent, Parcel) else self.sent.load()

    def tensors(self, role: str = "update") -> Tensors:
        """Return the tensors sent under ``role``."""
        return group(self.parcel.tensors, role)


@dataclass(frozen=True)
class Outcome:
    """What the answers make together: any of a shared change, a state each, a change to the base, or a fit."""

    shared: Tensors = field(default_factory=dict)
    parties: dict[int, Tensors] = field(default_factory=dict)
    base: Tensors = field(default_factory=dict)
    server: Tensors = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class System:
    """Base of every system of the rounds kind.

    Attributes
    ----------
    Knobs : type
        Pydantic model of the recipe's ``[knobs]``.
    leaves : tuple of str
        Roles of tensors that may leave a party; anything else in an answer is refused at the party.
    reports : tuple of str
        Header keys that may leave a party; numbers only. Every answer has them, but for the loss, which guards keep.
    counts : tuple of str
        Reports that are whole numbers from 0.
    paces : tuple of str
        Paces under which the mechanism is sound.
    moves_base : bool
        Whether the result is a change of the base rather than a state that training could go on from.
    needs : {"sum", "individuals"}
        What ``combine`` must be given: ``sum`` where one answer that is the weighted mean of all would do as well.
        A subclass with a ``combine`` of its own needs individuals unless it says otherwise.
    separable : bool
        Whether ``combine`` and ``step`` treat each tensor of the shared state by itself, and keep nothing else. A
        subclass with a way of its own is taken not to unless it says otherwise.
    feedback : str
        Why error feedback is unsound here; empty where it is sound.
    ahead : bool
        Whether a node answers with what it made after the brief before and works on while that travels.
    inside : bool
        Whether a party may be an island, whose ranks train its model together (``[layout]``).
    """

    Knobs: ClassVar[type[Knobs]] = Knobs
    leaves: ClassVar[tuple[str, ...]] = ("update",)
    reports: ClassVar[tuple[str, ...]] = ("samples", "loss")
    counts: ClassVar[tuple[str, ...]] = ("samples",)
    paces: ClassVar[tuple[str, ...]] = ("synchronous", "buffered", "sequential")
    moves_base: ClassVar[bool] = False
    needs: ClassVar[Literal["sum", "individuals"]] = "individuals"
    separable: ClassVar[bool] = False
    feedback: ClassVar[str] = ""
    ahead: bool = False
    inside: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "needs" not in cls.__dict__ and {"combine", "leaves"} & cls.__dict__.keys():
            cls.needs = "individuals"
        if "separable" not in cls.__dict__ and {"combine", "step", "leaves", "expects", "padded"} & cls.__dict__.keys():
            cls.separable = False

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        try:
            self.knobs: Any = self.Knobs.model_validate(recipe.knobs)
        except ValidationError as error:
            raise explain(error, self.Knobs, where=f"knobs of the system {recipe.system!r}") from error
        if ranks_of(recipe.layout) > 1 and not self.inside:
            raise RecipeError(
                f"layout makes {ranks_of(recipe.layout)} ranks of each party, and the system {recipe.system!r} works "
                "in one process: take [layout] out, or choose a system that pre-trains every weight"
            )

    def bases(self) -> tuple[str, ...]:
        """Which bases does the coordinator need besides the recipe's? They are made or fetched before the run."""
        return ()

    def begin(self, world: World) -> State:
        """What is there before the first round?"""
        raise NotImplementedError

    def brief(self, state: State, node: int) -> Parcel:
        """What must this node be told?

        ``steps`` in the header prices local work that is not as long as the recipe's ``rounds.local_steps``.
        """
        raise NotImplementedError

    def abridge(self, brief: Parcel, state: State, node: int) -> Parcel:
        """What of the brief must travel, given what the node keeps at home? Everything by default."""
        return brief

    def adopt(self, brief: Parcel, party: Party) -> Trainable:
        """Become the model that the brief describes, at the party or at the coordinator."""
        raise NotImplementedError

    def expects(self, brief: Parcel) -> dict[str, tuple[int, ...]] | None:
        """Names and shapes of the update that answers ``brief``; None when the system checks them itself."""
        return {name: tuple(tensor.shape) for name, tensor in group(brief.tensors, "shared").items()}

    def inspect(self, state: State, node: int, answer: Parcel) -> None:
        """Raise ``ParcelError`` for an answer whose values cannot be combined although names and shapes may fit."""

    def work(self, brief: Parcel, party: Party) -> Parcel:
        """What does the party do at home, and what may leave?"""
        raise NotImplementedError

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        """What do the answers make together? Must not depend on their order."""
        raise NotImplementedError

    def step(self, state: State, outcome: Outcome) -> State:
        """How does the world move?"""
        raise NotImplementedError
