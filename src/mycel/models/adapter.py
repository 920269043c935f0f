"""Adapters on disk, in PEFT's format: finding one, reading it with checks, and writing one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mycel.errors import ModelError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def find_adapter(path: str) -> Path:
    """Return the PEFT folder that ``path`` is, or that the run folder ``path`` holds.

    Raises
    ------
    ModelError
        When there is none.
    """
    folder = Path(path).expanduser()
    for candidate in (folder, folder / "adapter", folder / "model" / "adapter"):
        if (candidate / CONFIG).is_file() and (candidate / WEIGHTS).is_file():
            return candidate
    raise ModelError(f"model.adapter is {path!r}: no {CONFIG} with {WEIGHTS} there; give a run folder or a PEFT folder")


def read_adapter(folder: Path, peft_type: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an adapter's configuration and its float32 tensors.

    Parameters
    ----------
    folder : Path
        What ``find_adapter`` returned.
    peft_type : str
        The type it must have, ``"LORA"`` or ``"PROMPT_TUNING"``.

    Raises
    ------
    ModelError
        When a file is damaged or the adapter is of another type.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"the adapter in {folder} cannot be read: {error}") from error
    found = config.get("peft_type") if isinstance(config, dict) else None
    if found != peft_type:
        raise ModelError(f"the adapter in {folder} is of type {found!r}; trainable.kind needs {peft_type}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"the adapter in {folder} holds unsound values in {name[:120]!r}: save it again")
    return config, {name: tensor.float() for name, tensor in tensors.items()}


def write_adapter(folder: Path, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter that plain ``peft.PeftModel.from_pretrained`` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    config.save_pretrained(str(folder))
