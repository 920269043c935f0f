"""FLoRA: the parties' adapters are stacked, not averaged, and merged into every party's base.

Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations"
(catalogue number 97).

    party k:      a fresh adapter (A_k random, B_k = 0) of its own rank, trained over its base; sends B_k, A_k
    coordinator:  A = [p_1 A_1; p_2 A_2; ...],  B = [B_1, B_2, ...]   =>   B A = sum_k p_k B_k A_k exactly
    every party:  W <- W + s B A, then a fresh adapter

The rank of a stack is the sum of the ranks, so the download grows with the number of answers and the upload does
not. Weights stand on A alone, or they would count twice. No knobs. With one party the sum of its rounds' adapters is
merged one by one, as in ReLoRA.

What a party has merged stays at home: the dense sum ``D`` of all stacks, computed with as ``W + D``. Each stack has a
number, and each answer says up to which one its party has merged. A party that missed rounds is sent every stack it
lacks, in order, so it does the very sums that the others did and ends with the same ``D``; a party that lacks
more than ``D`` itself would take is sent ``D``. So nothing is lost with partial participation, late answers or lost
ones. With a lossy ``wire.brief_codec`` the bases drift apart, which the paper does not consider.

How the fresh adapters are seeded could not be verified; here by party and round, so no two parties share an A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers.pytorch_utils import Conv1D

from mycel.errors import ParcelError
from mycel.finetune.fedavg import FedAvg
from mycel.models.moved import Moved
from mycel.recipe.schema import Recipe
from mycel.rounds.checking import check_shapes
from mycel.rounds.effective import aggregation_errors
from mycel.rounds.factors import factors_b, layers, require_lora
from mycel.rounds.laboratory import Measured
from mycel.rounds.party import rank_of
from mycel.rounds.system import Answer, Knobs, Outcome, State
from mycel.wire.algebra import add, group, with_role
from mycel.wire.parcel import Parcel, Tensors

if TYPE_CHECKING:
    from mycel.models.trainable import Trainable
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.party import Party
    from mycel.rounds.world import World

RANKS = [1, 2, 4, 8, 16, 32]


class FloraStacking(FedAvg):
    """Stack, broadcast, merge, begin anew."""

    Knobs = Knobs
    reports: ClassVar[tuple[str, ...]] = ("samples", "loss", "merged")
    moves_base = True

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        require_lora(recipe)

    def begin(self, world: World) -> State:
        """Count what the run starts from as the first change of the base."""
        start, trainable = world.starting_state(), world.trainable()
        change = trainable.delta_weight(start)
        shapes: dict[str, list[int]] = {}
        for path in layers(start):
            flipped = isinstance(world.base.model.get_submodule(path), Conv1D)
            shapes[path] = [start[f"{path}.lora_A"].shape[1], start[f"{path}.lora_B"].shape[0], int(flipped)]
        merged = int(any(bool(delta.any()) for delta in change.values()))
        return State(base=change, facts={"merged": merged, "seen": [0] * len(world.nodes), "shapes": shapes})

    def brief(self, state: State, node: int) -> Parcel:
        """Describe the whole change of the base."""
        return Parcel("work", {"after": -1, "merged": state.facts["merged"]}, with_role("base", state.base))

    def abridge(self, brief: Parcel, state: State, node: int) -> Parcel:
        """Send in its place the stacks that the node lacks, unless they are more than the change or gone."""
        seen, merged = state.facts["seen"][node], state.facts["merged"]
        roles = [f"stack.{number}" for number in range(seen + 1, merged + 1)]
        stacks = {role: group(state.server, role) for role in roles}
        if not all(stacks.values()):
            return brief
        tensors = {name: value for role in roles for name, value in with_role(role, stacks[role]).items()}
        return Parcel(brief.kind, {**brief.header, "after": seen}, tensors)

    def adopt(self, brief: Parcel, party: Party) -> Trainable:
        """Bring the party's base up to date and put an adapter that changes nothing on it."""
        trainable = party.trainable()
        self._merge(brief, party, trainable)
        fresh = trainable.initial(party.seed)
        trainable.load({**fresh, **{name: torch.zeros_like(value) for name, value in factors_b(fresh).items()}})
        return Moved(trainable, group(party.personal, "moved"))

    def expects(self, brief: Parcel) -> None:
        """Names and shapes follow from the state, where ``inspect`` checks them."""

    def inspect(self, state: State, node: int, answer: Parcel) -> None:
        """Refuse factors that are not of the node's rank, and a merger that has not happened."""
        rank = rank_of(self.recipe, node) or 1
        expected: dict[str, tuple[int, ...]] = {}
        for path, (inputs, outputs, _) in state.facts["shapes"].items():
            expected |= {f"{path}.lora_A": (rank, inputs), f"{path}.lora_B": (outputs, rank)}
        check_shapes(group(answer.tensors, "update"), expected)
        merged = answer.header.get("merged")
        if type(merged) is not int or not 0 <= merged <= state.facts["merged"]:
            raise ParcelError(f"the report 'merged' is {str(merged)[:40]!r}; at most {state.facts['merged']} are there")

    def work(self, brief: Parcel, party: Party) -> Parcel:
        """Train a fresh adapter over the party's base and send it whole."""
        trainable = self.adopt(brief, party)
        result = party.train(trainable)
        answer = party.answer(result.loss, trainable.state())
        return Parcel(answer.kind, {**answer.header, "merged": brief.header["merged"]}, answer.tensors)

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        """Stack the answers by node, weighted on A."""
        ordered = sorted(answers, key=lambda answer: answer.node)
        total = sum(answer.weight for answer in ordered)
        states = [(answer.weight / total, answer.tensors()) for answer in ordered]
        stack: Tensors = {}
        for path in state.facts["shapes"]:
            stack[f"{path}.lora_A"] = torch.cat([weight * own[f"{path}.lora_A"] for weight, own in states])
            stack[f"{path}.lora_B"] = torch.cat([own[f"{path}.lora_B"] for _, own in states], dim=1)
        return Outcome(shared=stack, facts={str(answer.node): answer.parcel.header["merged"] for answer in ordered})

    def step(self, state: State, outcome: Outcome) -> State:
        """Add the stack to the base's change and keep it for as long as it is cheaper to send than the change."""
        merged = state.facts["merged"] + 1
        seen = list(state.facts["seen"])
        for node, number in outcome.facts.items():
            seen[int(node)] = number
        base = add(state.base, self._dense(outcome.shared, state.facts["shapes"]))
        server = {**state.server, **with_role(f"stack.{merged}", outcome.shared)}
        room = sum(delta.numel() for delta in base.values())
        for number in range(merged, 0, -1):
            room -= sum(tensor.numel() for tensor in group(server, f"stack.{number}").values())
            if number <= min(seen) or room < 0:
                server = {name: value for name, value in server.items() if not name.startswith(f"stack.{number}/")}
        return state.but(base=base, server=server, facts={**state.facts, "merged": merged, "seen": seen})

    def _dense(self, stack: Tensors, shapes: dict[str, Any]) -> Tensors:
        # The same operations as the parties' own merger, so that both sums agree.
        scaling = self.recipe.trainable.scaling
        products = {path: scaling * (stack[f"{path}.lora_B"] @ stack[f"{path}.lora_A"]) for path in shapes}
        return {
            f"{path}.weight": product.T.contiguous() if shapes[path][2] else product
            for path, product in products.items()
        }

    @staticmethod
    def _merge(brief: Parcel, party: Party, trainable: Trainable) -> None:
        after, last = int(brief.header["after"]), int(brief.header["merged"])
        change = group(party.personal, "moved")
        have = int(party.personal["merged"]) if change else 0
        if after < 0:
            change, have = group(brief.tensors, "base"), last
        if have < after:
            raise ParcelError(f"this party has merged {have} stacks and is told those after {after}: its home was lost")
        for number in range(have + 1, last + 1):
            delta = trainable.delta_weight(group(brief.tensors, f"stack.{number}"))
            change = add(change, delta) if change else delta
        if change:
            party.personal |= {**with_role("moved", change), "merged": torch.tensor(max(have, last))}


def claim(lab: Laboratory) -> Measured:
    """Stacking ranks 1 to 32 loses nothing where padding with zeros does, and the loss is lower, on two seeds."""
    mixed: dict[str, Any] = {"trainable.rank": RANKS, "rounds.evaluate_every": 100}
    names = ("flora_stacking", "fedavg")
    errors = {name: max(aggregation_errors(lab.world(lab.recipe(name, mixed)), 2)) for name in names}
    gains = []
    for seed in (1, 2):
        stacked, padded = (lab.run(lab.recipe(name, {**mixed, "seed": seed})).loss() for name in names)
        gains.append(padded - stacked)
    text = ", ".join(f"{gain:.3f}" for gain in gains)
    return Measured(
        f"aggregation error {errors['flora_stacking']:.1e} against {errors['fedavg']:.2f} with zero-padding; loss "
        f"lower than zero-padding's by {text} nats (seeds 1, 2)",
        errors["flora_stacking"] < 1e-5 < 1e-2 < errors["fedavg"] and min(gains) > 0,
        {"error": errors["flora_stacking"], "padding_error": errors["fedavg"], "least_gain": min(gains)},
    )
