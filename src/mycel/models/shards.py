"""Selected weights out of a folder of safetensors: nothing that is not asked for is read into memory."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mycel.errors import ModelError


@dataclass(frozen=True)
class Shards:
    """Where each weight of a checkpoint lies.

    Attributes
    ----------
    folder : Path
        In Hugging Face's format.
    files : mapping of str to str
        File by weight name, names as the checkpoint has them.
    """

    folder: Path
    files: Mapping[str, str]

    @classmethod
    def of(cls, folder: Path) -> Shards:
        """List a folder's weights from their headers.

        Raises
        ------
        ModelError
            When there are none, or a file is damaged.
        """
        index = folder / "model.safetensors.index.json"
        try:
            if index.is_file():
                files = {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
                if any(Path(file).name != file or not (folder / file).is_file() for file in set(files.values())):
                    raise ModelError(f"{index} names files that are not in its folder: fetch the model again")
                return cls(folder, files)
            files = {}
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, "pt") as opened:
                    files.update(dict.fromkeys(opened.keys(), path.name))
        except (OSError, ValueError, LookupError, AttributeError, SafetensorError) as error:
            raise ModelError(f"the weights in {folder} cannot be listed: {str(error)[:200]}") from error
        if not files:
            raise ModelError(f"{folder} has no *.safetensors weights: save the model with safe_serialization first")
        return cls(folder, files)

    def sources(self, model: PreTrainedModel) -> dict[str, str]:
        """Return the checkpoint's name of each of the model's weights that it holds as it is.

        Older checkpoints name weights differently; the translation is the one that ``transformers`` loads them with.
        """
        transforms = get_model_conversion_mapping(model)
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        known: dict[str, Any] = dict(model.state_dict(keep_vars=True))
        found: dict[str, str] = {}
        for source in self.files:
            name, converted = rename_source_key(source, renamings, converters, model.base_model_prefix, known)
            if converted is None and name in known:
                found[name] = source
        return found

    def load(self, names: Collection[str], dtype: torch.dtype | None = None, mapped: bool = False) -> dict[str, Tensor]:
        """Read the weights called ``names`` by the checkpoint, each into memory of its own.

        Parameters
        ----------
        names : collection of str
            As ``sources`` returns them.
        dtype : torch.dtype, optional
            Float weights are converted; by default they stay as they are.
        mapped : bool
            Weights that need no conversion stay in their file, from which pages are read as they are used.
        """
        found: dict[str, Tensor] = {}
        for file in sorted({self.files[name] for name in names}):
            try:
                with safe_open(self.folder / file, "pt") as opened:
                    for name in names:
                        if self.files[name] == file:
                            tensor = opened.get_tensor(name)
                            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                            # A clone even without conversion: views would keep the whole file mapped.
                            found[name] = tensor.to(wanted, copy=not mapped)
            except (OSError, SafetensorError) as error:
                raise ModelError(f"the weights in {self.folder / file} cannot be read: {str(error)[:200]}") from error
        return found

    def elements(self, names: Collection[str]) -> int:
        """Return how many numbers the named weights hold, from the headers alone."""
        total = 0
        for file in sorted({self.files[name] for name in names}):
            with safe_open(self.folder / file, "pt") as opened:
                total += sum(prod(opened.get_slice(n).get_shape()) for n in names if self.files[n] == file)
        return total
