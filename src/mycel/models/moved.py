"""A trainable over a base that has moved: ``W + D`` with the trainable on top.

The base itself stays as it was opened, so parties whose bases have moved differently share one copy of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from mycel.models.base import save_model, shifted
from mycel.models.layers import weight_sites
from mycel.models.trainable import State, Trainable


class Moved(Trainable):
    """``above`` over the base plus ``change``.

    Parameters
    ----------
    above : Trainable
        What is trained.
    change : mapping of str to Tensor
        Dense change by the name of the base weight, as ``Trainable.delta_weight`` returns it.
    """

    kind = "moved"

    def __init__(self, above: Trainable, change: Mapping[str, Tensor]) -> None:
        super().__init__(above.base)
        self.above, self.change = above, dict(change)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the live parameters of what is trained."""
        return self.above.parameters()

    def initial(self, seed: int) -> State:
        """Return the state that what is trained starts from."""
        return self.above.initial(seed)

    def delta_weight(self, state: Mapping[str, Tensor]) -> State:
        """Return the base's change and what ``state`` adds to it."""
        total = dict(self.change)
        for name, delta in self.above.delta_weight(state).items():
            total[name] = total[name] + delta if name in total else delta
        return total

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add both into the base's weights for good."""
        sites = weight_sites(self.base.model)
        with torch.no_grad():
            for name, delta in self.delta_weight(state).items():
                module, leaf = sites[name][0]
                module.get_parameter(leaf).add_(delta)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Compute with the moved base and what is trained inside the block."""
        with shifted(self.base, self.change), self.above.active():
            yield

    def save(self, folder: Path) -> None:
        """Write the whole model with both changes merged, in Hugging Face's format."""
        with shifted(self.base, self.delta_weight(self.state())):
            save_model(self.base, folder)
