"""Whether a system, a codec, guards, error feedback and a filter are sound together; said before a run begins."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from mycel.errors import ExtraMissing, RecipeError
from mycel.guard.attacks.threats import parse_threat
from mycel.guard.filters import FLTrust, NormBound, TrimmedMean, parse_filter
from mycel.recipe.schema import Recipe
from mycel.rounds.system import System
from mycel.wire.codecs import parse_codec
from mycel.wire.codecs.fixed import Fixed


def check_pairing(recipe: Recipe, system: System) -> None:
    """Refuse a recipe whose parts would be unsound together.

    Raises
    ------
    RecipeError
        With what is at odds, why, and a pairing that would do.
    ExtraMissing
        Where a library that the recipe needs is not installed.
    """
    for fault in _faults(recipe, system):
        raise RecipeError(fault)
    guard = recipe.guard
    if guard.private and find_spec("opacus") is None:
        raise ExtraMissing("opacus", "privacy")
    if guard.sums == "homomorphic" and find_spec("tenseal") is None:
        raise ExtraMissing("tenseal", "homomorphic")


def _faults(recipe: Recipe, system: System) -> Iterator[str]:
    if recipe.wire.error_feedback and system.feedback:
        yield (
            f"wire.error_feedback is on, and of the system {recipe.system!r} {system.feedback}: turn it off, or take a "
            "system such as 'fedavg'"
        )
    if recipe.guard.sums != "plain":
        yield from _hidden(recipe, system)
    if recipe.guard.filter:
        yield from _filtered(recipe, system)
    if recipe.guard.private or recipe.guard.noise or recipe.guard.epsilon:
        yield from _private(recipe, system)
    if recipe.threat.attack:
        threat = parse_threat(recipe.threat.attack)
        if threat.knows_others and recipe.guard.sums != "plain":
            yield (
                f"threat.attack is {recipe.threat.attack!r}, which looks at other parties' answers, and "
                f"guard.sums = {recipe.guard.sums!r} hides them: drill it with guard.sums = 'plain'"
            )


def _hidden(recipe: Recipe, system: System) -> Iterator[str]:
    """A hidden sum is all that arrives; under masks it is made of whole numbers of one step."""
    guard, rounds = recipe.guard, recipe.rounds
    what = f"guard.sums is {guard.sums!r}"
    if system.needs != "sum":
        yield (
            f"{what}, which opens to a sum, and the system {recipe.system!r} combines what each party sent: take "
            "'fedavg', 'ffa_lora' or 'masked_flora', or guard.sums = 'plain'"
        )
    codec, masked = parse_codec(recipe.wire.codec), "masked" in guard.sums
    if not masked and not codec.lossless:
        yield (
            f"{what}, which adds up floating-point numbers as they are, and wire.codec {recipe.wire.codec!r} would not "
            "be applied to what is sealed: set wire.codec = 'raw'"
        )
    if masked and not isinstance(codec, Fixed):
        yield (
            f"{what}, and levels of wire.codec {recipe.wire.codec!r} do not add up, or mean another number at each "
            "party: masks need a linear, fixed-point codec, e.g. wire.codec = 'fixed(8,0.1)' or 'fixed(16,0.5)'"
        )
    if rounds.pace != "synchronous":
        yield (
            f"{what}, and with rounds.pace {rounds.pace!r} answers to unlike briefs would be added up: "
            "take rounds.pace = 'synchronous'"
        )
    if masked and rounds.quorum < guard.staying:
        yield (
            f"rounds.quorum is {rounds.quorum}, and a masked sum opens only when a share of {guard.staying} stays: "
            f"raise the quorum to {guard.staying} or more, or lower guard.staying (above 0.5)"
        )
    if isinstance(recipe.trainable.rank, list) and recipe.trainable.kind == "lora" and not system.moves_base:
        yield (
            f"{what}, and trainable.rank lists unlike ranks, whose factors do not add up: give one rank for all, or "
            "take 'masked_flora', which adds up products"
        )
    if guard.filter:
        yield (
            f"{what}, and guard.filter {guard.filter!r} must see single answers, which are hidden: bound what a party "
            "can do with guard.clip_norm instead, or take guard.sums = 'plain'"
        )


def _filtered(recipe: Recipe, system: System) -> Iterator[str]:
    """A centre that is no answer of anybody's stands in for all of them only where a sum is needed."""
    filtered = parse_filter(recipe.guard.filter)
    if system.needs != "sum" and isinstance(filtered, TrimmedMean | NormBound | FLTrust):
        yield (
            f"guard.filter is {filtered.spec!r}, which makes an update of its own, and the system {recipe.system!r} "
            "combines what each party sent: take 'krum(0.2)', 'multi_krum(0.2)' or 'geometric_median'"
        )
    if filtered.trusts and not recipe.guard.root:
        yield f"guard.filter is {filtered.spec!r}, which needs examples of the coordinator's own: set guard.root"
    if recipe.rounds.pace == "sequential":
        yield "guard.filter compares the answers of a round, and rounds.pace = 'sequential' has one: take 'synchronous'"
    if recipe.guard.private == "user":
        yield (
            f"guard.filter is {filtered.spec!r}, and what one party can change through it is not bounded by "
            "guard.clip_norm, so noise would not cover it: take private = 'local' or 'example', or no filter"
        )


def _private(recipe: Recipe, system: System) -> Iterator[str]:
    """Noise is worth what its sensitivity is bounded by."""
    guard = recipe.guard
    if not guard.private:
        yield "guard.noise or guard.epsilon is set and guard.private is not: say for whom, 'user', 'local' or 'example'"
    if guard.epsilon < 0 or (not guard.epsilon and not guard.noise):
        yield (
            f"guard.epsilon is {guard.epsilon} and guard.noise {guard.noise}: privacy has a price above 0, e.g. "
            "guard.epsilon = 8.0, or give the noise itself, e.g. guard.noise = 1.0"
        )
    if guard.epsilon and guard.noise:
        yield f"guard.epsilon is {guard.epsilon} and guard.noise {guard.noise}: one follows from the other, give one"
    if not guard.clip_norm:
        yield f"guard.private is {guard.private!r} and guard.clip_norm 0: noise hides only what is bounded, e.g. 1.0"
    if guard.private in {"user", "local"} and (system.needs != "sum" or system.leaves != ("update",)):
        yield (
            f"guard.private is {guard.private!r}, and the system {recipe.system!r} sends more than one bounded update "
            "or combines single answers: take 'fedavg' or 'ffa_lora', or guard.private = 'example'"
        )
    if guard.private == "user" and recipe.rounds.pace != "synchronous":
        yield f"guard.private is 'user' and rounds.pace {recipe.rounds.pace!r}: its rounds must be 'synchronous'"
    if guard.private == "example" and recipe.training.gradient != "backpropagation":
        yield "guard.private is 'example', which bounds gradients: set training.gradient = 'backpropagation'"
    if guard.private == "example" and (recipe.trainable.kind != "lora" or recipe.training.objective != "causal"):
        yield "guard.private is 'example', which is measured on LoRA of decoders: set trainable.kind = 'lora'"
    if guard.private != "example" and recipe.wire.error_feedback:
        yield (
            "wire.error_feedback is on, and what it adds to an update is not bounded by guard.clip_norm: "
            f"turn it off under guard.private = {guard.private!r}"
        )
    if guard.within and guard.private != "user":
        yield f"guard.within adapts the coordinator's bound, and guard.private is {guard.private!r}: set it to 0"
