"""How many heads of every block each rank of this machine gets: as asked for, or by how fast each computes."""

from __future__ import annotations

import re
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from mycel.decisions.collaboration import Devices, Quickest
from mycel.decisions.shares import shares
from mycel.errors import GenerationError
from mycel.models.cut import read_config
from mycel.segments.ranks import workers_context

FORM = re.compile(r"[1-9][0-9]?|[0-9]{1,4}(?:\.[0-9]{1,4})?(?::[0-9]{1,4}(?:\.[0-9]{1,4})?){1,63}")
ROWS = 1024  # of the square matrix that a rank multiplies with a vector to measure itself


def shares_of(text: str, folder: Path) -> tuple[float, ...]:
    """Return the heads of each rank.

    Parameters
    ----------
    text : str
        A number of ranks, which are measured at the same time and share by speed; or shares such as ``3:1``; empty:
        no ranks.
    folder : Path
        The model, whose key-value heads are shared out.

    Raises
    ------
    GenerationError
        When it reads otherwise, or there are more ranks than heads.
    """
    if not text:
        return ()
    config = read_config(folder)
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    if FORM.fullmatch(text) is None or min(given := [float(part) for part in text.split(":")]) <= 0:
        raise GenerationError(f"--tensor-parallel is {text[:40]!r}: write a number of ranks, or shares such as 3:1")
    count = int(given[0]) if len(given) == 1 else len(given)
    if count > heads:
        raise GenerationError(f"--tensor-parallel is {text!r}: {config.model_type!r} has {heads} heads to share out")
    if len(given) > 1:
        return tuple(float(len(mine)) for mine in shares(heads, given))
    return by_speed(speeds(count), heads, int(config.num_hidden_layers), int(config.hidden_size))


def by_speed(found: tuple[float, ...], heads: int, layers: int, width: int) -> tuple[float, ...]:
    """Return the heads of ranks that multiply at so many numbers a second, by the cost model of CoLLM."""
    # What a token costs and what links take is the same whatever the shares are, as all ranks are to take part.
    seen = Devices(found, (heads,) * len(found), heads, layers, 1.0, width, 0.0, 1e9)
    shared = Quickest().share(seen, list(range(len(found))))
    assert shared is not None
    return tuple(float(count) for count in shared)


def speeds(count: int) -> tuple[float, ...]:
    """Measure ranks that compute at the same time: numbers of a matrix multiplied a second."""
    if count == 1:
        return (1.0,)
    with ProcessPoolExecutor(count, mp_context=workers_context()) as ranks:
        return tuple(ranks.map(_speed, [time.time() + 1.0] * count))


def _speed(start: float) -> float:
    torch.set_num_threads(1)
    matrix, vector = torch.ones(ROWS, ROWS), torch.ones(ROWS)
    matrix @ vector
    time.sleep(max(0.0, start - time.time()))
    times = []
    for _ in range(200):
        began = time.perf_counter()
        matrix @ vector
        times.append(time.perf_counter() - began)
    return ROWS * ROWS / sorted(times)[len(times) // 2]
