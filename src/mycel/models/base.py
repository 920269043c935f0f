"""The frozen base that every node holds: finding it, opening it, shifting it for a while, saving it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from mycel.errors import ModelError
from mycel.models.adapter import find_adapter
from mycel.models.layers import substituted, weight_sites
from mycel.models.sizes import SIZES

Progress = Callable[[str, int, int], None]
WANTED_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
# Other forms of the same weights, which would only double a download.
UNWANTED_FILES = ["onnx/*", "openvino/*", "*/*.safetensors"]


@dataclass(frozen=True)
class Base:
    """A model opened once per process, frozen, with its tokeniser.

    Attributes
    ----------
    model : PreTrainedModel
        In evaluation mode, float32, no parameter requiring a gradient.
    tokenizer : PreTrainedTokenizerFast
        With a padding token.
    folder : Path
        Where it was opened from; its weights stay memory-mapped there.
    name : str
        The folder's name, for messages.
    adapter : Path or None
        PEFT folder whose adapter trainables start from.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    folder: Path
    name: str
    adapter: Path | None = None


def find_base(name: str, progress: Progress | None = None) -> Path:
    """Return the folder of a base in Hugging Face's format, making or fetching it first where needed.

    Parameters
    ----------
    name : str
        A built-in size (trained once, then cached), a local folder, or a Hugging Face id.
    progress : callable, optional
        Called with (phase, done, total) at least twice a second while a built-in size is trained.

    Raises
    ------
    ModelError
        When there is no such base or it cannot be fetched.
    """
    if name in SIZES:
        from mycel.models.cache import cached_base

        return cached_base(SIZES[name], progress)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _checked_folder(folder)
    if folder.exists() or folder.is_absolute() or name.count("/") != 1 or name.startswith((".", "~")):
        raise ModelError(
            f"model.base is {name!r}: neither a built-in size ({', '.join(SIZES)}), nor a folder here,"
            " nor a Hugging Face id such as 'organisation/model'"
        )
    return _checked_folder(_fetch(name))


def open_base(folder: Path, adapter: str = "") -> Base:
    """Open a base; its weights are memory-mapped, so that processes on one machine share their pages.

    Parameters
    ----------
    folder : Path
        What ``find_base`` returned.
    adapter : str
        A run folder or PEFT folder whose adapter trainables start from; empty: none.

    Raises
    ------
    ModelError
        When weights are missing or damaged, or the tokeniser does not fit.
    """
    folder = _checked_folder(Path(folder))
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with _quiet():
            model, report = family.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever the damaged file led to
        raise ModelError(f"the base in {folder} cannot be opened: {_first_line(error)}") from error
    absent = sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])})
    if absent:
        raise ModelError(f"the base in {folder} lacks fitting weights for {absent[:3]}: fetch or save it again")
    model.requires_grad_(False).eval()
    _check_tokenizer(model, tokenizer, folder)
    return Base(model, tokenizer, folder, folder.name, find_adapter(adapter) if adapter else None)


@contextmanager
def shifted(base: Base, deltas: Mapping[str, Tensor]) -> Iterator[None]:
    """Compute with ``W + D`` inside the block; afterwards the very same weights are back, to the bit.

    Parameters
    ----------
    base : Base
        The opened base.
    deltas : mapping of str to Tensor
        Dense changes by weight name, as ``Trainable.delta_weight`` returns them.

    Raises
    ------
    ModelError
        When a name is no weight of the base or a shape differs.
    """
    sites = weight_sites(base.model)
    moved: dict[str, nn.Parameter] = {}
    for name, delta in deltas.items():
        if name not in sites:
            raise ModelError(f"the delta {name[:120]!r} names no weight of the base {base.name!r}")
        module, leaf = sites[name][0]
        weight = getattr(module, leaf)
        if weight.shape != delta.shape:
            raise ModelError(
                f"the delta {name!r} has the shape {tuple(delta.shape)}; the weight has {tuple(weight.shape)}"
            )
        moved[name] = nn.Parameter(weight.detach() + delta, requires_grad=False)
    with substituted(sites, moved):
        yield


def save_model(base: Base, folder: Path) -> None:
    """Write the model as it now computes, and its tokeniser, in Hugging Face's format."""
    if folder.resolve() == base.folder.resolve():
        raise ModelError(f"{folder} holds the base that is open: its weights are mapped from there; save elsewhere")
    with _quiet():
        base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: give a folder in Hugging Face's format")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} has no *.safetensors weights: save the model with safe_serialization first")
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise ModelError(f"{folder} has no tokenizer.json: save the model's tokeniser beside it")
    return folder


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with _quiet():
            folder = snapshot_download(
                name, etag_timeout=5, allow_patterns=WANTED_FILES, ignore_patterns=UNWANTED_FILES
            )
    except HFValidationError as error:
        raise ModelError(f"model.base is {name!r}, which is not a Hugging Face id: {_first_line(error)}") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"model.base is {name!r}: the Hugging Face hub cannot be reached and no copy is cached here;"
            f" use a local folder or a built-in size ({', '.join(SIZES)})"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"model.base is {name!r}, which the hub does not give: {_first_line(error)}") from error
    return Path(folder)


def _check_tokenizer(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"the tokeniser in {folder} has no fast form: convert it to a tokenizer.json")
    vocabulary = tokenizer.get_vocab()
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(vocabulary.values(), default=-1)
    if highest < 0 or highest >= rows:
        raise ModelError(
            f"the tokeniser in {folder} has ids up to {highest} and the model's embedding {rows} rows:"
            " use the tokeniser that the model was trained with"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokeniser in {folder} names no end-of-sequence token: set eos_token in its config")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


@contextmanager
def _quiet() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown, hub_shown = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()
        if hub_shown:
            enable_progress_bars()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
