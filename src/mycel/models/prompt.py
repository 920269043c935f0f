"""Soft prompts: a few free embeddings before every input are trained, and nothing else.

Source: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021. The prompt enters by hooks on
the model, so ``model(input_ids, attention_mask, labels)`` and ``generate`` are called as without it, and logits line
up with the input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig
from torch import Tensor, nn

from mycel.errors import ModelError
from mycel.models.adapter import read_adapter, write_adapter
from mycel.models.base import Base
from mycel.models.trainable import State, Trainable, check_state

NAME = "prompt"
STORED_NAME = "prompt_embeddings"
IGNORED_LABEL = -100


class Prompt(Trainable):
    """A soft prompt of ``length`` embeddings; the state is ``prompt`` of shape (length, hidden).

    An encoder-decoder model gets it before the encoder's input.
    """

    kind = "prompt"

    def __init__(self, base: Base, length: int) -> None:
        super().__init__(base)
        self.length = length
        context = getattr(base.model.config, "max_position_embeddings", None)
        if context is not None and length >= context:
            raise ModelError(f"trainable.length is {length}, and {base.name!r} sees {context} tokens: choose far fewer")
        self._hidden = int(self._embed.weight.shape[1])
        self._prompt = nn.Parameter(torch.zeros(length, self._hidden))
        self._start = self._stored() if base.adapter is not None else None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the live prompt."""
        return {NAME: self._prompt}

    def initial(self, seed: int) -> State:
        """Return the embeddings of tokens sampled with the seed, or the base's starting prompt."""
        if self._start is not None:
            return {NAME: self._start.clone()}
        ids = sorted(set(self.base.tokenizer.get_vocab().values()) - set(self.base.tokenizer.all_special_ids))
        drawn = torch.randint(len(ids), (self.length,), generator=torch.Generator().manual_seed(seed))
        return {NAME: self._embed.weight.detach()[torch.tensor(ids)[drawn]].clone()}

    def delta_weight(self, state: Mapping[str, Tensor]) -> State:
        """Return the prompt under its own name: it adds to no weight of the base."""
        check_state(state, {NAME: (self.length, self._hidden)})
        return {NAME: state[NAME].detach().clone()}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Refuse: a prompt is input, and no weight of the base can hold it."""
        raise ModelError("a soft prompt cannot be merged into the base: save it as an adapter instead")

    @contextmanager
    def active(self) -> Iterator[None]:
        """Put the prompt before every input inside the block."""
        model = self.base.model
        if model.config.is_encoder_decoder:
            handles = [
                model.register_forward_pre_hook(self._lengthen_mask, with_kwargs=True),
                model.get_encoder().register_forward_pre_hook(self._prepend, with_kwargs=True),
            ]
        else:
            handles = [
                model.register_forward_pre_hook(self._prepend, with_kwargs=True),
                model.register_forward_hook(self._trim, with_kwargs=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def save(self, folder: Path) -> None:
        """Write the live prompt in PEFT's format."""
        config = self.base.model.config
        stored = PromptTuningConfig(
            task_type="SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM",
            num_virtual_tokens=self.length,
            token_dim=self._hidden,
            num_transformer_submodules=1,
            num_attention_heads=config.num_attention_heads,
            num_layers=config.num_hidden_layers,
            base_model_name_or_path=self.base.name,
            inference_mode=True,
        )
        write_adapter(folder, stored, {STORED_NAME: self._prompt.detach()})

    @property
    def _embed(self) -> Any:
        return self.base.model.get_input_embeddings()

    def _prepend(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """Turn ids into embeddings with the prompt before them; while decoding with a cache, only shift positions."""
        kwargs = {**kwargs, **dict(zip(("input_ids", "attention_mask"), args, strict=False))}
        ids, mask, positions = (kwargs.get(key) for key in ("input_ids", "attention_mask", "position_ids"))
        if ids is None:
            raise ModelError("a soft prompt needs input_ids: inputs_embeds cannot be combined with it")
        cache = kwargs.get("past_key_values")
        begins = cache is None or cache.get_seq_length() == 0
        # An encoder called from within its model gets a mask that already covers the prompt.
        if mask is not None and (not begins or mask.shape[1] == ids.shape[1]):
            kwargs["attention_mask"] = nn.functional.pad(mask, (self.length, 0), value=1)
        if positions is not None:
            front = torch.arange(self.length, device=positions.device).expand(positions.shape[0], -1)
            moved = positions + self.length
            kwargs["position_ids"] = torch.cat([front, moved], dim=1) if begins else moved
        if not begins:
            return (), kwargs
        if kwargs.get("labels") is not None:
            kwargs["labels"] = nn.functional.pad(kwargs["labels"], (self.length, 0), value=IGNORED_LABEL)
        kwargs["input_ids"] = None
        kwargs["inputs_embeds"] = torch.cat([self._prompt.expand(ids.shape[0], -1, -1), self._embed(ids)], dim=1)
        return (), kwargs

    def _trim(self, _: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Drop the prompt's own logits, so that logits line up with the caller's ids."""
        embedded = kwargs.get("inputs_embeds")
        if embedded is not None and output.logits.shape[1] == embedded.shape[1]:
            output.logits = output.logits[:, self.length :]
        return output

    def _lengthen_mask(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Let an encoder-decoder's cross-attention see the prompt."""
        names = ("input_ids", "attention_mask")
        kwargs = {**kwargs, **dict(zip(names, args[:2], strict=False))}
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = nn.functional.pad(kwargs["attention_mask"], (self.length, 0), value=1)
        return (), kwargs

    def _stored(self) -> Tensor:
        assert self.base.adapter is not None
        _, tensors = read_adapter(self.base.adapter, "PROMPT_TUNING")
        stored = tensors.get(STORED_NAME)
        if stored is None or tuple(stored.shape) != (self.length, self._hidden):
            found = "none" if stored is None else str(tuple(stored.shape))
            raise ModelError(
                f"the adapter in {self.base.adapter} holds a prompt of shape {found};"
                f" trainable.length and the base need {(self.length, self._hidden)}"
            )
        return stored.clone()
