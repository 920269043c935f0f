"""Whether an answer is what was asked for: its tensors, its reports, its shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mycel.errors import ParcelError
from mycel.wire.parcel import Parcel
from mycel.wire.waiting import Waiting

if TYPE_CHECKING:
    from mycel.rounds.system import System

LARGEST = 1e30  # of a report: sums of such numbers are still numbers


def check_answer(system: System, answer: Parcel | Waiting, sealed: bool = False) -> None:
    """Refuse an answer that holds a role, a report or a value that the system does not declare.

    ``sealed`` answers hold what a guard made of the declared roles, which the guard itself checks.

    Used at the party before anything leaves, and at the coordinator before anything is combined.
    """
    for name, tensor in answer.tensors.items():
        role = name.partition("/")[0]
        if role not in (("sealed",) if sealed else system.leaves):
            raise ParcelError(
                f"tensor {name!r} has the role {role!r}; only {', '.join(system.leaves)} may leave a party"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ParcelError(f"tensor {name!r} holds NaN or infinity")
    for key, value in answer.header.items():
        if key not in (*system.reports, "scores"):
            raise ParcelError(f"the report {key!r} is not declared; only {', '.join(system.reports)} may leave a party")
        numbers = value if key == "scores" and isinstance(value, list) else [value]
        if not all(isinstance(number, int | float) and abs(number) <= LARGEST for number in numbers):
            raise ParcelError(f"the report {key!r} is {_shown(value)}; only numbers may leave a party")
    samples = answer.header.get("samples", 1)
    if type(samples) is not int or not 0 < samples < 1 << 53:
        raise ParcelError(f"the report 'samples' is {_shown(samples)}; it counts examples, of which there is one")


def check_reports(system: System, header: Mapping[str, Any], work: bool) -> None:
    """Refuse an answer that leaves out what the system counts on, or scores that are none.

    Parameters
    ----------
    work : bool
        Whether it answers a brief that asked for work: then every report is there but the loss, which guards keep.
    """
    missing = [key for key in system.reports if key != "loss" and key not in header] if work else []
    if missing:
        raise ParcelError(f"the report {missing[0]!r} is missing from the answer")
    for key in set(system.counts) & header.keys():
        if type(header[key]) is not int or not 0 <= header[key] < 1 << 53:
            raise ParcelError(f"the report {key!r} is {_shown(header[key])}; it counts something")
    scores = header.get("scores", [0.0, 0, 0])
    if not isinstance(scores, list) or len(scores) != 3:
        raise ParcelError(f"the report 'scores' is {_shown(scores)}; loss, tokens and hits are needed")
    loss, tokens, hits = scores
    if not type(hits) is type(tokens) is int or not 0 <= hits <= tokens or loss < 0:
        raise ParcelError(f"the report 'scores' is {_shown(scores)}; of so many whole tokens so many are hits")


def _shown(value: object) -> str:
    """The beginning of whatever was sent; a number may have thousands of digits."""
    return repr(str(value)[:40])


def check_shapes(update: Mapping[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Refuse an update whose names or shapes differ from what was asked for."""
    for name in sorted(set(update) ^ set(expected)):
        raise ParcelError(f"tensor {name!r} is {'not expected' if name in update else 'missing'} in the answer")
    for name, shape in expected.items():
        tensor = update[name]
        if tuple(tensor.shape) != shape:
            raise ParcelError(f"tensor {name!r} has the shape {tuple(tensor.shape)}, expected {shape}")
        if not tensor.is_floating_point():
            raise ParcelError(f"tensor {name!r} holds {tensor.dtype}; a change is made of floating-point numbers")
