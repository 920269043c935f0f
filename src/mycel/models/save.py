"""What a run leaves behind: a model that plain ``transformers`` and ``peft`` load."""

from __future__ import annotations

from pathlib import Path

from mycel.models.base import Base, save_model
from mycel.models.trainable import Trainable

BASE_FOLDER = "base"
ADAPTER_FOLDER = "adapter"


def save_run_model(base: Base, trainable: Trainable, folder: Path) -> None:
    """Write the run's model with the trainable's live state.

    Parameters
    ----------
    base : Base
        The base, with whatever was merged into it.
    trainable : Trainable
        For LoRA and prompts ``folder/base`` gets the base and ``folder/adapter`` the adapter in PEFT's format;
        otherwise ``folder/base`` gets the tuned weights.
    folder : Path
        Made when missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if trainable.kind in ("lora", "prompt"):
        save_model(base, folder / BASE_FOLDER)
        trainable.save(folder / ADAPTER_FOLDER)
    else:
        trainable.save(folder / BASE_FOLDER)
