"""A model being served: its name, its adapters by name, and whatever back end computes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from mycel.errors import ModelError, UnknownModel
from mycel.generation.adapters import load_adapter
from mycel.generation.engine import Engine, Limits
from mycel.generation.executor import Executor, Whole
from mycel.generation.request import Request, Spans, Token
from mycel.generation.scheduler import Policy
from mycel.generation.service import Service
from mycel.generation.speculation import Drafter
from mycel.generation.streaming import Notice
from mycel.generation.weights import open_executor
from mycel.models.adapter import CONFIG, find_adapter
from mycel.models.base import Progress, find_base
from mycel.models.save import ADAPTER_FOLDER, BASE_FOLDER


class Backend(Protocol):
    """What generates; the door knows nothing else of it.

    Attributes
    ----------
    context, vocabulary : int
        Of the model.
    most : int
        Largest number of unfinished requests.
    """

    context: int
    vocabulary: int
    most: int

    def bursts(self, request: Request, spans: Spans | None = None) -> AsyncGenerator[list[Token]]:
        """Yield tokens, each time all that have come; leaving the iteration early cancels the request."""

    def stream(self, request: Request, spans: Spans | None = None) -> AsyncGenerator[Token]:
        """Yield the same tokens one by one."""

    def report_to(self, notice: Notice) -> None:
        """Tell ``notice`` from now on what happens beside the requests themselves."""

    def close(self) -> None:
        """Let go of everything."""


@dataclass
class Served:
    """A back end under a name, with adapters.

    Attributes
    ----------
    name : str
        As clients ask for it; ``name:adapter`` asks for an adapter.
    tokenizer : PreTrainedTokenizerFast
        The base's.
    backend : Backend
        What generates.
    adapters : dict of str to Path
        Known adapters; one is loaded when it is first asked for.
    shelf : Path or None
        Folder that is looked through for run folders and PEFT folders, by their names, whenever an unknown adapter is
        asked for.
    load : callable or None
        Loads an adapter into the back end, on its thread; None: the back end takes none.
    more_ends : frozenset of int
        Token ids that end a text, beside the tokeniser's own.
    shares : tuple of float
        Heads of each rank, where the blocks are shared out inside.
    """

    name: str
    tokenizer: PreTrainedTokenizerFast
    backend: Backend
    adapters: dict[str, Path] = field(default_factory=dict)
    shelf: Path | None = None
    load: Callable[[str, Path], Any] | None = None
    more_ends: frozenset[int] = frozenset()
    shares: tuple[float, ...] = ()
    _loaded: set[str] = field(default_factory=set)
    _loading: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def ends(self) -> frozenset[int]:
        """Token ids that end a text: the tokeniser's, and those that the model's generation settings name."""
        return self.more_ends | {int(self.tokenizer.eos_token_id)}

    def names(self) -> list[str]:
        """Return every name that may be asked for."""
        self._look()
        return [self.name, *(f"{self.name}:{adapter}" for adapter in sorted(self.adapters))]

    async def adapter_of(self, model: str) -> str:
        """Return the adapter that a model's name asks for, loaded; empty: the base.

        Raises
        ------
        UnknownModel
            When there is no such model or adapter.
        ModelError
            When the adapter is damaged or for another base.
        """
        base, _, adapter = model.partition(":")
        if base == self.name and not adapter:
            return ""
        if base == self.name and adapter not in self.adapters:
            self._look()
        if base != self.name or adapter not in self.adapters:
            known = ", ".join(self.names()[:8])
            raise UnknownModel(f"the model {model[:100]!r} is not served here: ask for one of {known}")
        async with self._loading:
            if adapter not in self._loaded:
                if self.load is None:
                    raise UnknownModel(
                        f"this engine serves {self.name!r} alone: adapters need --engine mycel and the whole model"
                    )
                await self.load(adapter, self.adapters[adapter])
                self._loaded.add(adapter)
        return adapter

    def _look(self) -> None:
        if self.shelf is None or not self.shelf.is_dir():
            return
        for folder in sorted(self.shelf.iterdir()):
            places = (folder, folder / "model" / ADAPTER_FOLDER)
            if folder.name not in self.adapters and any((place / CONFIG).is_file() for place in places):
                with suppress(ModelError):  # half of one: it may still be on its way here
                    self.adapters[folder.name] = find_adapter(str(folder))


@dataclass(frozen=True)
class Found:
    """Where a model's base and adapters lie."""

    name: str
    base: Path
    adapters: dict[str, Path]


def find_model(model: str, adapters: dict[str, str] | None = None, progress: Progress | None = None) -> Found:
    """Find a model: a built-in size, a local path, a Hugging Face id, or a run folder with its adapter.

    Parameters
    ----------
    model : str
        Its name or place.
    adapters : dict, optional
        More adapters: run folders or PEFT folders by the name that clients use.
    progress : callable, optional
        Told while a built-in size is trained.
    """
    named = {name: find_adapter(place) for name, place in (adapters or {}).items()}
    for name in named:
        if not name or ":" in name or "/" in name:
            raise ModelError(f"the adapter's name {name!r} cannot be asked for: use one without ':' and '/'")
    run = Path(model).expanduser()
    base = run / "model" / BASE_FOLDER
    if not base.is_dir():
        return Found(Path(model).name, find_base(model, progress), named)
    trained = run / "model" / ADAPTER_FOLDER
    own = {run.resolve().name: trained} if (trained / CONFIG).is_file() else {}
    return Found("base", find_base(str(base)), {**own, **named})


def open_served(
    found: Found,
    limits: Limits | None = None,
    policy: Policy | None = None,
    drafter: Callable[[int], Drafter] | None = None,
    most: int = 256,
    shelf: Path | None = None,
    executor: Executor | None = None,
) -> Served:
    """Open a model and start its service.

    Parameters
    ----------
    found : Found
        From ``find_model``.
    limits, policy
        The engine's.
    drafter : callable, optional
        Given the vocabulary, returns what guesses tokens ahead.
    most : int
        Largest number of unfinished requests.
    shelf : Path, optional
        Folder in which adapters appear while the server runs.
    executor : Executor, optional
        Computes; by default the whole model in this process.
    """
    executor = executor or open_executor(found.base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(found.base, local_files_only=True)
        guessing = drafter(executor.vocabulary) if drafter is not None else None
        service = Service(Engine(executor, tokenizer, limits, policy, guessing), most)
    except BaseException:
        executor.close()
        raise
    served = Served(found.name, tokenizer, service, dict(found.adapters), shelf, more_ends=_ends(found.base))
    if isinstance(executor, Whole):
        model = executor.model

        async def load(name: str, folder: Path) -> None:
            await service.call(lambda: load_adapter(model, name, folder))

        served.load = load
    return served


def _ends(folder: Path) -> frozenset[int]:
    """Token ids that a model's generation settings name as ends."""
    settings = GenerationConfig if (folder / "generation_config.json").is_file() else AutoConfig
    given = getattr(settings.from_pretrained(folder, local_files_only=True), "eos_token_id", None)
    return frozenset(given if isinstance(given, list) else [] if given is None else [given])
