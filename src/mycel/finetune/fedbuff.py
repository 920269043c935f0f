"""FedBuff: nobody waits for the slowest; whenever K changes have arrived, they are applied and stale ones shortened.

Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation". The buffer is the recipe's
``rounds.pace = "buffered(K)"``, its exponent the recipe's ``rounds.staleness`` (1/2 in the paper).

    party k:      trains from w_t, whatever version is the newest when it is asked; d_k = w_k - w_t
    coordinator:  at version s with K changes:  w_{s+1} = w_s + server_rate / K * sum_k (1 + s - t_k)^-exponent d_k

A stale change is shortened, not merely weighed less than fresher ones as in federated averaging under the same pace,
and parties count alike. Under the synchronous pace nothing is stale, and the rule is federated averaging with equal
weights. A party whose change waits in the buffer is asked anew when the buffer is emptied; the paper puts another
client in its place at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mycel.finetune.fedavg import FedAvg
from mycel.rounds.laboratory import Measured, Trail
from mycel.rounds.system import Answer, Outcome, State
from mycel.wire.algebra import add, discount

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory


class FedBuff(FedAvg):
    """Buffered asynchronous aggregation."""

    paces = ("buffered", "synchronous")

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        """Add up the changes, each shortened by its staleness, over their number."""
        total = {name: torch.zeros_like(tensor) for name, tensor in state.shared.items()}
        for answer in answers:
            share = discount(answer.staleness, self.recipe.rounds.staleness) / len(answers)
            total = add(total, self.padded(answer.tensors(), state.shared), share)
        return Outcome(shared=total)


def claim(lab: Laboratory) -> Measured:
    """The loss that synchronous FedAvg ends with is reached in less virtual time on a fleet of unequal devices."""
    changes = {"fleet.devices": "unequal", "data.held_out": 12, "rounds.evaluate_every": 100}
    waiting = lab.run(lab.recipe("fedavg", {**changes, "rounds.count": 3}), watch=(slow := Trail()))
    buffered = {**changes, "rounds.pace": "buffered(3)", "rounds.count": 12}
    buffering = lab.run(lab.recipe("fedbuff", buffered), watch=(fast := Trail()))
    target = lab.mixture(waiting)
    for version, (moment, state) in enumerate(zip(fast.moments, fast.states, strict=True)):
        if version and lab.mixture(buffering, state) <= target:
            gain = slow.moments[-1] / moment
            return Measured(
                f"loss {target:.4f} after {moment:.2f} s and {version} buffers of 3, where 3 synchronous rounds take "
                f"{slow.moments[-1]:.2f} s: {gain:.1f} times sooner",
                gain > 1,
                {"speed_up": gain, "seconds": moment, "seconds_synchronous": slow.moments[-1]},
            )
    return Measured(f"loss {target:.4f} of 3 synchronous rounds was not reached in 12 buffers of 3", False)
