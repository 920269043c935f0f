"""What a party does to its answer before it leaves: bound it, add noise, hide it - and answer the guard's messages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mycel.errors import ParcelError
from mycel.guard.accounting import calibrate
from mycel.guard.attacks.threats import liars, parse_threat
from mycel.guard.clip import clip
from mycel.guard.contract import KIND, PartyGuard
from mycel.guard.hiding import party_half
from mycel.guard.noise import flat_norm, noise_source, perturb
from mycel.recipe.schema import Recipe
from mycel.wire.algebra import group, seed_of, with_role
from mycel.wire.codecs import parse_codec
from mycel.wire.parcel import Parcel, Tensors


@dataclass
class Sealing:
    """A party's half of the guards that a recipe names."""

    recipe: Recipe
    parties: int

    @cached_property
    def hidden(self) -> PartyGuard | None:
        """The guard that hides answers, where there is one."""
        return party_half(self.recipe.guard.sums, parse_codec(self.recipe.wire.codec))

    @cached_property
    def liars(self) -> frozenset[int]:
        """Nodes that lie in a drill; nobody where none is set."""
        threat = self.recipe.threat
        return liars(self.parties, threat.share) if threat.attack else frozenset()

    def letter(self, node: int, message: Parcel, kept: Tensors) -> tuple[Parcel, Tensors]:
        """Answer one of the guard's own messages."""
        if self.hidden is None:
            raise ParcelError(f"a message of the kind {message.kind!r} came, and guard.sums is 'plain' here: refused")
        return self.hidden.answer(node, message, kept)

    def protect(self, node: int, answer: Parcel, brief: Parcel, kept: Tensors) -> tuple[Parcel, Tensors]:
        """Return what leaves in place of ``answer``, and what the guard keeps at home."""
        guard, terms = self.recipe.guard, brief.header.get("guard", {})
        update, others = group(answer.tensors, "update"), dict(answer.tensors)
        header = dict(answer.header)
        bound, within = float(terms.get("clip", guard.clip_norm)), True
        if bound and clips_at_home(self.recipe):
            within = flat_norm(update) <= bound
            update = clip(update, bound)
        if guard.private == "local":
            version = int(brief.header.get("version", 0))
            seed = seed_of(self.recipe.seed, "local noise", node, version) if guard.replayable else None
            # Two updates within the bound lie at most twice the bound apart.
            update = perturb(update, 2 * bound * noise_of(self.recipe), noise_source(seed))
        if guard.private in {"local", "example"}:
            header.pop("loss", None)  # a number about the examples that no noise covers
        if node in self.liars:
            update = parse_threat(self.recipe.threat.attack).update(update)
        if self.hidden is None:
            return Parcel(answer.kind, header, others | with_role("update", update)), {}
        weight = 1 if guard.private == "user" else int(header["samples"])
        tensors, kept = self.hidden.seal(node, update, weight, within, terms, kept)
        return Parcel(answer.kind, header, tensors), kept


def is_letter(kind: str) -> bool:
    """Whether a brief of this kind is one of the guard's own messages."""
    return kind.startswith(KIND)


def clips_at_home(recipe: Recipe) -> bool:
    """Whether parties bound their updates: not where the bound is on gradients, or where the coordinator clips."""
    guard = recipe.guard
    return (
        bool(guard.clip_norm) and guard.private != "example" and not (guard.private == "user" and guard.sums == "plain")
    )


def noise_of(recipe: Recipe, odds: float = 1.0, steps: int = 1) -> float:
    """Return the noise multiplier that a recipe names, or that its epsilon comes to.

    Parameters
    ----------
    odds : float
        Chance of a protected unit to take part in one release.
    steps : int
        Releases in one round.
    """
    guard = recipe.guard
    return guard.noise or calibrate(guard.epsilon, guard.delta, odds, steps * recipe.rounds.count)
