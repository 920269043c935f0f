"""FLoRA under masks: what the stack comes to is a sum, so it can be added up without anybody seeing a part of it.

No paper: FLoRA (Wang et al. 2024, `mycel.finetune.flora_stacking`) with secure aggregation (Bell et al. 2020).

FLoRA's coordinator stacks what each party sent, which tells it everything about each. Masks over a stack in which every
party fills its own place and leaves the others zero would not help: the sum of such vectors *is* the list of
individuals. What the parties do with the stack is a sum, though, of matrices that have the base's shape at any rank:

    party k:      P_k = s B_k A_k,  q_k = n_k round(P_k / step),   sends q_k + masks (mod 2^w)
    coordinator:  W <- W + step * sum_k q_k / sum_k n_k over the parties that stayed, which is all it learns

What is lost is FLoRA's thrift: a party sends the product and not its factors, and is told the whole change. With one
party this is FLoRA but for the rounding. Ranks may differ from party to party, which no other sum of adapters allows.
No knobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mycel.errors import RecipeError
from mycel.finetune.flora_stacking import FloraStacking
from mycel.finetune.masked_lora import TEN, leaves
from mycel.recipe.schema import Recipe
from mycel.rounds.hidden_sums import beside_plain_sums
from mycel.rounds.laboratory import Measured
from mycel.rounds.system import Answer, Outcome, State
from mycel.wire.algebra import add, group, weighted_mean
from mycel.wire.parcel import Parcel

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.party import Party

RANKS = [1, 2, 4, 8]


class MaskedFlora(FloraStacking):
    """Add products up, broadcast the change, begin anew."""

    reports = ("samples", "loss")
    needs = "sum"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        if recipe.guard.sums == "plain":
            raise RecipeError(
                "guard.sums is 'plain', and the system 'masked_flora' sends whole products so that they can be hidden: "
                "set it to 'sparsely-masked', or take 'flora_stacking', which sends factors"
            )

    def expects(self, brief: Parcel) -> dict[str, tuple[int, ...]]:  # type: ignore[override]
        """Return the shapes of the base's weights."""
        return {name: tuple(tensor.shape) for name, tensor in group(brief.tensors, "base").items()}

    def inspect(self, state: State, node: int, answer: Parcel) -> None:
        """Nothing of one party's can be looked at."""

    def abridge(self, brief: Parcel, state: State, node: int) -> Parcel:
        """Send the whole change: there are no stacks to catch up by."""
        return brief

    def work(self, brief: Parcel, party: Party) -> Parcel:
        """Train a fresh adapter over the party's base and send what it comes to."""
        trainable = self.adopt(brief, party)
        result = party.train(trainable)
        return party.answer(result.loss, party.trainable().delta_weight(trainable.state()))

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        """Average the products by sample count."""
        products = (answer.tensors() for answer in answers)
        return Outcome(base=weighted_mean(products, [answer.weight for answer in answers]))

    def step(self, state: State, outcome: Outcome) -> State:
        """Add the mean to the base's change."""
        return state.but(base=add(state.base, outcome.base), facts={**state.facts, "merged": state.facts["merged"] + 1})


def claim(lab: Laboratory) -> Measured:
    """The final base equals that of plain fixed-point sums to the bit, with unlike ranks and three of ten leaving."""
    mixed: dict[str, Any] = {**TEN, "trainable.rank": RANKS}
    recipe = lab.recipe("masked_flora", mixed)
    finished, answered, equal = beside_plain_sums(lab, recipe, leaves)
    stacked = lab.run(lab.recipe("flora_stacking", {**mixed, "guard.sums": "plain"}))
    upload = finished.meter.total("up") / stacked.meter.total("up")
    return Measured(
        f"{'equal' if equal else 'not equal'} to the bit after {len(answered)} rounds of parties of ranks 1 to 8, in "
        f"which {sorted(len(nodes) for nodes in answered)} of 10 inputs arrived and one more party left before "
        f"unmasking; upload {upload:.1f} times that of stacking in the open; loss {finished.loss():.3f}, stacked with "
        f"all parties {stacked.loss():.3f}",
        equal and len(answered) == 3 and all(len(nodes) == 8 for nodes in answered),
        {"equal": float(equal), "upload": upload, "loss": finished.loss(), "stacked_loss": stacked.loss()},
    )
