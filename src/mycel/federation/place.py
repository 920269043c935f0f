"""Where a coordinator of this machine keeps what `mycel run --on` and `mycel status` must know of it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from platformdirs import user_state_dir

from mycel.errors import RunError
from mycel.run.folder import write_json


@dataclass(frozen=True)
class Post:
    """A coordinator that is running.

    Attributes
    ----------
    pid : int
        Its process.
    line : str
        The socket at which a run waits for Flower's ServerApp.
    seats : dict of str to int
        Flower's number of each party's node, in the order in which parties were admitted; empty where anyone may join.
    secure : bool
        Whether parties are known by their keys.
    """

    pid: int
    line: str
    secure: bool
    seats: dict[str, int] = field(default_factory=dict)


def state_folder(kind: str, address: str) -> Path:
    """Return the folder of a coordinator or a party: below ``MYCEL_STATE``, or the user's folder for state."""
    root = Path(os.environ.get("MYCEL_STATE") or user_state_dir("mycel")).absolute()
    folder = root / kind / address.replace(":", "_").replace("/", "_")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def write_post(address: str, post: Post) -> None:
    """Tell other commands of this machine where the coordinator is."""
    write_json(state_folder("coordinators", address) / "coordinator.json", asdict(post))


def read_post(address: str) -> Post:
    """Find the coordinator that listens at ``address``; it runs on this machine, under this user."""
    path = state_folder("coordinators", address) / "coordinator.json"
    try:
        post = Post(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(
            f"no coordinator of this machine listens at {address}: start one with `mycel coordinator --listen "
            f"{address}`, or reach one on another machine with an operator's key (--key)"
        ) from error
    if not _alive(post.pid):
        raise RunError(
            f"the coordinator at {address} has ended: start it again with `mycel coordinator --listen {address}`"
        )
    return post


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def write_status(address: str, content: dict[str, Any]) -> None:
    """Put down how the run at a coordinator stands."""
    write_json(state_folder("coordinators", address) / "status.json", content)


def overview(address: str) -> dict[str, Any]:
    """Return how a coordinator, its gate and its latest run stand."""
    folder, post = state_folder("coordinators", address), read_post(address)
    return {
        "address": address,
        "secure": post.secure,
        "parties": list(post.seats),
        "seats": post.seats,
        "gate": _read(folder / "gate.json"),
        "run": _read(folder / "status.json"),
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found
