"""A federation on this machine: a coordinator and its parties as processes of their own, with fresh keys."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mycel.data.examples import Example
from mycel.data.parties import PartyData
from mycel.engines.children import free_port, start
from mycel.errors import EngineError
from mycel.federation.keyring import Keyring
from mycel.federation.place import read_post

PROGRAM = [sys.executable, "-c", "from mycel.cli import main; main()"]


@dataclass
class Village:
    """A federation whose processes are children of this one.

    Parameters
    ----------
    folder : Path
        Where keys, data, state and logs lie.
    """

    folder: Path
    names: Sequence[str]
    address: str = ""
    coordinator: subprocess.Popen[bytes] | None = None
    parties: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.address = self.address or f"127.0.0.1:{free_port()}"
        if not (self.folder / "keys").exists():
            Keyring.make(self.folder / "keys", ["127.0.0.1"], self.names)

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of its processes: state of their own, one thread each."""
        return {**os.environ, "MYCEL_STATE": str(self.folder / "state"), "OMP_NUM_THREADS": "1"}

    def start(self, *arguments: str, log: str) -> subprocess.Popen[bytes]:
        """Start one of Mycel's commands in a session of its own."""
        command = [*PROGRAM, *arguments]
        process = start(command, self.environment, self.folder / f"{log}.log", last_word=signal.SIGTERM)
        self._started.append(process)
        return process

    def start_coordinator(self) -> None:
        """Start the coordinator and wait until it listens."""
        keys = str(self.folder / "keys")
        self.coordinator = self.start("coordinator", "--listen", self.address, "--keys", keys, log="coordinator")

    def join(self, name: str, *arguments: str, through: str = "") -> None:
        """Start a party on the data in its folder; ``through`` is another address that leads to the coordinator."""
        key, data = self.folder / "keys" / "parties" / f"{name}.pem", self.folder / "data" / name
        options = ("--key", str(key), "--data", str(data), *arguments)
        self.parties[name] = self.start("join", through or self.address, *options, log=name)

    def leave(self, name: str) -> None:
        """End a party as its administrator would."""
        process = self.parties.pop(name)
        process.send_signal(signal.SIGTERM)
        _wait(process)

    def give(self, name: str, party: PartyData) -> None:
        """Write a party's examples where it looks for them."""
        folder = self.folder / "data" / name
        folder.mkdir(parents=True)
        write_examples(folder / "train.jsonl", party.train)
        write_examples(folder / "held_out.jsonl", party.held_out)

    def listening(self) -> bool:
        """Whether the coordinator has said where it is."""
        before = os.environ.get("MYCEL_STATE")
        os.environ["MYCEL_STATE"] = str(self.folder / "state")
        try:
            read_post(self.address)
        except Exception:
            return False
        finally:
            if before is None:
                del os.environ["MYCEL_STATE"]
            else:
                os.environ["MYCEL_STATE"] = before
        return True

    def wait_until_listening(self) -> None:
        """Wait for the coordinator; say what it said if it ends instead."""
        assert self.coordinator is not None
        while not self.listening():
            if self.coordinator.poll() is not None:
                words = (self.folder / "coordinator.log").read_text(errors="replace")[-500:]
                raise EngineError(f"the coordinator ended: {words}")
            time.sleep(0.1)

    def end(self) -> None:
        """End every process, and wait for it."""
        processes = dict.fromkeys((*self._started, *self.parties.values()))
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.send_signal(signal.SIGTERM)
        for process in processes:
            _wait(process)


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write examples as JSON lines, in their order."""
    lines = (json.dumps({"prompt": each.prompt, "response": each.response, "label": each.label}) for each in examples)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@contextmanager
def village(folder: Path, parties: Sequence[PartyData]) -> Iterator[Village]:
    """Start a coordinator and a process for each party; end them all afterwards."""
    made = Village(folder, [party.name for party in parties])
    try:
        made.start_coordinator()
        for party in parties:
            made.give(party.name, party)
            made.join(party.name)
        made.wait_until_listening()
        yield made
    finally:
        made.end()
