"""A transformers decoder as embedding, blocks and head, each of which may live on another machine.

No model code is rewritten: a part is run by the family's own ``forward``, in which what lives elsewhere is replaced by
stand-ins that pass their input on. So masks, positions, caches, sliding windows, scaled embeddings and capped logits
are whatever the family makes of them, and the parts together compute what the whole model computes, to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from mycel.errors import ModelError
from mycel.models.anatomy import Anatomy, anatomy, skeleton, stubbed
from mycel.models.shards import Shards
from mycel.models.standins import Elsewhere, Entry, Given, Passing, ShiftedCache, stand_in


class Cut:
    """The parts of a decoder that this process holds.

    Attributes
    ----------
    config : PreTrainedConfig
        Of the whole model.
    depth : int
        Number of blocks of the whole model.
    first, last : int
        The blocks held here: ``first <= index < last``.
    model : PreTrainedModel
        The family's own model; blocks held elsewhere are missing from it.
    """

    def __init__(
        self, model: PreTrainedModel, parts: Anatomy, first: int, last: int, embed: bool = True, head: bool = True
    ) -> None:
        if not 0 <= first <= last <= parts.depth:
            raise ModelError(f"blocks {first} to {last} are asked for and the model has blocks 0 to {parts.depth}")
        self.model, self.parts, self.config = model, parts, model.config
        self.depth, self.first, self.last = parts.depth, first, last
        self.has_embed, self.has_head = embed, head
        self._core: Any = model.get_submodule(parts.backbone)
        self._views: dict[tuple[int, int], Any] = {}
        tail = {name: Passing() for name in parts.after}
        front = {name: stand_in(self._core.get_submodule(name)) for name in parts.before}
        self._ends = {**front, **tail}
        self._embedding = self._view(self._core, {**tail, parts.blocks: nn.ModuleList()}, 0, 0) if embed else None
        self._given = Given(parts.tuples, self._core.get_submodule(parts.blocks)[parts.depth - 1])
        self._heading = self._head_view(front) if head else None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Cut:
        """Return all parts of a model that is open already; weights are shared with it."""
        parts = anatomy(model.config)
        return cls(model, parts, 0, parts.depth)

    @classmethod
    def open(
        cls,
        folder: Path,
        first: int = 0,
        last: int | None = None,
        embed: bool = True,
        head: bool = True,
        dtype: torch.dtype = torch.float32,
        mapped: bool = False,
    ) -> Cut:
        """Read the wanted parts of a model from a folder in Hugging Face's format, and nothing else of it.

        ``mapped`` leaves the weights in their file, from which pages are read as they are used.

        Raises
        ------
        ModelError
            When the folder holds no decoder, lacks wanted weights, or the range is none of its blocks.
        """
        config = read_config(folder)
        parts = anatomy(config)
        last = parts.depth if last is None else last
        if not 0 <= first <= last <= parts.depth:
            raise ModelError(f"blocks {first} to {last} are asked for and the model has blocks 0 to {parts.depth}")
        model = skeleton(config)
        shards = Shards.of(folder)
        sources = shards.sources(model)
        blocks: Any = model.get_submodule(f"{parts.backbone}.{parts.blocks}")
        for index in range(parts.depth):
            if not first <= index < last:
                blocks[index] = Elsewhere(blocks[index])
        wanted = parts.end_weights(embed, head)
        wanted += [name for index in range(first, last) for name in parts.block_weights(index)]
        named = {name: source_of(sources, parts, name, folder) for name in wanted}
        fill(model, parts, shards, named, dtype, mapped)
        return cls(model, parts, first, last, embed, head)

    def embed(self, ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """Return the hidden state ``[batch, tokens, width]`` before block 0."""
        if self._embedding is None:
            raise ModelError("the embedding lives elsewhere: open this cut with embed=True")
        hidden: Tensor = self._embedding(
            input_ids=ids_BT, use_cache=False, **_positions(ids_BT, positions_BT, 0)
        ).last_hidden_state
        return hidden

    def run(
        self,
        hidden_BTD: Tensor,
        first: int | None = None,
        last: int | None = None,
        cache: Cache | None = None,
        positions_BT: Tensor | None = None,
        mask_BS: Tensor | None = None,
        **passed: Any,
    ) -> Tensor:
        """Run blocks ``first <= index < last`` on a hidden state.

        Parameters
        ----------
        hidden_BTD : Tensor
            ``[batch, tokens, width]``.
        first, last : int, optional
            Among the blocks held here; by default all of them.
        cache : Cache, optional
            Keys and values of these very blocks, numbered from 0 (``new_cache``); it is updated.
        positions_BT : Tensor, optional
            Places of the tokens; by default those that follow what the cache holds.
        mask_BS : Tensor, optional
            1 for tokens, 0 for padding, over what the cache holds and the new tokens; or a 4D mask of the family's.
        **passed
            Handed on to the family's attention.
        """
        first, last = self.first if first is None else first, self.last if last is None else last
        if first == last:
            return hidden_BTD
        view = self._blocks(first, last)
        view.entry.hidden = hidden_BTD
        past = cache.get_seq_length() if cache is not None else 0
        try:
            hidden: Tensor = view(
                inputs_embeds=hidden_BTD,
                attention_mask=mask_BS,
                past_key_values=cache if cache is None or first == 0 else ShiftedCache(cache, first),
                use_cache=cache is not None,
                **_positions(hidden_BTD, positions_BT, past),
                **passed,
            ).last_hidden_state
        finally:
            view.entry.hidden = None
        return hidden

    def head(self, hidden_BTD: Tensor) -> Tensor:
        """Return the logits ``[batch, tokens, vocabulary]`` of the hidden state after the last block."""
        if self._heading is None:
            raise ModelError("the head lives elsewhere: open this cut with head=True")
        if not hidden_BTD.shape[1]:  # a batch of unfinished prompts, of which nothing is wanted yet
            return hidden_BTD.new_empty(len(hidden_BTD), 0, int(self.config.vocab_size))
        self._given.hidden = hidden_BTD
        try:
            logits: Tensor = self._heading(
                inputs_embeds=hidden_BTD, use_cache=False, **_positions(hidden_BTD, None, 0)
            ).logits
        finally:
            self._given.hidden = None
        return logits

    def new_cache(self, first: int | None = None, last: int | None = None) -> DynamicCache:
        """Return an empty cache for a range of blocks, with the family's sliding windows."""
        return DynamicCache(
            config=_sliced(self.config, self.first if first is None else first, self.last if last is None else last)
        )

    def block(self, index: int) -> nn.Module:
        """Return the module of a block that is held here."""
        if not self.first <= index < self.last:
            raise ModelError(f"block {index} lives elsewhere; blocks {self.first} to {self.last - 1} are here")
        found: nn.Module = self._core.get_submodule(self.parts.blocks)[index]
        return found

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights that are held here."""
        yield from (parameter for parameter in self.model.parameters() if not parameter.is_meta)

    def _blocks(self, first: int, last: int) -> Any:
        if (first, last) not in self._views:
            if not self.first <= first < last <= self.last:
                raise ModelError(f"blocks {first} to {last} are asked for; {self.first} to {self.last} are held here")
            held = [self.block(index) for index in range(first, last)]
            entry = Entry(held[0])
            chain = nn.ModuleList([entry, *held[1:]])
            view = self._view(self._core, {**self._ends, self.parts.blocks: chain}, first, last)
            view.__dict__["entry"] = entry
            self._views[first, last] = view
        return self._views[first, last]

    def _view(self, core: Any, replacements: dict[str, nn.Module], first: int, last: int) -> Any:
        view = stubbed(core, "", replacements)
        view.config = _sliced(self.config, first, last)
        return view

    def _head_view(self, front: dict[str, nn.Module]) -> Any:
        chain = nn.ModuleList([self._given])
        view = stubbed(self.model, self.parts.backbone, {**front, self.parts.blocks: chain})
        view.get_submodule(self.parts.backbone).config = _sliced(self.config, self.depth - 1, self.depth)
        return view


def read_config(folder: Path) -> PreTrainedConfig:
    """Return a folder's configuration; ``ModelError`` when there is none that transformers knows."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder} has no readable config.json: {str(error)[:200]}") from error
    return config


def _sliced(config: PreTrainedConfig, first: int, last: int) -> PreTrainedConfig:
    part = copy.copy(config)
    types = getattr(config, "layer_types", None)
    part.num_hidden_layers = last - first
    if types is not None:
        part.layer_types = list(types)[first:last]
    return part


def _positions(like: Tensor, positions_BT: Tensor | None, past: int) -> dict[str, Tensor]:
    if positions_BT is None:
        positions_BT = (torch.arange(like.shape[1], device=like.device) + past)[None]
    return {"position_ids": positions_BT}


def source_of(sources: dict[str, str], parts: Anatomy, name: str, folder: Path) -> str:
    """Return the checkpoint's name of a weight, under whichever of its tied names; ``ModelError`` when it has none."""
    found = next((sources[alias] for alias in parts.weights[name] if alias in sources), None)
    if found is None:
        raise ModelError(f"the base in {folder} lacks the weight {name!r}: fetch or save it again")
    return found


def fill(
    model: PreTrainedModel,
    parts: Anatomy,
    shards: Shards,
    sources: dict[str, str],
    dtype: torch.dtype,
    mapped: bool = False,
) -> None:
    """Read weights into a model, ``sources`` giving the checkpoint's name of each."""
    tensors = shards.load(set(sources.values()), dtype, mapped)
    for name, source in sources.items():
        parameter = nn.Parameter(tensors[source], requires_grad=False)
        for alias in parts.weights[name]:
            path, _, leaf = alias.rpartition(".")
            module = model.get_submodule(path)
            expected = module._parameters[leaf]
            if expected is not None and expected.shape != parameter.shape:
                raise ModelError(
                    f"the weight {name!r} in {shards.folder} has the shape {tuple(parameter.shape)};"
                    f" the configuration says {tuple(expected.shape)}"
                )
            module._parameters[leaf] = parameter
