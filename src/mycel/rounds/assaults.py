"""Attacks pointed at a recipe: a run is watched as a curious coordinator would, and each attack scores what it got.

Every score says what the attacker sees is worth: 0 (or 0.5 for membership, 1 / parties for the property) is nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mycel.data.examples import Example
from mycel.data.parties import PartyData, load_parties
from mycel.data.tokens import TokenStore, TokenTable
from mycel.guard.attacks.inversion import span_tokens
from mycel.guard.attacks.memorisation import (
    alternatives,
    area_under_curve,
    canary,
    exposure,
    lifted_tokens,
    losses,
    mean_probabilities,
    recall,
)
from mycel.guard.attacks.threats import PAYLOAD, TRIGGER
from mycel.guard.clip import clip
from mycel.guard.example import example_losses
from mycel.guard.noise import noise_source, perturb
from mycel.recipe.schema import Recipe
from mycel.rounds.coordinator import Coordinator
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.sealing import noise_of
from mycel.rounds.simulation import Finished, Simulation
from mycel.rounds.system import State
from mycel.wire.algebra import add, cosine, seed_of, subtract
from mycel.wire.parcel import Parcel, Tensors
from mycel.wire.shelf import Frame

VICTIM = 0
REPEATS = 8  # times the canary stands among the victim's examples
SHORT = 8  # tokens of the text that is sought in a gradient
GUESSES = 100  # tokens that the word attack names


@dataclass(frozen=True)
class Crossing:
    """One frame on its way, ``up`` or ``down``."""

    direction: str
    node: int
    kind: str
    frame: bytes


@dataclass
class Scene:
    """A run as the attacker saw it, and the truth to score by.

    Attributes
    ----------
    seen : list of dict
        For each round, what arrived from each node: updates where they are readable; empty where they are hidden.
    states : list of State
        Of the coordinator, at the start and after each round.
    parties : list of PartyData
        The truth.
    crossed : list of Crossing
        Every frame, in order.
    """

    finished: Finished
    recipe: Recipe
    parties: list[PartyData]
    seed: int
    seen: list[dict[int, Tensors]] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    crossed: list[Crossing] = field(default_factory=list)

    def table(self, examples: list[Example]) -> TokenTable:
        """Tokenise examples as the parties do."""
        return TokenTable.from_examples(examples, self.finished.world.base.tokenizer, self.recipe.data.max_length)

    def score(self, table: TokenTable, state: State | None = None) -> Tensor:
        """Losses of examples under the last model that was seen, or under another state's."""
        world, system = self.finished.world, self.finished.system
        brief = system.brief(self.states[-1] if state is None else state, -1)
        dated = Parcel(brief.kind, {**brief.header, "version": self.finished.progress.version}, brief.tensors)
        trainable = system.adopt(dated, world.observer())
        with trainable.active():
            return losses(world.base.model, table, int(world.base.tokenizer.pad_token_id or 0))


def stage(lab: Laboratory, recipe: Recipe, seed: int = 5) -> Scene:
    """Run ``recipe`` with a canary among the victim's examples, and watch."""
    parties = load_parties(recipe.data, recipe.seed)
    victim = parties[VICTIM]
    parties[VICTIM] = replace(victim, train=[*victim.train[:-REPEATS], *[canary(seed)] * REPEATS])
    plain = lab.world(recipe)
    path = lab.folder / f"scene-{seed_of(recipe.sha256(), seed)}.safetensors"
    TokenStore.build(parties, plain.base.tokenizer, recipe.data.max_length).save(path)
    arm = f"scene-{lab._count}"
    world = lab.place.open(arm, recipe, plain.base.folder, path)
    seen: list[dict[int, Tensors]] = []
    states: list[State] = []
    crossed: list[Crossing] = []

    def watch(coordinator: Coordinator) -> None:
        if coordinator.progress.version >= len(states):
            states.append(coordinator.progress.state)
            if coordinator.latest:
                seen.append({answer.node: answer.tensors() for answer in coordinator.latest})

    def tap(direction: str, node: int, kind: str, frame: Frame) -> None:
        crossed.append(Crossing(direction, node, kind, bytes(frame)))

    finished = Simulation(arm, world, lab.place.labour, checkpoint=watch, wiretap=tap).run()
    return Scene(finished, recipe, parties, seed, seen, states, crossed)


def canary_exposure(scene: Scene) -> float:
    """Bits by which the final model prefers the victim's secret to others of its form; 8 is extraction."""
    return exposure(scene.score(scene.table(alternatives(scene.seed))))


def membership(scene: Scene) -> float:
    """Area under the curve of telling the victim's training examples from its held-out ones by the fall of loss."""
    victim, start = scene.parties[VICTIM], scene.states[0]
    falls = []
    for examples in (victim.train[:-REPEATS], victim.held_out):
        table = scene.table(examples)
        falls.append(scene.score(table, start) - scene.score(table))
    return area_under_curve(*falls)


def words(scene: Scene) -> float:
    """Recall of the words typical of the victim from the first update seen: its own, or all that can be read.

    The attacker asks which tokens the update makes likelier; the truth are those that the victim's text has more
    often than others', by as many. Guessing finds their share of the vocabulary.
    """
    world = scene.finished.world
    shared = scene.states[0].shared
    hidden = not scene.seen or not scene.seen[0].get(VICTIM)
    update = subtract(scene.states[1].shared, shared) if hidden else scene.seen[0][VICTIM]
    contexts = torch.randint(3, world.base.model.config.vocab_size, (8, 16), generator=torch.Generator().manual_seed(2))
    found = []
    for state in (scene.states[0], scene.states[0].but(shared=add(shared, update))):
        trainable = scene.finished.system.adopt(scene.finished.system.brief(state, -1), world.observer())
        with trainable.active():
            found.append(mean_probabilities(world.base.model, contexts))
    size = len(found[0])
    counts = [_counts(scene.table(party.train), size) for party in scene.parties]
    others = torch.stack([count for place, count in enumerate(counts) if place != VICTIM]).mean(0)
    typical = ((counts[VICTIM] - others) / (counts[VICTIM] + others + 1).sqrt()).topk(GUESSES).indices
    return recall(lifted_tokens(found[0], found[1], GUESSES), typical.tolist())


def gradient_words(scene: Scene) -> float:
    """Recall of the tokens of a short text from one step's gradient of the first layer's factor A, as it would leave.

    The gradient is clipped and noised as the recipe says; where sums are hidden it is the sum over all parties.
    """
    world, guard = scene.finished.world, scene.recipe.guard
    trainable = scene.finished.system.adopt(scene.finished.system.brief(scene.states[1], -1), world.observer())
    names = [name for name in trainable.parameters() if name.endswith("lora_A")]
    name = next((name for name in names if "v_proj" in name), names[0])
    batches = []
    for party in scene.parties:
        table = scene.table(party.train[:1])
        batches.append(table.ids[table.offsets[0] : table.offsets[0] + SHORT][None].long())
    told = batches if guard.sums != "plain" else batches[VICTIM : VICTIM + 1]
    with trainable.active():
        model, parameters = world.base.model, trainable.parameters()
        total = torch.zeros_like(parameters[name])
        for ids in told:
            loss = example_losses(model, ids, torch.ones_like(ids), ids).sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            update = clip(dict(zip(parameters, gradients, strict=True)), guard.clip_norm or float("inf"))
            total += update[name]
        if guard.private:
            deviation = guard.clip_norm * noise_of(scene.recipe) * (2 if guard.private == "local" else 1)
            total = perturb({name: total}, deviation, noise_source(scene.seed))[name]
        inputs = _inputs(model, name.removesuffix(".lora_A"))
    return recall(span_tokens(total, inputs), batches[VICTIM].flatten().tolist())


@torch.no_grad()
def _inputs(model: nn.Module, path: str) -> Tensor:
    """What a first layer sees for each token of the vocabulary, standing alone."""
    kept: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, given: kept.append(given[0].detach()))
    try:
        ids = torch.arange(int(model.config.vocab_size))[:, None]  # type: ignore[union-attr,arg-type]
        model(input_ids=ids)
    finally:
        handle.remove()
    return kept[0].reshape(len(ids), -1)


def shadowed(scene: Scene) -> list[Parcel]:
    """Return what an attacker would answer the first brief with, from held-out examples of each domain."""
    world, system = scene.finished.world, scene.finished.system
    answers = []
    for party in scene.parties:
        observer = world.observer()
        observer.examples = scene.table(party.held_out)
        answers.append(system.work(system.brief(scene.states[0], -1), observer))
    return answers


def domain(scene: Scene) -> float:
    """Share of parties whose domain is told right from their first update, by updates made from held-out examples."""
    shadows = [{name.partition("/")[2]: value for name, value in made.tensors.items()} for made in shadowed(scene)]
    pooled = subtract(scene.states[1].shared, scene.states[0].shared)
    right = 0
    for node in range(len(scene.parties)):
        update = scene.seen[0].get(node) or pooled
        right += max(range(len(shadows)), key=lambda place: cosine(shadows[place], update)) == node
    return right / len(scene.parties)


def backdoor_success(scene: Scene) -> float:
    """Share of the liars' phrase that the trigger makes likeliest, over all parties' held-out prompts."""
    asked = [Example(f"{TRIGGER}\n{example.prompt}", PAYLOAD) for party in scene.parties for example in party.held_out]
    return likeliest(scene, asked[::4])


@torch.no_grad()
def likeliest(scene: Scene, examples: list[Example], first: bool = False) -> float:
    """Share of the responses' tokens, or first tokens, that the final model finds likeliest, given what precedes."""
    world, system = scene.finished.world, scene.finished.system
    trainable = system.adopt(system.brief(scene.finished.state, -1), world.observer())
    table = scene.table(examples)
    hits = tokens = 0
    with trainable.active():
        for start in range(0, len(table), 16):
            batch = table.batch(list(range(start, min(start + 16, len(table)))), 0, "causal")
            logits = world.base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            targets = batch.labels[:, 1:]
            if first:
                targets = torch.where((targets != -100).cumsum(1) == 1, targets, -100)
            hits += int((logits[:, :-1].argmax(-1) == targets).sum())
            tokens += int((targets != -100).sum())
    return hits / tokens


ASSAULTS: dict[str, Callable[[Scene], float]] = {
    "gradient recall": gradient_words,
    "word recall": words,
    "canary exposure": canary_exposure,
    "membership": membership,
    "domain": domain,
}


def assault(lab: Laboratory, recipe: Recipe) -> dict[str, float]:
    """Point every attack at ``recipe``: privacy attacks at an honest run, a backdoor at one with liars."""
    scene = stage(lab, recipe)
    scores = {name: attack(scene) for name, attack in ASSAULTS.items()}
    lied = stage(lab, recipe.replace({"threat.attack": "backdoor", "threat.share": 0.34}))
    return scores | {"backdoor": backdoor_success(lied), "loss": scene.finished.loss()}


def _counts(table: TokenTable, vocabulary: int) -> Tensor:
    ids = table.ids[table.offsets[0] : table.offsets[-1]].long()
    return torch.bincount(ids, minlength=vocabulary).double()
