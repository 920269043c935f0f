"""MIRA: every party keeps an adapter of its own, and a graph of kindred tasks draws the adapters together.

Elbakary et al. 2025, "MIRA: A Method of Federated Multi-Task Learning for Large Language Models" (catalogue number 65).
The parties' states w_k minimise together

    sum_k F_k(w_k) + lambda / 2 * sum_k sum_l a_kl |w_k - w_l|^2

    party k:      H local steps from its own w_k give w_k'
    coordinator:  w_k <- w_k' - eta lambda * sum_l a_kl (w_k' - w_l'),   entry by entry of the LoRA factors

``a_kl`` is 1 between neighbours of the given graph. Only the product ``eta lambda`` acts, and it is the knob
``strength``; the step contracts while ``strength`` times the largest number of neighbours is at most 1, and more is
refused. With strength 0 this is each party alone; on the complete graph with strength 1/K every state becomes the
mean, as in federated averaging with equal weights. A party that did not answer keeps its state, and its neighbours
are drawn to that.

Whether neighbours who did not take part in a round draw those who did could not be verified.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from mycel.data.library import private_examples
from mycel.errors import RecipeError
from mycel.finetune.local import Local
from mycel.rounds.laboratory import Measured
from mycel.rounds.system import Knobs, Outcome, State
from mycel.wire.algebra import add, subtract

if TYPE_CHECKING:
    from mycel.recipe.schema import Recipe
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.world import World


class MiraKnobs(Knobs):
    """Settings of MIRA."""

    strength: float = Field(0.1, ge=0, description="eta lambda, pull of one neighbour: share of the gap closed")
    graph: str = Field("complete", description='"complete", "ring", or "blocks(K)": K groups of consecutive parties')


class Mira(Local):
    """A state for each party, tied to its neighbours' by a Laplacian step."""

    Knobs = MiraKnobs

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        if isinstance(recipe.trainable.rank, list) and len(set(recipe.trainable.rank)) > 1:
            raise RecipeError(
                f"trainable.rank is {recipe.trainable.rank}; mira ties factors entry by entry: give all one rank"
            )

    def begin(self, world: World) -> State:
        """Give every party the same start, once the graph is known to contract."""
        degree = max(len(near) for near in neighbours(self.knobs.graph, len(world.nodes)))
        if self.knobs.strength * degree > 1:
            raise RecipeError(
                f"knobs.strength is {self.knobs.strength:g} and a party has {degree} neighbours in the graph "
                f"{self.knobs.graph!r}: the states would overshoot; take at most {1 / degree:.4g}"
            )
        shared = world.starting_state()
        return State(shared=shared, parties={node.index: shared for node in world.nodes})

    def step(self, state: State, outcome: Outcome) -> State:
        """Move each party's own state, then draw those who answered towards their neighbours."""
        trained = super().step(state, outcome).parties
        graph = neighbours(self.knobs.graph, len(trained))
        drawn = dict(trained)
        for node in outcome.parties:
            for other in graph[node]:
                gap = subtract(trained[other], trained[node])
                drawn[node] = add(drawn[node], gap, self.knobs.strength)
        return state.but(parties=drawn)


def neighbours(graph: str, parties: int) -> list[list[int]]:
    """Return each party's neighbours in a graph of that name."""
    everyone = range(parties)
    if graph == "ring":
        return [sorted({(node - 1) % parties, (node + 1) % parties} - {node}) for node in everyone]
    match = re.fullmatch(r"complete|blocks\((\d{1,6})\)", graph)
    blocks = int(match[1] or 1) if match else 0
    if not 1 <= blocks <= parties:
        raise RecipeError(
            f"knobs.graph is {graph!r}; it is 'complete', 'ring' or 'blocks(K)' with K from 1 to the {parties} parties"
        )
    block = [node * blocks // parties for node in everyone]
    return [[other for other in everyone if other != node and block[other] == block[node]] for node in everyone]


def claim(lab: Laboratory) -> Measured:
    """With two planted groups of tasks and little data each, tied groups beat one model and lonely ones at home."""
    changes = {"data.parties": planted(lab.folder), "data.examples": 24, "rounds.evaluate_every": 100}
    changes |= {"rounds.local_steps": 8, "training.batch_size": 4}
    knobs = {"graph": "blocks(2)", "strength": 1 / 3}
    tied = lab.run(lab.recipe("mira", {**changes, "knobs": knobs})).loss()
    common, alone = (lab.run(lab.recipe(name, changes)).loss() for name in ("fedavg", "local"))
    return Measured(
        f"mean local loss {tied:.4f}, against {common:.4f} with FedAvg and {alone:.4f} alone",
        tied < min(common, alone),
        {"tied": tied, "fedavg": common, "alone": alone},
    )


def planted(folder: Path) -> list[str]:
    """Write six parties' files, three from each of two unlike domains, and return their paths."""
    paths = []
    for domain in ("web", "graphical-interfaces"):
        examples = private_examples(domain)
        random.Random(domain).shuffle(examples)
        for part in range(3):
            path = folder / f"mira-{domain}-{part}.jsonl"
            rows = ({"prompt": each.prompt, "response": each.response} for each in examples[part:180:3])
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            paths.append(str(path))
    return paths
