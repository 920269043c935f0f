"""FedAvg over LoRA, eight bits an element, under masks, while three of ten parties leave in the middle of each round.

No paper: the composition is the point. Secure aggregation (Bell et al. 2020, SecAgg+) needs numbers that add up, a
quantising codec usually has none, and parties that leave take their masks along. Here the codec is fixed point with a
step that all know, weights are whole numbers of examples, and the masks live in a ring just wide enough:

    party k:      q_k = n_k round(d_k / step),   sends q_k + masks (mod 2^w)
    coordinator:  w <- w + step * sum_k q_k / sum_k n_k over the parties that stayed, which is all it learns

With everyone staying and a step of nothing this is federated averaging. Knobs are those of federated averaging.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mycel.errors import RecipeError
from mycel.finetune.fedavg import FedAvg
from mycel.recipe.schema import Recipe
from mycel.rounds.hidden_sums import beside_plain_sums
from mycel.rounds.laboratory import Measured

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory

PHASES = ("guard.shares", "work", "guard.reveal")
TEN: dict[str, Any] = {
    "data.parties": "iid",
    "data.count": 10,
    "data.examples": 32,
    "rounds.count": 3,
    "rounds.quorum": 0.6,
    "fleet.devices": "equal",
    "wire.codec": "fixed(8,0.05)",
    "guard.sums": "sparsely-masked",
    "guard.staying": 0.6,
}


class MaskedLora(FedAvg):
    """Federated averaging that refuses to run in the open."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        if recipe.guard.sums == "plain":
            raise RecipeError(
                "guard.sums is 'plain', and the system 'masked_lora' adds up under masks: set it to 'sparsely-masked', "
                "with a codec such as wire.codec = 'fixed(8,0.05)', or take 'fedavg'"
            )


def leaves(node: int, kind: str, version: int) -> bool:
    """Three parties of ten go, each at another phase."""
    return kind in PHASES and node == 2 + 3 * PHASES.index(kind)


def claim(lab: Laboratory) -> Measured:
    """The final model equals that of plain fixed-point sums to the bit, with three of ten leaving in each round."""
    recipe = lab.recipe("masked_lora", TEN)
    finished, answered, equal = beside_plain_sums(lab, recipe, leaves)
    bare = lab.run(recipe.replace({"system": "fedavg", "guard.sums": "plain"}))
    upload = finished.meter.total("up") / bare.meter.total("up")
    return Measured(
        f"{'equal' if equal else 'not equal'} to the bit after {len(answered)} rounds in which "
        f"{sorted(len(nodes) for nodes in answered)} of 10 inputs arrived and one more party left before unmasking; "
        f"upload {upload:.2f} times that of the 8-bit codec in the open; loss {finished.loss():.3f}, in the open and "
        f"with all parties {bare.loss():.3f}",
        equal and len(answered) == 3 and all(len(nodes) == 8 for nodes in answered),
        {"equal": float(equal), "upload": upload, "loss": finished.loss(), "open_loss": bare.loss()},
    )
