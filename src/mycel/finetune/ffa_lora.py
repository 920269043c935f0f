"""FFA-LoRA: the down-projection A stays at its random start, only B is trained and travels.

Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning" (catalogue number 94).

Averaging both factors of LoRA makes cross terms: ``mean(B) mean(A)`` is not ``mean(B A)``. With one A for everyone the
change is linear in what is trained, so the average is exact, half as much travels, and noise that is added to B
for privacy enters the change linearly, where noise on both factors has a product term.

    begin:        A drawn from a seed that all share, B = 0
    party k:      d_k = B_k - B after local training of B alone
    coordinator:  B <- B + server_rate * sum_k p_k d_k      =>  B A = sum_k p_k B_k A   (server_rate = 1)

A does not travel: each party draws it from the recipe's seed and keeps the leading rows of its rank. Only where a run
starts from a given state is A sent along. Knobs are those of federated averaging.

Parties of unlike ranks are not in the paper; here they train the leading columns of B. The average of the changes stays
exact, though a party of low rank computes with fewer columns than the common model has.
The paper's private training (per-example clipping, Gaussian noise, an accountant) is no part of this file; the claim
measures only how noise on what travels grows in the effective change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mycel.finetune.fedavg import FedAvg
from mycel.recipe.schema import Recipe
from mycel.rounds.effective import aggregation_errors
from mycel.rounds.factors import factors_a, factors_b, require_lora
from mycel.rounds.laboratory import Measured
from mycel.rounds.party import rank_of
from mycel.rounds.system import State
from mycel.wire.algebra import group, norm, resize_rank, seed_of, subtract, with_role
from mycel.wire.parcel import Parcel, Tensors

if TYPE_CHECKING:
    from mycel.models.trainable import Trainable
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.party import Party
    from mycel.rounds.world import World


class FfaLora(FedAvg):
    """Federated averaging of B over a frozen A that all share."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        require_lora(recipe)

    def begin(self, world: World) -> State:
        """Share B; note A, and whether the parties can draw it themselves."""
        start = world.starting_state()
        return State(shared=factors_b(start), server=factors_a(start), facts={"drawn": world.start is None})

    def brief(self, state: State, node: int) -> Parcel:
        """Describe both factors."""
        return Parcel("work", {}, with_role("shared", self.cut({**state.shared, **state.server}, node)))

    def abridge(self, brief: Parcel, state: State, node: int) -> Parcel:
        """Leave out an A that the party draws itself."""
        if not state.facts["drawn"]:
            return brief
        return Parcel(brief.kind, brief.header, factors_b(brief.tensors))

    def adopt(self, brief: Parcel, party: Party) -> Trainable:
        """Load B beside the A of everyone."""
        shared, trainable = group(brief.tensors, "shared"), party.trainable()
        if not factors_a(shared):
            # One draw at the largest rank, for the order of draws within it depends on the rank.
            whole = party.initial(party.trainable(rank_of(self.recipe, -1)))
            shared |= self.cut(factors_a(whole), party.node)
        trainable.load(shared)
        return trainable

    def expects(self, brief: Parcel) -> dict[str, tuple[int, ...]]:
        """Only B answers."""
        return {name: tuple(tensor.shape) for name, tensor in factors_b(group(brief.tensors, "shared")).items()}

    def work(self, brief: Parcel, party: Party) -> Parcel:
        """Train B and send its change."""
        trainable = self.adopt(brief, party)
        before = factors_b(group(brief.tensors, "shared"))
        result = party.train(trainable, only=before.keys())
        return party.answer(result.loss, subtract(factors_b(trainable.state()), before))

    @staticmethod
    def padded(update: Tensors, shared: Tensors) -> Tensors:
        """Return ``update`` at the rank of the shared B."""
        return resize_rank(update, next(iter(shared.values())).shape[1])


def noise_growth(lab: Laboratory, system: str) -> float:
    """By how much the effective change's noise grows when noise of twice the size is put on what travels.

    2 where noise enters linearly; up to 4 where the product of two noises counts.
    """
    world = lab.world(lab.recipe(system))
    trainable, start = world.trainable(), world.starting_state()
    plain = trainable.delta_weight(start)
    sizes = []
    for size in (1.0, 2.0):
        source = torch.Generator().manual_seed(seed_of("noise"))
        noise = {name: torch.randn(value.shape, generator=source) for name, value in sorted(start.items())}
        travels = noise if system == "fedavg" else factors_b(noise)
        noisy = {name: value + size * travels[name] if name in travels else value for name, value in start.items()}
        sizes.append(norm(subtract(trainable.delta_weight(noisy), plain)))
    return sizes[1] / sizes[0]


def claim(lab: Laboratory) -> Measured:
    """No aggregation error, half the upload, noise that enters linearly; the final loss beside plain averaging's."""
    errors = {name: max(aggregation_errors(lab.world(lab.recipe(name)), 2)) for name in ("ffa_lora", "fedavg")}
    ours, plain = lab.run(lab.recipe("ffa_lora")), lab.run(lab.recipe("fedavg"))
    upload = ours.meter.total("up", purpose="work") / plain.meter.total("up", purpose="work")
    growth = {name: noise_growth(lab, name) for name in errors}
    figures = {
        "error": errors["ffa_lora"],
        "plain_error": errors["fedavg"],
        "upload": upload,
        "noise_growth": growth["ffa_lora"],
        "plain_noise_growth": growth["fedavg"],
        "loss": ours.loss(),
        "plain_loss": plain.loss(),
    }
    exact = errors["ffa_lora"] < 1e-5 < 1e-2 < errors["fedavg"]
    linear = abs(growth["ffa_lora"] - 2) < 1e-3 < growth["fedavg"] - 2
    return Measured(
        f"aggregation error {errors['ffa_lora']:.1e} against {errors['fedavg']:.2f} for plain averaging, with "
        f"{upload:.0%} of its upload; doubled noise doubles in the change ({growth['ffa_lora']:.2f}, plain "
        f"{growth['fedavg']:.2f}); loss {ours.loss():.3f}, plain {plain.loss():.3f}",
        exact and linear and upload < 0.6,
        figures,
    )
