"""Sparse tuning whose trained entries are few, with frozen layers computed elsewhere under one-time pads.

Huang et al. 2024, "Secure Distributed Training of Large Language Models" (catalogue number 28; title and rule of
sparsification as third parties report them).

    trained:    of each query, key and value matrix, and of each up-projection, the ``share`` of rows with the largest
                L1 norm; everything else stays frozen, to the bit
    computed:   in an enclave what is trained and what is not linear; frozen linear layers elsewhere, on X + R
    sent:       updates leave an enclave only for another one whose measurement is known

Rounds, rows and averaging are this file; pads are `mycel.guard.pad`, the enclave (simulated) is `mycel.guard.enclave`.
The paper selects heads of query, key and value and adds LoRA at the attention's output, which is left out: rows are the
heads' own unit. With ``share = 1`` and all parts this is full tuning of those matrices.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mycel.errors import ParcelError, RecipeError
from mycel.finetune.fedavg import FedAvg, FedAvgKnobs
from mycel.guard.enclave import Platform, Program, Visitor
from mycel.guard.pad import PaddedLinear, Whole, product, to_ring
from mycel.recipe.schema import Recipe
from mycel.rounds.laboratory import Measured
from mycel.wire.algebra import group, subtract
from mycel.wire.parcel import Parcel, Tensors

if TYPE_CHECKING:
    from typing import Any

    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.party import Party

PARTS = ("q_proj", "k_proj", "v_proj", "up_proj", "c_attn", "c_fc")


class SparseKnobs(FedAvgKnobs):
    """Settings of the selection."""

    share: float = Field(0.5, gt=0, le=1, description="share of rows trained in each chosen matrix")


class EnclaveSparse(FedAvg):
    """Federated averaging of chosen rows."""

    Knobs = SparseKnobs

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        if recipe.trainable.kind != "full":
            raise RecipeError(
                f"trainable.kind is {recipe.trainable.kind!r}, and the system {recipe.system!r} trains rows of the "
                "base's own matrices: set trainable.kind = 'full'"
            )

    def work(self, brief: Parcel, party: Party) -> Parcel:
        """Train the chosen rows and send the change, which is zero elsewhere."""
        trainable, start = self.adopt(brief, party), group(brief.tensors, "shared")
        masks = self.masks(party.initial(trainable))  # of the base: what was chosen stays chosen
        trainable.mask(masks)
        try:
            result = party.train(trainable, only=masks.keys())
        finally:
            trainable.mask(None)
        change = subtract(trainable.state(), start)
        # Weight decay moves what has no gradient; what was not chosen stays what it was.
        return party.answer(
            result.loss,
            {name: value * masks[name] if name in masks else torch.zeros_like(value) for name, value in change.items()},
        )

    def masks(self, state: Tensors) -> Tensors:
        """1 for the rows of largest L1 norm in each chosen matrix."""
        return {
            name: _rows(value, self.knobs.share)
            for name, value in state.items()
            if value.ndim == 2 and any(part in name for part in PARTS)
        }


def _rows(matrix: Tensor, share: float) -> Tensor:
    norms = matrix.abs().sum(1)
    mask = torch.zeros_like(matrix)
    mask[norms.argsort(descending=True, stable=True)[: max(round(share * len(norms)), 1)]] = 1.0
    return mask


def gather(memory: dict[str, Any], argument: Parcel) -> Parcel:
    """Inside the server's enclave: add an update up."""
    memory.setdefault("updates", []).append(argument.tensors)
    return Parcel("done")


def average(memory: dict[str, Any], argument: Parcel) -> Parcel:
    """Inside the server's enclave: hand the mean out, and forget what made it."""
    updates = memory.pop("updates", [])
    if len(updates) < 2:
        raise ParcelError(f"{len(updates)} updates are there: their mean would hide nobody")
    names = sorted(updates[0])
    return Parcel("mean", {}, {name: torch.stack([update[name] for update in updates]).mean(0) for name in names})


def claim(lab: Laboratory) -> Measured:
    """Pads exact and opaque, a strange program refused, sums made inside equal those outside, rows beside LoRA."""
    changes = {"rounds.count": 3, "rounds.evaluate_every": 3, "rounds.local_steps": 5}
    full = {**changes, "trainable.kind": "full", "training.learning_rate": 5e-3}
    rows, lora = lab.run(lab.recipe("enclave_sparse", full)), lab.run(lab.recipe("fedavg", changes))
    system = rows.system
    assert isinstance(system, EnclaveSparse)
    start = rows.world.starting_state()
    masks = system.masks(start)
    still = all(
        torch.equal(value[masks[name] == 0], start[name][masks[name] == 0])
        if name in masks
        else torch.equal(value, start[name])
        for name, value in rows.state.shared.items()
    )
    trained = sum(float(mask.sum()) for mask in masks.values()) / sum(value.numel() for value in start.values())
    exact, leak, overhead = _padded(start)
    inside, refused = _inside()
    return Measured(
        f"padded layer {'exact' if exact else 'not exact'} in fixed point, correlation of what is sent with the input "
        f"{leak:+.3f}, {overhead:.1f} times the plain layer's time with pads made beforehand; sum inside the simulated "
        f"enclave {'equals' if inside else 'differs from'} the plain one, another program is "
        f"{'refused' if refused else 'let in'}; {trained:.0%} of entries trained, others "
        f"{'unchanged to the bit' if still else 'changed'}, loss {rows.loss():.3f}, LoRA alone {lora.loss():.3f}",
        exact and abs(leak) < 0.05 and inside and refused and still and rows.loss() < lora.loss(),
        {"leak": leak, "overhead": overhead, "trained": trained, "loss": rows.loss(), "lora_loss": lora.loss()},
    )


def _padded(state: Tensors) -> tuple[bool, float, float]:
    weight = next(value for name, value in sorted(state.items()) if "up_proj" in name or "c_fc" in name).numpy()
    inputs = np.random.default_rng(3).normal(size=(64, weight.shape[1])).astype(np.float32)
    seen: list[Whole] = []
    ring = to_ring(weight)

    def elsewhere(sent: Whole) -> Whole:
        seen.append(sent)
        return product(sent, ring)

    layer = PaddedLinear(weight, elsewhere)
    layer.prepare(64, 4)
    begun = time.perf_counter()
    found = [layer(inputs) for _ in range(4)]
    padded = time.perf_counter() - begun
    begun = time.perf_counter()
    plain = [product(to_ring(inputs), ring) for _ in range(4)]
    bare = time.perf_counter() - begun
    exact = all(
        np.array_equal(one, (other.view(np.int64) / 2.0**32).astype(np.float32))
        for one, other in zip(found, plain, strict=True)
    )
    leak = float(np.corrcoef(seen[0].view(np.int64).ravel() / 2.0**63, inputs.ravel())[0, 1])
    return exact, leak, padded / bare


def _inside() -> tuple[bool, bool]:
    program = Program({"gather": gather, "average": average}, {"least": 2})
    other = Program({"gather": gather, "average": average}, {"least": 1})
    platform = Platform()
    enclave = platform.start(program)
    try:
        updates = [{"update": torch.randn(50, generator=torch.Generator().manual_seed(seed))} for seed in (1, 2, 3)]
        for update in updates:
            Visitor(enclave, platform.public, [program.measurement()]).call("gather", Parcel("call", {}, update))
        found = Visitor(enclave, platform.public, [program.measurement()]).call("average").tensors["update"]
        inside = torch.equal(found, torch.stack([update["update"] for update in updates]).mean(0))
        try:
            Visitor(enclave, platform.public, [other.measurement()])
        except ParcelError:
            return inside, True
        return inside, False
    finally:
        enclave.close()
