"""``mycel serve``: one machine, an OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from mycel.errors import ExtraMissing, GenerationError

UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
SHAPES = 128  # that oneDNN keeps compiled


class Place(NamedTuple):
    """Where the door stands and who may come in."""

    host: str
    port: int
    keys: list[str]


class Engine(NamedTuple):
    """How tokens are made: by which engine, over what, and who guesses ahead."""

    name: str
    remote: str = ""
    swarm: str = ""
    weights: str = "auto"
    ranks: str = ""
    speculate: str = ""
    guesses: int = 4


def serve_command(
    model: str,
    place: Place,
    engine: Engine,
    adapters: list[str],
    shelf: Path | None,
    memory: str,
    most: int,
    log: Path | None = None,
) -> None:
    """Open the model and serve it until interrupted."""
    # Read when torch first computes. oneDNN keeps what it compiled for 1,024 shapes, and every number of rows that
    # models/linear.py leaves is a few: with fewer kept, memory is level sooner (docs/measurements.md).
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(SHAPES))
    need("starlette", "uvicorn", "prometheus_client", extra="serve")
    keys = [*place.keys, *filter(None, os.environ.get("MYCEL_API_KEYS", "").split(","))]
    named = named_folders(adapters)
    size = size_in_bytes("--memory", memory)
    messages = Console(stderr=True)
    remote_key = os.environ.get("MYCEL_REMOTE_KEY", "")
    if engine.name == "vllm":
        from mycel.door.remote import serve_remote

        told = lambda address: messages.print(f"{engine.remote} at {address}/v1")  # noqa: E731
        serve_remote(engine.remote, place.host, place.port, keys, remote_key, told)
        return
    with messages.status("loading libraries") as status:
        from mycel.door.guessing import drafter_of, open_edge
        from mycel.door.run import serve
        from mycel.generation.backends import Setup, open_engine

        def progress(phase: str, done: int, total: int) -> None:
            status.update(f"{phase} {done}/{total}")

        if engine.name == "edge":
            served = open_edge(model, engine.remote, remote_key, most, engine.guesses, progress)
        else:
            drafter = drafter_of(engine.speculate, progress)
            if engine.swarm:
                from mycel.door.swarm import open_swarm

                served = open_swarm(engine.swarm, model, most, progress, drafter, engine.guesses)
            else:
                how = (engine.weights, engine.ranks, drafter, engine.guesses)
                served = open_engine(engine.name, Setup(model, named, shelf, size, most, *how), progress)
    names = ", ".join(served.names())
    if served.shares:
        names += f" over {len(served.shares)} ranks with {':'.join(f'{heads:g}' for heads in served.shares)} heads,"
    serve(served, place.host, place.port, keys, lambda address: messages.print(f"{names} at {address}/v1"), log)


def need(*libraries: str, extra: str) -> None:
    """Refuse with the line that installs it when a library is missing."""
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise ExtraMissing(library, extra)


def size_in_bytes(name: str, text: str) -> int:
    """Read a size such as ``512MiB``."""
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise GenerationError(f"{name} is {text!r}: write a size such as 512MiB or 4GiB")
    return int(float(match[1]) * unit)


def named_folders(adapters: list[str]) -> dict[str, str]:
    """Read ``NAME=FOLDER`` pairs."""
    named = {}
    for adapter in adapters:
        name, separator, folder = adapter.partition("=")
        if not separator or not name or not folder:
            raise GenerationError(f"--adapter is {adapter!r}: write NAME=FOLDER")
        named[name] = folder
    return named
