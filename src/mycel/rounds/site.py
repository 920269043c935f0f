"""A site handles one request after another for the parties it hosts, over one copy of the base.

The same code serves a worker process of a simulation and a real party: frames in, frames out. What leaves is
checked against the system's declaration, encoded, and only then handed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mycel.data.tokens import TokenStore
from mycel.evaluate.metrics import Scores, held_out
from mycel.guard.attacks.threats import parse_threat
from mycel.models.base import Base, open_base
from mycel.models.trainable import Trainable, build_trainable
from mycel.recipe.schema import Recipe, Wire
from mycel.rounds.checking import check_answer
from mycel.rounds.party import Party
from mycel.rounds.registry import load_system
from mycel.rounds.sealing import Sealing, is_letter
from mycel.rounds.system import System
from mycel.wire.algebra import group, with_role
from mycel.wire.codecs import parse_codec
from mycel.wire.feedback import compensate
from mycel.wire.parcel import Limits, Parcel, Tensors

if TYPE_CHECKING:
    from mycel.collectives.leading import Leader


@dataclass(frozen=True)
class Job:
    """What a site must know to host an arm of a run; small, and JSON on the wire.

    Attributes
    ----------
    base : str
        Folder of the base model.
    store : str
        File of the parties' tokens.
    pooled : bool
        Whether node 0 holds every party's training examples (the centralised arm).
    """

    recipe: Recipe
    base: str
    store: str
    pooled: bool = False

    def to_json(self) -> str:
        """Serialise for another process."""
        content = {"base": self.base, "store": self.store, "pooled": self.pooled}
        return json.dumps({"recipe": self.recipe.model_dump(mode="json"), **content})

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Inverse of ``to_json``."""
        content = json.loads(text)
        return cls(recipe=Recipe.model_validate(content.pop("recipe")), **content)


@dataclass
class Site:
    """Hosts the parties of one job; bases, stores and trainables are shared with the process's other jobs."""

    job: Job
    bases: dict[str, Base] = field(default_factory=dict)
    stores: dict[str, TokenStore] = field(default_factory=dict)
    trainables: dict[tuple[str, str, int | None], Trainable] = field(default_factory=dict)
    leader: Leader | None = None  # of the island whose rank 0 this process is

    @cached_property
    def system(self) -> System:
        """The system that the recipe names."""
        return load_system(self.job.recipe)

    @cached_property
    def sealing(self) -> Sealing:
        """What answers go through before they leave."""
        return Sealing(self.job.recipe, len(self.store))

    @cached_property
    def base(self) -> Base:
        """The frozen base."""
        adapter = self.job.recipe.model.adapter
        key = f"{self.job.base}:{adapter}" if adapter else self.job.base
        if key not in self.bases:
            self.bases[key] = open_base(Path(self.job.base), adapter)
        return self.bases[key]

    @cached_property
    def store(self) -> TokenStore:
        """Every party's tokens, memory-mapped."""
        if self.job.store not in self.stores:
            self.stores[self.job.store] = TokenStore.open(Path(self.job.store))
        return self.stores[self.job.store]

    def bind(self, rank: int | None) -> Trainable:
        """Return the trainable of one rank, built once per process."""
        spec = self.job.recipe.trainable
        key = (self.job.base, spec.model_dump_json(), rank)
        if key not in self.trainables:
            self.trainables[key] = build_trainable(spec, self.base, rank)
        return self.trainables[key]

    def holding(self, node: int) -> int:
        """Return which of the store's parties is ``node``; the coordinator looks through the first one's eyes."""
        return max(node, 0)

    def party(self, node: int, version: int, personal: Mapping[str, Any] | None = None) -> Party:
        """Return one node's view; -1 is the coordinator, which holds no examples."""
        table = self.store.pooled() if self.job.pooled else self.store.train(self.holding(node))
        examples = table.slice(0, 0) if node < 0 else table
        if node in self.sealing.liars:
            tokenise = partial(self.base.tokenizer.encode, add_special_tokens=False)
            examples = parse_threat(self.job.recipe.threat.attack).examples(table, tokenise)
        return Party(node, version, self.job.recipe, self.base, examples, self.bind, dict(personal or {}), self.leader)

    def handle(self, node: int, frame: bytes, home: bytes) -> tuple[bytes, bytes]:
        """Carry out one brief and return the answer's frame and the party's new home frame."""
        wire = self.job.recipe.wire
        brief = Parcel.from_bytes(frame, limits(wire, self.base))
        kept = Parcel.from_bytes(home).tensors if home else {}
        if is_letter(brief.kind):
            letter, secrets = self.sealing.letter(node, brief, group(kept, "guard"))
            others = {name: value for name, value in kept.items() if not name.startswith("guard/")}
            return letter.to_bytes(), Parcel("home", {}, others | with_role("guard", secrets)).to_bytes()
        party = self.party(node, int(brief.header.get("version", 0)), group(kept, "personal"))
        scores = [self.evaluate(brief, party, index) for index in self._evaluated(brief, node)]
        if brief.kind == "deliver":
            answer = Parcel("answer", {"samples": party.samples})
        else:
            answer = self.system.work(brief, party)
        if scores:
            numbers = [number for score in scores for number in (score.loss_sum, score.tokens, score.correct)]
            answer = Parcel(answer.kind, {**answer.header, "scores": numbers}, answer.tensors)
        check_answer(self.system, answer)
        secrets = group(kept, "guard")
        residual = group(kept, "residual")
        if brief.kind == "deliver":
            sent = answer.to_bytes(parse_codec(wire.codec))
        elif self.sealing.hidden is not None:
            answer, residual = self._compensated(answer, residual)
            sealed, secrets = self.sealing.protect(node, answer, brief, secrets)
            sent = sealed.to_bytes()
        else:
            guarded, _ = self.sealing.protect(node, answer, brief, {})
            guarded, residual = self._compensated(guarded, residual)
            sent = guarded.to_bytes(parse_codec(wire.codec))
        home_tensors = (
            with_role("personal", party.personal) | with_role("residual", residual) | with_role("guard", secrets)
        )
        return sent, Parcel("home", {}, home_tensors).to_bytes() if home_tensors else b""

    def evaluate(self, brief: Parcel, party: Party, holder: int) -> Scores:
        """Score the model that a brief describes on the held-out examples of ``holder``."""
        table = self.store.held_out(self.holding(holder))
        trainable = self.system.adopt(brief, party)
        objective = self.job.recipe.training.objective
        with trainable.active():
            return held_out(self.base.model, table, pad_id=party.pad_id, objective=objective)

    def _evaluated(self, brief: Parcel, node: int) -> list[int]:
        # Other parties' held-out examples are named only by a simulation's comparison arms; a real party holds its own.
        return list(brief.header.get("holders", [node] if brief.header.get("evaluate") else []))

    def _compensated(self, answer: Parcel, residual: Tensors) -> tuple[Parcel, Tensors]:
        """With error feedback, add what the codec lost before; return what it loses this time."""
        wire = self.job.recipe.wire
        codec = parse_codec(wire.codec)
        if not wire.error_feedback or not answer.tensors or codec.lossless:
            return answer, residual
        tensors, residual = compensate(answer.tensors, residual, codec)
        return Parcel(answer.kind, answer.header, tensors), residual


def limits(wire: Wire, base: Base) -> Limits:
    """Return what a receiver accepts: frames as the recipe says, and no more numbers than a few whole models hold."""
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    return Limits(frame_bytes=wire.max_parcel, elements=4 * parameters + (1 << 22))
