"""Checkpoints of an island: every rank writes its own shard while training goes on, and any layout reads them.

`torch.distributed.checkpoint` writes and reshards; the files are safetensors. A manifest with every file's hash,
written last, makes a checkpoint whole: what was torn by a kill has none and is passed over.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as read_shards
from torch.distributed.checkpoint.state_dict_saver import async_save as write_shards

from mycel.errors import RunError

MANIFEST = "checkpoint.json"
KEPT = 2  # whole checkpoints that stay; an older one is removed


def state_of(weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and what the optimiser remembers of them, sharded as they are, by whole-model names."""
    state: dict[str, Tensor] = {f"weight.{name}": weight.detach() for name, weight in weights.items()}
    for name, weight in weights.items():
        for moment, value in optimizer.state[weight].items():
            if isinstance(value, Tensor):
                # A scalar has no place in a sharded file: it travels as a vector of one.
                state[f"{moment}.{name}"] = value.detach().reshape(1) if value.dim() == 0 else value.detach()
    return state


def prime(weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Give an optimiser that has made no step its memory, empty: its first step will be as if it had none."""
    kept = [group["lr"] for group in optimizer.param_groups]
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(before[name])
            for value in optimizer.state[weight].values():
                if isinstance(value, Tensor):
                    value.zero_()
    for group, rate in zip(optimizer.param_groups, kept, strict=True):
        group["lr"] = rate


@dataclass
class Checkpoints:
    """The checkpoints of one run: ``folder/step-N``.

    Parameters
    ----------
    recipe_sha256 : str
        Of the training; the layout may differ from one run to the next.
    """

    folder: Path
    recipe_sha256: str
    _waiting: tuple[int, Any] | None = None
    _own_group: Any = None

    def __post_init__(self) -> None:
        # Writing goes on beside training: on training's own group their messages would be taken for one another.
        self._own_group = dist.new_group(backend="gloo")

    def save(self, step: int, weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Begin to write the checkpoint of ``step``; returns once the values are copied. All ranks call it."""
        self.finish()
        place = self.folder / _name(step)
        if dist.get_rank() == 0:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
        dist.barrier()
        writer = HuggingFaceStorageWriter(str(place), save_distributed=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            handle = write_shards(state_of(weights, optimizer), storage_writer=writer, process_group=self._own_group)
        self._waiting = step, handle

    def finish(self) -> None:
        """Wait for what is being written, and seal it."""
        if self._waiting is None:
            return
        step, handle = self._waiting
        self._waiting = None
        place = self.folder / _name(step)
        try:
            handle.result()
        except CheckpointException as error:
            raise RunError(
                f"the checkpoint {str(place)!r} cannot be written ({_reason(error)}): make room; "
                "the one before is whole, and --resume goes on from it"
            ) from error
        if dist.get_rank() == 0:
            hashes = {path.name: _sha256(path) for path in sorted(place.iterdir())}
            content = {"step": step, "recipe_sha256": self.recipe_sha256, "files": hashes}
            temporary = place / ".manifest"
            temporary.write_text(json.dumps(content), encoding="utf-8")
            temporary.replace(place / MANIFEST)
            for old in self.whole()[:-KEPT]:
                shutil.rmtree(self.folder / _name(old), ignore_errors=True)
        dist.barrier()

    def whole(self) -> list[int]:
        """Steps of the checkpoints that were written to their end, in order."""
        return whole_steps(self.folder)

    def load(self, weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
        """Go to the latest whole checkpoint, whatever layout wrote it, and return its step; 0: there is none.

        Raises
        ------
        RunError
            Its files are not those that were written, or it belongs to another training.
        """
        steps = self.whole()
        if not steps:
            return 0
        place = self.folder / _name(steps[-1])
        self._check(place)
        prime(weights, optimizer)
        state = state_of(weights, optimizer)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_shards(state, storage_reader=HuggingFaceStorageReader(str(place)))
        except CheckpointException as error:
            raise RunError(
                f"the checkpoint {str(place)!r} does not fit this model ({_reason(error)}): "
                "resume with the model that it was written from, or choose another --out"
            ) from error
        for name, weight in weights.items():
            for moment, value in optimizer.state[weight].items():
                if isinstance(value, Tensor) and value.dim() == 0:
                    value.copy_(state[f"{moment}.{name}"].reshape(()))
        return steps[-1]

    def _check(self, place: Path) -> None:
        try:
            content = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
            files, found, step = dict(content["files"]), str(content["recipe_sha256"]), int(content["step"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"the manifest of {str(place)!r} cannot be read: remove the folder") from error
        if found != self.recipe_sha256:
            raise RunError(
                f"the checkpoint {str(place)!r} is of another training ({found[:9]}, not {self.recipe_sha256[:9]}): "
                "resume with the same recipe, of which only [layout] may change, or choose another --out"
            )
        there = {path.name for path in place.iterdir() if path.name != MANIFEST}
        wrong = sorted(there ^ files.keys()) or [name for name in files if _sha256(place / name) != files[name]]
        if place.name != _name(step):
            wrong.append(MANIFEST)
        if wrong:
            raise RunError(
                f"the checkpoint {str(place)!r} is damaged ({wrong[0]} is not what was written): "
                "remove the folder to go on from the one before"
            )


def whole_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in ``folder`` that were written to their end, in order."""
    found = folder.glob(f"step-*/{MANIFEST}") if folder.is_dir() else []
    steps = (path.parent.name.removeprefix("step-") for path in found)
    return sorted(int(step) for step in steps if step.isdecimal())


def _reason(error: CheckpointException) -> str:
    """First line of what went wrong at the first rank; the error's own text is every rank's traceback."""
    first, _ = next(iter(error.failures.values()))
    return str(first).partition("\n")[0].rstrip(".")


def _name(step: int) -> str:
    return f"step-{step:08}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
