"""Which engine generates behind the door: our own, or one that others keep, as an extra."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mycel.errors import GenerationError
from mycel.generation.engine import Limits
from mycel.generation.served import Found, Served, find_model, open_served
from mycel.generation.sharing import shares_of
from mycel.generation.speculation import Drafter
from mycel.generation.weights import open_executor
from mycel.models.base import Progress


@dataclass(frozen=True)
class Setup:
    """How a model is to be served.

    Attributes
    ----------
    model : str
        Name, place or run folder; the name to ask for, at a remote server.
    adapters : dict of str to str
        More adapters, folders by name.
    shelf : Path or None
        Folder in which adapters appear while the server runs.
    memory : int
        Bytes of keys and values.
    most : int
        Largest number of unfinished requests.
    weights : str
        Where the weights are (``weights.open_executor``).
    ranks : str
        Number of ranks inside every block, or their shares such as ``3:1``; empty: the whole model in this process.
    drafter : callable or None
        Given the vocabulary, returns what guesses tokens ahead.
    guesses : int
        Most tokens guessed ahead.
    """

    model: str
    adapters: dict[str, str]
    shelf: Path | None
    memory: int
    most: int
    weights: str = "auto"
    ranks: str = ""
    drafter: Callable[[int], Drafter] | None = None
    guesses: int = 4


def open_engine(engine: str, setup: Setup, progress: Progress | None = None) -> Served:
    """Open a model with one of the engines.

    Raises
    ------
    GenerationError
        When there is no such engine.
    ExtraMissing
        When its library is not installed.
    """
    if engine not in ENGINES:
        raise GenerationError(f"--engine is {engine!r}: choose one of {', '.join(ENGINES)}")
    return ENGINES[engine](setup, progress)


def _own(setup: Setup, progress: Progress | None) -> Served:
    found = find_model(setup.model, setup.adapters, progress)
    if setup.ranks and (found.adapters or setup.shelf is not None):
        raise GenerationError("adapters are not shared out over ranks: leave them or --tensor-parallel out")
    shares = shares_of(setup.ranks, found.base)
    executor = open_executor(found.base, setup.weights, shares)
    limits = Limits(memory=setup.memory, guesses=setup.guesses)
    served = open_served(found, limits, None, setup.drafter, setup.most, setup.shelf, executor)
    served.shares = shares
    return served


def _ctranslate2(setup: Setup, progress: Progress | None) -> Served:
    from mycel.generation.ctranslate import open_ctranslate

    return open_ctranslate(_bare(setup, progress), setup.most)


def _llama_cpp(setup: Setup, progress: Progress | None) -> Served:
    from mycel.generation.llamacpp import open_llama_cpp

    return open_llama_cpp(_bare(setup, progress), setup.most)


def _bare(setup: Setup, progress: Progress | None) -> Found:
    if setup.ranks or setup.drafter is not None or setup.weights != "auto":
        raise GenerationError(
            "this engine has weights, ranks and guesses of its own: leave --weights, --tensor-parallel and --speculate"
            " out, or use --engine mycel"
        )
    if setup.adapters or setup.shelf is not None:
        raise GenerationError("this engine serves bases alone: leave --adapter out, or use --engine mycel")
    found = find_model(setup.model, {}, progress)
    return Found(found.name, found.base, {})


ENGINES: dict[str, Callable[[Setup, Progress | None], Served]] = {
    "mycel": _own,
    "ctranslate2": _ctranslate2,
    "llama.cpp": _llama_cpp,
}
