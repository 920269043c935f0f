"""Full fine-tuning: every weight of the model is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from mycel.errors import ModelError
from mycel.models.base import Base, save_model
from mycel.models.layers import substituted, weight_sites
from mycel.models.trainable import State, Trainable, check_state


class Full(Trainable):
    """Own copies of the base's weights, put in their places while active.

    The state's names are the base weights' names; tied weights appear once, under their first name.
    """

    kind = "full"

    def __init__(self, base: Base, names: Iterable[str] | None = None) -> None:
        super().__init__(base)
        sites = weight_sites(base.model)
        chosen = list(sites) if names is None else [name for name in names if name in sites]
        self._sites = {name: sites[name] for name in chosen}
        self._originals: dict[str, nn.Parameter] = {}
        for name, places in self._sites.items():
            module, leaf = places[0]
            original = module._parameters[leaf]
            assert original is not None
            self._originals[name] = original
        self._live = {name: nn.Parameter(weight.detach().clone()) for name, weight in self._originals.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the live copies of the base's weights."""
        return dict(self._live)

    def initial(self, seed: int) -> State:
        """Return the base's own values; the seed plays no part."""
        if self.base.adapter is not None:
            raise ModelError(
                f"model.adapter names an adapter, which trainable.kind {self.kind!r} cannot start from:"
                ' merge it into the base first, or set trainable.kind = "lora"'
            )
        return {name: weight.detach().clone() for name, weight in self._originals.items()}

    def delta_weight(self, state: Mapping[str, Tensor]) -> State:
        """Return ``state - base``, weight by weight."""
        self._check(state)
        return {name: state[name].detach() - weight.detach() for name, weight in self._originals.items()}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Make ``state`` the base's weights: base + (state - base), without the rounding."""
        self._check(state)
        with torch.no_grad():
            for name, weight in self._originals.items():
                weight.copy_(state[name])

    def active(self) -> AbstractContextManager[None]:
        """Compute with the live copies inside the block."""
        return substituted(self._sites, self._live)

    def save(self, folder: Path) -> None:
        """Write the whole model with the live weights, in Hugging Face's format."""
        with self.active():
            save_model(self.base, folder)

    def _check(self, state: Mapping[str, Tensor]) -> None:
        check_state(state, {name: tuple(weight.shape) for name, weight in self._originals.items()})
