"""A checkpoint: all that a coordinator and its simulated parties must remember between two rounds, in one parcel."""

from __future__ import annotations

from collections import Counter, deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mycel.engines.engine import Request
from mycel.errors import ParcelError, RunError
from mycel.rounds.coordinator import Coordinator, Lease, Progress
from mycel.rounds.deadline import WINDOW
from mycel.rounds.system import State
from mycel.run.folder import write_bytes
from mycel.wire.parcel import Parcel, Tensors


def save_checkpoint(coordinator: Coordinator, path: Path) -> None:
    """Write the coordinator's progress, what is still out, and the parties' homes."""
    done, deadlines = coordinator.progress, coordinator.deadlines
    state = done.state.to_parcel()
    tensors: Tensors = dict(state.tensors)
    for node, lease in coordinator.leases.items():
        tensors[f"lease.{node}/frame"] = _bytes(lease.request.frame)
    for node, home in coordinator.engine.homes().items():
        tensors[f"home.{node}/frame"] = _bytes(home)
    header: dict[str, Any] = {
        "state": state.header,
        "version": done.version,
        "generation": done.generation,
        "delivered": done.delivered,
        "scores": {
            str(version): {str(node): score for node, score in found.items()} for version, found in done.scores.items()
        },
        "rounds": done.rounds,
        "drops": dict(done.drops),
        "meter": coordinator.meter.snapshot(),
        "clock": coordinator.engine.now(),
        "recent": {str(node): list(seconds) for node, seconds in deadlines.recent.items()},
        "silent": {str(node): count for node, count in deadlines.silent.items()},
        "leases": [_lease_header(lease) for lease in coordinator.leases.values()],
    }
    write_bytes(path, Parcel("checkpoint", header, tensors).to_bytes())


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _lease_header(lease: Lease) -> dict[str, Any]:
    request = lease.request
    return {
        "node": request.node,
        "generation": request.generation,
        "asked": request.asked,
        "seconds": request.seconds,
        "version": lease.version,
        "kind": lease.kind,
        "expects": lease.expects,
        "deadline": lease.deadline,
    }


def read_checkpoint(path: Path) -> Parcel | None:
    """Return the checkpoint in ``path``, or None when there is none."""
    if not path.exists():
        return None
    try:
        parcel = Parcel.from_bytes(path.read_bytes())
    except ParcelError as error:
        raise RunError(
            f"the checkpoint {str(path)!r} is damaged ({error}): remove it to repeat that part of the run"
        ) from error
    if parcel.kind != "checkpoint":
        raise RunError(f"{str(path)!r} is a parcel of kind {parcel.kind!r} and no checkpoint")
    return parcel


def checkpoint_clock(parcel: Parcel | None) -> float:
    """Engine seconds at which a run resumes."""
    return float(parcel.header["clock"]) if parcel else 0.0


def homes_of(parcel: Parcel | None) -> dict[int, bytes]:
    """What the simulated parties kept at home."""
    if parcel is None:
        return {}
    found = {name: value for name, value in parcel.tensors.items() if name.startswith("home.")}
    return {int(name[5:].partition("/")[0]): value.numpy().tobytes() for name, value in found.items()}


def restore(coordinator: Coordinator, parcel: Parcel) -> None:
    """Put a fresh coordinator where the checkpoint left off, and ask again whoever was still out."""
    header = parcel.header
    state = State.from_parcel(Parcel("state", header["state"], parcel.tensors))
    scores = {
        int(version): {int(node): score for node, score in found.items()} for version, found in header["scores"].items()
    }
    coordinator.progress = Progress(
        state,
        header["version"],
        header["generation"],
        True,
        header["delivered"],
        scores,
        header["rounds"],
        Counter(header["drops"]),
    )
    coordinator.meter.restore(header["meter"])
    coordinator.deadlines.recent = {int(node): deque(seconds, WINDOW) for node, seconds in header["recent"].items()}
    coordinator.deadlines.silent = Counter({int(node): count for node, count in header["silent"].items()})
    for item in header["leases"]:
        frame = parcel.tensors[f"lease.{item['node']}/frame"].numpy().tobytes()
        request = Request(item["node"], item["generation"], frame, item["asked"], item["seconds"])
        expects = item["expects"] and {name: tuple(shape) for name, shape in item["expects"].items()}
        coordinator.leases[item["node"]] = Lease(request, item["version"], item["kind"], expects, item["deadline"])
        coordinator.engine.ask(request)
