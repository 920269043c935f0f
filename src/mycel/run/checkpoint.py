"""A checkpoint: all that a coordinator and its simulated parties must remember between two rounds, in one parcel."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mycel.engines.engine import Pending, Request
from mycel.errors import ParcelError, RunError
from mycel.rounds.coordinator import Coordinator
from mycel.rounds.deadline import WINDOW
from mycel.rounds.guarding import restored
from mycel.rounds.leases import Lease
from mycel.rounds.progress import Progress
from mycel.rounds.system import State
from mycel.run.folder import write_file
from mycel.wire.algebra import with_role
from mycel.wire.parcel import Parcel, Tensors


@dataclass
class Sparing:
    """Saves checkpoints to ``path``, and of rounds that pass quickly only as many as cost a small share of the time."""

    path: Path
    share: float = 0.1
    _cost: float = 0.0
    _saved: float = -math.inf

    def __call__(self, coordinator: Coordinator) -> None:
        """Save after a round, unless the last one was saved a moment ago; the end is always saved."""
        started = time.monotonic()
        if not coordinator.progress.delivered and started - self._saved < self._cost / self.share:
            return
        save_checkpoint(coordinator, self.path)
        self._saved = time.monotonic()
        self._cost = self._saved - started


def save_checkpoint(coordinator: Coordinator, path: Path) -> None:
    """Write the coordinator's progress, what is still out, and the parties' homes."""
    done, deadlines = coordinator.progress, coordinator.leases.deadlines
    state = done.state.to_parcel()
    tensors: Tensors = dict(state.tensors)
    requests = _requests(coordinator)
    for item in requests:
        tensors[f"request.{item.request.generation}/frame"] = _bytes(bytes(item.request.frame))
        if item.home:
            tensors[f"request.{item.request.generation}/home"] = _bytes(item.home)
    for node, home in coordinator.engine.homes().items():
        tensors[f"home.{node}/frame"] = _bytes(home)
    guarding = coordinator.guarding
    for node, history in (guarding.distrust.histories if guarding.distrust else {}).items():
        tensors |= with_role(f"guard.{node}", history)
    header: dict[str, Any] = {
        "guard": guarding.facts,
        "state": state.header,
        "version": done.version,
        "generation": done.generation,
        "delivered": done.delivered,
        "scores": {
            str(version): {str(node): score for node, score in found.items()} for version, found in done.scores.items()
        },
        "rounds": done.rounds,
        "drops": dict(done.drops),
        "busy": {str(node): moment for node, moment in done.busy.items()},
        "meter": coordinator.leases.meter.snapshot(),
        "clock": coordinator.engine.now(),
        "recent": {str(node): list(seconds) for node, seconds in deadlines.recent.items()},
        "silent": {str(node): count for node, count in deadlines.silent.items()},
        "requests": [_request_header(item.request) for item in requests],
        "leases": [_lease_header(lease) for lease in coordinator.leases.held.values()],
    }
    write_file(path, Parcel("checkpoint", {**header, "sha256": _digest(header, tensors)}, tensors).to_file)


def _digest(header: dict[str, Any], tensors: Tensors) -> str:
    """Hash of everything in a checkpoint: a disk's silent fault must not become part of a model."""
    plain = json.loads(json.dumps(header))  # as it will be read: keys of text, lists for tuples
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _requests(coordinator: Coordinator) -> list[Pending]:
    """What is on its way, in the order of asking: also answers whose leases have ended, for they will come late."""
    under_lease = [Pending(lease.request, b"") for lease in coordinator.leases.held.values()]
    known = {item.request.generation: item for item in (*under_lease, *coordinator.engine.pending())}
    return [known[generation] for generation in sorted(known)]


def _request_header(request: Request) -> dict[str, Any]:
    return {
        "node": request.node,
        "generation": request.generation,
        "asked": request.asked,
        "seconds": request.seconds,
        "ready": request.ready,
    }


def _lease_header(lease: Lease) -> dict[str, Any]:
    return {
        "generation": lease.request.generation,
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
    found = parcel.header.pop("sha256", None)
    if parcel.kind != "checkpoint" or found != _digest(parcel.header, parcel.tensors):
        raise RunError(
            f"the checkpoint {str(path)!r} is damaged (its content does not have the hash that it states): "
            "remove it to repeat that part of the run"
        )
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
    """Put a fresh coordinator where the checkpoint left off, and ask again for every answer that was still to come."""
    header = parcel.header
    state = State.from_parcel(Parcel("state", header["state"], parcel.tensors))
    scores = {
        int(version): {int(node): score for node, score in found.items()} for version, found in header["scores"].items()
    }
    coordinator.progress = coordinator.leases.progress = Progress(
        state,
        header["version"],
        header["generation"],
        True,
        header["delivered"],
        scores,
        header["rounds"],
        Counter(header["drops"]),
        {int(node): moment for node, moment in header["busy"].items()},
    )
    histories = {name[6:]: value for name, value in parcel.tensors.items() if name.startswith("guard.")}
    restored(coordinator.guarding, header["guard"], histories)
    coordinator.leases.meter.restore(header["meter"])
    coordinator.leases.deadlines.recent = {
        int(node): deque(seconds, WINDOW) for node, seconds in header["recent"].items()
    }
    coordinator.leases.deadlines.silent = Counter({int(node): count for node, count in header["silent"].items()})
    requests: dict[int, Request] = {}
    for item in header["requests"]:
        frame = parcel.tensors[f"request.{item['generation']}/frame"].numpy().tobytes()
        home = parcel.tensors.get(f"request.{item['generation']}/home")
        request = Request(item["node"], item["generation"], frame, item["asked"], item["seconds"], item["ready"])
        requests[request.generation] = request
        coordinator.engine.ask(request, b"" if home is None else home.numpy().tobytes())
    for item in header["leases"]:
        request = requests[item["generation"]]
        expects = item["expects"] and {name: tuple(shape) for name, shape in item["expects"].items()}
        coordinator.leases.held[request.node] = Lease(request, item["version"], item["kind"], expects, item["deadline"])
