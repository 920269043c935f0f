"""FedCyBGD: parties take turns, and each trains and sends one block of the model.

Wang et al. 2024, "Save It All: Enabling Full Parameter Tuning for Federated Large Language Models via Cycle Block
Gradient Descent" (arXiv 2406.11187; catalogue number 35). The model is cut into B blocks, one per transformer block
and one for embedding, head and final norm. Round t names block b(t); the party whose turn it is gets the model with
all changes so far, trains block b alone, with gradients and optimiser state for that block only, and sends its change:

    w_{t+1}[b] = w_t[b] + d[b],   every other block stays;   b(t) = t mod B, descending, or shuffled in every cycle

After B rounds every weight has been trained. Under ``rounds.pace = "sequential"`` one party is visited per round, as
in the paper; under "synchronous" all train the same block and are averaged, its "agg" mode.

A party knows the base. With ``download`` naming a codec, the changes of the other blocks since the base travel through
it, and those that have not changed do not travel; the block to train always comes in full precision. How the paper
compresses what a party downloads could not be verified.

With ``blocks = 1`` this is FedAvg, to the bit. Any trainable will do; blocks that it does not reach are left out.
"""

from __future__ import annotations

import random
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mycel.errors import RecipeError
from mycel.finetune.fedavg import FedAvg, FedAvgKnobs
from mycel.models.layers import transformer_blocks
from mycel.rounds.laboratory import Measured
from mycel.rounds.replay import require_one_rank
from mycel.rounds.system import Outcome, State
from mycel.wire.algebra import add, group, seed_of, subtract, with_role
from mycel.wire.codecs import parse_codec
from mycel.wire.parcel import Parcel, Tensors

if TYPE_CHECKING:
    from mycel.models.base import Base
    from mycel.models.trainable import Trainable
    from mycel.recipe.schema import Recipe
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.party import Party
    from mycel.rounds.world import World

START, ROUND, CUT = "start", "round", "cut"


class FedCyBGDKnobs(FedAvgKnobs):
    """Settings of FedCyBGD."""

    blocks: int = Field(0, ge=0, description="blocks to cut the model into; 0: one per transformer block, and the rest")
    order: Literal["ascending", "descending", "random"] = Field("ascending", description="order within a cycle")
    download: str = Field(
        "", description="codec for the changes of blocks a party does not train; empty: whole weights"
    )


class FedCyBGD(FedAvg):
    """Cyclic block descent: a round trains one block of the model."""

    Knobs = FedCyBGDKnobs
    paces = ("sequential", "synchronous")

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        require_one_rank(recipe)
        parse_codec(self.knobs.download or "raw")

    def begin(self, world: World) -> State:
        """Start as FedAvg does, with the model cut into blocks."""
        state = super().begin(world)
        if self.knobs.download and world.start is not None:
            raise RecipeError("knobs.download sends changes since the base, and this run starts from another state")
        cut = cut_blocks(world.base, state.shared, self.knobs.blocks)
        return state.but(facts={ROUND: 0, CUT: cut}, server=state.shared if self.knobs.download else {})

    def brief(self, state: State, node: int) -> Parcel:
        """Tell the node the block to train in full, and the others as the recipe says."""
        names = state.facts[CUT][self.active(state)]
        block = {name: state.shared[name] for name in names}
        others = {name: tensor for name, tensor in state.shared.items() if name not in block}
        if not self.knobs.download:
            return Parcel("work", {}, with_role("shared", block) | with_role("others", others))
        return Parcel("work", {}, with_role("shared", block) | with_role("changes", self._encoded(state, others)))

    def adopt(self, brief: Parcel, party: Party) -> Trainable:
        """Load the block, and the others or the base with their changes."""
        trainable = party.trainable()
        block, others = group(brief.tensors, "shared"), group(brief.tensors, "others")
        if self.knobs.download:
            others = self._decoded(group(brief.tensors, "changes"), party.initial(trainable))
        trainable.load({**others, **block})
        return trainable

    def work(self, brief: Parcel, party: Party) -> Parcel:
        """Train the block and send its change."""
        trainable, before = self.adopt(brief, party), group(brief.tensors, "shared")
        result = party.train(trainable, correct=self.correction(brief, party), only=before)
        after = {name: tensor for name, tensor in trainable.state().items() if name in before}
        return party.answer(result.loss, subtract(after, before))

    def step(self, state: State, outcome: Outcome) -> State:
        """Move the block and turn to the next."""
        return super().step(state, outcome).but(facts={**state.facts, ROUND: state.facts[ROUND] + 1})

    def active(self, state: State) -> int:
        """Return which block the coming round trains."""
        count = len(state.facts[CUT])
        cycle, place = divmod(int(state.facts[ROUND]), count)
        if self.knobs.order == "random":
            return random.Random(seed_of(self.recipe.seed, "cycle", cycle)).sample(range(count), count)[place]
        return place if self.knobs.order == "ascending" else count - 1 - place

    def _encoded(self, state: State, others: Tensors) -> Tensors:
        codec = parse_codec(self.knobs.download)
        changes = subtract(others, state.server)
        return {
            f"{name}:{part}": value
            for name, change in changes.items()
            if bool(change.any())
            for part, value in codec.encode(change).items()
        }

    def _decoded(self, parts: Tensors, initial: Tensors) -> Tensors:
        grouped: dict[str, Tensors] = {}
        for name, value in parts.items():
            owner, _, part = name.rpartition(":")
            grouped.setdefault(owner, {})[part] = value
        codec = parse_codec(self.knobs.download)
        return add(initial, {name: codec.decode(own, tuple(initial[name].shape)) for name, own in grouped.items()})


def cut_blocks(base: Base, state: Tensors, count: int = 0) -> list[list[str]]:
    """Cut a state's names along the model's transformer blocks, the rest last, into ``count`` runs of neighbours."""
    prefixes = tuple(f"{path}." for path in transformer_blocks(base.model))
    natural = [[name for name in state if name.startswith(prefix)] for prefix in prefixes]
    natural.append([name for name in state if not name.startswith(prefixes)])
    natural = [names for names in natural if names]
    wanted = count or len(natural)
    if wanted > len(natural):
        raise RecipeError(f"knobs.blocks is {count}, and the model has {len(natural)} blocks to train")
    edges = [len(natural) * index // wanted for index in range(wanted + 1)]
    return [list(chain.from_iterable(natural[low:high])) for low, high in pairwise(edges)]


def claim(lab: Laboratory) -> Measured:
    """Two cycles against sequential full tuning on the same samples; bytes sent; a compressed download."""
    steps = {"rounds.pace": "sequential", "rounds.count": 10, "rounds.evaluate_every": 10}
    shared = {**steps, "trainable.kind": "full", "training.learning_rate": 1e-3}
    whole = lab.run(lab.recipe("fedavg", shared))
    blocks = lab.run(lab.recipe("fedcybgd", shared))
    packed = lab.run(lab.recipe("fedcybgd", {**shared, "knobs": {"download": "int8(64)"}}))
    lora = lab.run(lab.recipe("fedavg", {**steps, "training.learning_rate": 3e-3}))
    gap = blocks.loss() / whole.loss() - 1
    up = blocks.meter.total("up", purpose="work") / whole.meter.total("up", purpose="work")
    down = whole.meter.total("down") / packed.meter.total("down")
    change = packed.loss() / blocks.loss() - 1
    start = blocks.world.starting_state()
    still = [name for name, tensor in blocks.state.shared.items() if bool((tensor == start[name]).all())]
    return Measured(
        f"on equal samples the loss ends {100 * gap:+.1f} % from full tuning in turns ({blocks.loss():.3f} and "
        f"{whole.loss():.3f}; LoRA {lora.loss():.3f}, untuned {blocks.loss(0):.3f}), with {100 * up:.0f} % of its "
        f"upload and {len(still)} tensors left untouched; a compressed download is {down:.1f} times smaller and "
        f"changes the loss by {100 * change:+.1f} %",
        gap <= 0.03 and up < 1.05 / len(blocks.state.facts[CUT]) and not still and blocks.loss() < blocks.loss(0),
        {"gap": gap, "upload_share": up, "download_ratio": down, "compressed_change": change, "lora": lora.loss()},
    )
