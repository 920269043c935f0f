"""Low-rank adapters: a frozen weight W computes as W + s B A, and only A and B are trained.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. The layers are PEFT's; the scaling
s = alpha / rank is the same at every rank, so that parties of different ranks make changes of one size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mycel.errors import ModelError
from mycel.models.adapter import read_adapter, write_adapter
from mycel.models.base import Base
from mycel.models.layers import features, linear_layers
from mycel.models.trainable import State, Trainable, check_finite, check_state

PREFIX = "base_model.model."
# Settings of a stored adapter that change what it computes beyond s B A.
UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "trainable_token_indices")


class Lora(Trainable):
    """LoRA at one rank over chosen linear layers.

    The state holds ``<module path>.lora_A`` of shape (rank, inputs) and ``<module path>.lora_B`` of shape
    (outputs, rank). PEFT's layers exist once per trainable and stand in the model only while it is active, so any
    number of ranks live over one base.

    Parameters
    ----------
    base : Base
        The opened base.
    rank : int
        Rank of every adapter.
    scaling : float
        alpha / rank.
    targets : sequence of str
        Module names; empty: every linear layer of the blocks.
    """

    kind = "lora"

    def __init__(self, base: Base, rank: int, scaling: float, targets: Sequence[str] = ()) -> None:
        super().__init__(base)
        self.rank, self.scaling = rank, scaling
        self._plain = linear_layers(base.model, targets)
        # Kept by object, so that merging reaches the base's own weights also while others stand in their place.
        self._weights = {path: layer.get_parameter("weight") for path, layer in self._plain.items()}
        self._check_rank()
        self._sites = {path: _parent(base.model, path) for path in self._plain}
        self._wrapped = self._build()
        self._live: dict[str, nn.Parameter] = {}
        for path, layer in self._wrapped.items():
            self._live[f"{path}.lora_A"] = layer.lora_A["default"].weight
            self._live[f"{path}.lora_B"] = layer.lora_B["default"].weight
        self._start = self._stored() if base.adapter is not None else {}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the live A and B."""
        return dict(self._live)

    def initial(self, seed: int) -> State:
        """Return A Kaiming-uniform from the seed and B zero, or the base's starting adapter at this rank."""
        generator = torch.Generator().manual_seed(seed)
        state: State = {}
        for path, layer in self._plain.items():
            inputs, outputs = features(layer)
            down = torch.empty(self.rank, inputs)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
            state[f"{path}.lora_A"], state[f"{path}.lora_B"] = down, torch.zeros(outputs, self.rank)
        for name, stored in self._start.items():
            # More rows of A with zero columns of B leave the product as it was.
            rows, columns = stored.shape
            state[name][:rows, :columns] = stored
        return state

    def delta_weight(self, state: Mapping[str, Tensor]) -> State:
        """Return ``scaling * B @ A`` per layer; ``state`` may be of any rank, stacked adapters included."""
        self._check_any_rank(state)
        deltas: State = {}
        for path, layer in self._plain.items():
            delta = self.scaling * (state[f"{path}.lora_B"].detach() @ state[f"{path}.lora_A"].detach())
            deltas[f"{path}.weight"] = delta.T.contiguous() if isinstance(layer, Conv1D) else delta
        return deltas

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add ``scaling * B @ A`` into the base's weights for good."""
        deltas = self.delta_weight(state)
        with torch.no_grad():
            for path, weight in self._weights.items():
                weight.add_(deltas[f"{path}.weight"])

    @contextmanager
    def active(self) -> Iterator[None]:
        """Compute with the adapters inside the block."""
        if any(owner._modules[leaf] is not self._plain[path] for path, (owner, leaf) in self._sites.items()):
            raise ModelError("another LoRA is active on this base: leave its block first")
        try:
            for path, (owner, leaf) in self._sites.items():
                owner._modules[leaf] = self._wrapped[path]
            yield
        finally:
            for path, (owner, leaf) in self._sites.items():
                owner._modules[leaf] = self._plain[path]

    def save(self, folder: Path) -> None:
        """Write the live adapter in PEFT's format."""
        config = self._config()
        config.base_model_name_or_path = self.base.name
        config.inference_mode = True
        write_adapter(folder, config, {f"{PREFIX}{name}.weight": tensor for name, tensor in self.state().items()})

    def _config(self) -> Any:
        task = "SEQ_2_SEQ_LM" if self.base.model.config.is_encoder_decoder else "CAUSAL_LM"
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.scaling * self.rank,
            lora_dropout=0.0,
            target_modules=sorted(self._plain),
            fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in self._plain.values()),
            task_type=task,
        )

    def _build(self) -> dict[str, Any]:
        """Let PEFT make its layers in the model, take them, and put the plain layers back."""
        model = self.base.model
        # PEFT draws its starting values from the global generator, which is not ours to move.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set")
            inject_adapter_in_model(self._config(), model)
        del model.peft_config
        wrapped: dict[str, Any] = {}
        for path, (owner, leaf) in self._sites.items():
            wrapped[path] = owner._modules[leaf]
            owner._modules[leaf] = self._plain[path]
        return wrapped

    def _check_rank(self) -> None:
        smallest = min(self._plain, key=lambda path: min(features(self._plain[path])))
        largest = min(features(self._plain[smallest]))
        if not 1 <= self.rank <= largest:
            raise ModelError(
                f"trainable.rank is {self.rank}, and {smallest!r} of {self.base.name!r} is only"
                f" {features(self._plain[smallest])} wide: choose 1 to {largest}"
            )

    def _check_any_rank(self, state: Mapping[str, Tensor]) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        for path, layer in self._plain.items():
            inputs, outputs = features(layer)
            down = state.get(f"{path}.lora_A")
            rank = down.shape[0] if down is not None and down.ndim == 2 else self.rank
            shapes[f"{path}.lora_A"], shapes[f"{path}.lora_B"] = (rank, inputs), (outputs, rank)
        check_state(state, shapes)

    def _stored(self) -> State:
        """Return the base's starting adapter, brought to this trainable's scaling."""
        assert self.base.adapter is not None
        config, tensors = read_adapter(self.base.adapter, "LORA")
        unsupported = [key for key in UNSUPPORTED if config.get(key)]
        if unsupported or config.get("bias", "none") != "none":
            raise ModelError(f"the adapter in {self.base.adapter} uses {unsupported or ['bias']}: plain LoRA is needed")
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1 or not math.isfinite(alpha):
            raise ModelError(f"the adapter in {self.base.adapter} has rank {rank!r} and alpha {alpha!r}: save it again")
        factor = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) / self.scaling
        state: State = {}
        for key, tensor in tensors.items():
            name = key.removeprefix(PREFIX).removesuffix(".weight")
            live = self._live.get(name)
            if live is None or tensor.ndim != 2 or any(a > b for a, b in zip(tensor.shape, live.shape, strict=True)):
                raise ModelError(
                    f"the adapter in {self.base.adapter} (rank {rank}) does not fit at {name[:120]!r}:"
                    f" use its targets and a rank of at least {rank}; trainable.rank is {self.rank}"
                )
            state[name] = tensor * factor if name.endswith("lora_B") else tensor
        check_finite(state)
        return state


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner, _, leaf = path.rpartition(".")
    return model.get_submodule(owner), leaf
