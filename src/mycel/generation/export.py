"""A base with its adapter merged, for engines that know no adapters."""

from __future__ import annotations

from pathlib import Path

from mycel.errors import ModelError
from mycel.generation.served import Found
from mycel.models.adapter import read_adapter
from mycel.models.base import open_base, save_model
from mycel.models.lora import Lora


def merged_folder(found: Found, scratch: Path) -> Path:
    """Return a folder in Hugging Face's format that computes what the model with its adapter computes.

    Parameters
    ----------
    found : Found
        With at most one adapter.
    scratch : Path
        Where the merged weights are written; not used without an adapter.
    """
    if len(found.adapters) > 1:
        raise ModelError(f"{len(found.adapters)} adapters are given: an exported model holds one")
    if not found.adapters:
        return found.base
    place = next(iter(found.adapters.values()))
    config, _ = read_adapter(place, "LORA")
    base = open_base(found.base, str(place))
    lora = Lora(base, int(config["r"]), float(config["lora_alpha"]) / int(config["r"]), config["target_modules"])
    lora.merge(lora.initial(0))
    save_model(base, scratch)
    return scratch
