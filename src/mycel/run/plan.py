"""What a recipe will cost before it runs: counts, bytes, memory and time of each party.

Bytes are lengths of frames really serialised, with values drawn at random where answers are not known yet. Seconds
follow from the fleet's description (`mycel.fleet.cost`). Memory is an estimate:

``weights + trained * (gradient + 2 moments + value) + batch * tokens * (18 * hidden * layers + 3 * vocabulary)``

numbers of 4 bytes each; 18 activations of a block's width are kept per token and block for the way back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mycel.data.parties import PartyData, load_parties
from mycel.errors import RecipeError
from mycel.fleet import Fleet, load_fleet
from mycel.models.base import Base, find_base, open_base
from mycel.models.cache import base_key, cache_folder
from mycel.models.sizes import SIZES
from mycel.recipe.schema import Recipe
from mycel.rounds.site import Job, Site
from mycel.rounds.world import Node, World
from mycel.wire.algebra import with_role
from mycel.wire.codecs import parse_codec
from mycel.wire.parcel import Parcel

CHARACTERS_PER_TOKEN = 3.3  # of English and code under the built-in tokeniser
GIB = 1 << 30


@dataclass(frozen=True)
class PartyPlan:
    """What one party is to do in a round, with predictions.

    Attributes
    ----------
    bytes_down, bytes_up : int
        Frames of one round; up is None where only the system knows what it will send.
    compute_seconds, round_seconds : float
        Work alone, and with the transfers, on the party's device.
    peak_bytes : int
        Memory of the work.
    joules, money : float
        Of one round: the device's watts and price while it works, and its link's price for what travels.
    """

    name: str
    device: str
    samples: int
    rank: int | None
    bytes_down: int
    bytes_up: int | None
    compute_seconds: float
    round_seconds: float
    peak_bytes: int
    joules: float
    money: float


@dataclass(frozen=True)
class Forecast:
    """A recipe's plan: one entry per party, and the run as a whole."""

    parties: list[PartyPlan]
    parameters: int
    trained: int
    rounds: int
    virtual_seconds: float
    bytes_down: int
    bytes_up: int | None


def make_plan(recipe: Recipe) -> Forecast:
    """Predict what ``recipe`` will cost; refuse a party whose device cannot hold its work."""
    parties = load_parties(recipe.data, recipe.seed)
    fleet = load_fleet(recipe.fleet.devices)
    base = _base(recipe)
    site = Site(Job(recipe, "planned", ""), bases={"planned": base})
    world = World(recipe, fleet, [_node(recipe, index, party) for index, party in enumerate(parties)], site)
    world.prepare()
    found = forecast(world)
    for node, plan in zip(world.nodes, found.parties, strict=True):
        device = world.device(node.index)
        if plan.peak_bytes > device.memory_gib * GIB:
            raise RecipeError(
                f"party {node.name!r} needs {plan.peak_bytes / GIB:.1f} GiB on {device.name!r}, which has "
                f"{device.memory_gib:g}: try a smaller training.batch_size, data.max_length or trainable.rank"
            )
    return found


def forecast(world: World) -> Forecast:
    """Predict what a run over an opened world will cost, from frames really serialised and the fleet's description."""
    recipe, system = world.recipe, world.site.system
    state = system.begin(world)
    plans = []
    for node in world.nodes:
        brief = system.abridge(system.brief(state, node.index), state, node.index)
        plans.append(_party(world, world.fleet, node, brief, world.site))
    answers, seconds = _course(recipe, [plan.round_seconds for plan in plans])
    mean_down = sum(plan.bytes_down for plan in plans) / len(plans)
    ups = [plan.bytes_up for plan in plans if plan.bytes_up is not None]
    delivery = max(world.device(node.index).link.down_seconds(plans[node.index].bytes_down) for node in world.nodes)
    return Forecast(
        plans,
        world.parameters,
        world.trainable().size(),
        recipe.rounds.count,
        seconds + delivery,
        round(mean_down * (answers + len(plans))),
        round(sum(ups) / len(ups) * answers) if len(ups) == len(plans) else None,
    )


def _course(recipe: Recipe, each: list[float]) -> tuple[float, float]:
    """How many answers a run takes in all, and its seconds without the delivery, from each party's of one round."""
    rounds, name = recipe.rounds, recipe.rounds.pace.partition("(")[0]
    if name == "sequential":
        return rounds.count, rounds.count * sum(each) / len(each)
    if name == "buffered":
        answers = rounds.count * int(rounds.pace.partition("(")[2].rstrip(")"))
        return answers, answers / sum(1 / seconds for seconds in each)
    return rounds.count * max(1, round(rounds.cohort * len(each))), rounds.count * max(each)


def as_predicted(found: Forecast) -> dict[str, Any]:
    """Lay a forecast out under the names that ``result.json`` measures the same under."""
    sent = {"down": found.bytes_down} | ({} if found.bytes_up is None else {"up": found.bytes_up})
    return {"virtual_seconds": found.virtual_seconds, "bytes": sent}


def _base(recipe: Recipe) -> Base:
    """Open the base; a built-in size that is not trained yet has random weights, which cost the same."""
    size = SIZES.get(recipe.model.base)
    if size is None or (cache_folder() / "bases" / f"{size.name}-{base_key(size)}" / "config.json").is_file():
        return open_base(find_base(recipe.model.base))
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

    family = AutoModelForCausalLM if size.family == "llama" else AutoModelForSeq2SeqLM
    model = family.from_config(size.config()).requires_grad_(False).eval()
    return Base(model, PreTrainedTokenizerFast, cache_folder(), size.name)  # no text is tokenised in a plan


def _node(recipe: Recipe, index: int, party: PartyData) -> Node:
    def tokens(prompt: str, response: str) -> float:
        return min((len(prompt) + len(response)) / CHARACTERS_PER_TOKEN + 1, recipe.data.max_length)

    lengths = [tokens(example.prompt, example.response) for example in party.train]
    held_out = sum(tokens(example.prompt, example.response) for example in party.held_out)
    if recipe.data.pack:
        texts = sum(len(example.prompt) + len(example.response) for example in party.train) / CHARACTERS_PER_TOKEN
        rows = max(1, int((texts + len(party.train)) / recipe.data.max_length))
        lengths = [float(recipe.data.max_length)] * rows
    ranks = recipe.trainable.rank if recipe.trainable.kind == "lora" else None
    rank = ranks[index % len(ranks)] if isinstance(ranks, list) else ranks
    return Node(index, party.name, len(lengths), sum(lengths) / len(lengths), round(held_out), rank)


def _party(world: World, fleet: Fleet, node: Node, brief: Parcel, site: Site) -> PartyPlan:
    wire, device = world.recipe.wire, fleet[node.index]
    down = len(brief.to_bytes(parse_codec(wire.brief_codec)))
    expected = site.system.expects(brief)
    up = None
    if expected is not None:
        source = torch.Generator().manual_seed(0)
        update = {name: torch.randn(shape, generator=source) for name, shape in expected.items()}
        answer = Parcel("answer", {"samples": node.samples, "loss": 1.0}, with_role("update", update))
        up = len(answer.to_bytes(parse_codec(wire.codec)))
    steps = int(brief.header.get("steps", world.recipe.rounds.local_steps))
    evaluated = world.compute_seconds(node.index, 0, 1) / world.recipe.rounds.evaluate_every
    compute = world.compute_seconds(node.index, steps, 0) + evaluated
    travel = device.link.down_seconds(down) + device.link.up_seconds(up or 0)
    seconds = max(compute, travel) if site.system.ahead else compute + travel
    peak = peak_bytes(world, node)
    joules = compute * device.watts
    money = seconds / 3600 * device.price_per_hour + (down + (up or 0)) / GIB * device.link.price_per_gib
    return PartyPlan(node.name, device.name, node.samples, node.rank, down, up, compute, seconds, peak, joules, money)


def peak_bytes(world: World, node: Node) -> int:
    """Estimate a party's peak memory in bytes by the formula of this file."""
    config: Any = world.base.model.config
    training = world.recipe.training
    tokens = training.batch_size * world.recipe.data.max_length
    layers = getattr(config, "num_hidden_layers", 1)
    activations = tokens * (18 * config.hidden_size * layers + 3 * config.vocab_size)
    if training.gradient == "zeroth-order":
        activations //= max(layers, 1)
    return 4 * int(world.parameters + 4 * world.sizes[node.rank] + activations)
