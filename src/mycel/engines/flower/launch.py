"""Flower's programs as child processes: started with what they need, ended with whoever started them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mycel.engines.children import LOOPBACK, free_port, start
from mycel.engines.line import LINE
from mycel.errors import EngineError, ExtraMissing

POLL = 0.1  # seconds after which Flower's executor looks for a message again; a second by default
SUPERLINK = "mycel"  # name of the connection in Flower's configuration

PROJECT = """[project]
name = "mycel"
version = "1.0.0"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41.0"]
[tool.flwr.app]
publisher = "mycel"
fab-format-version = 1
flwr-version-target = "1.41.0"
[tool.flwr.app.components]
serverapp = "mycel_apps:server"
clientapp = "mycel_apps:client"
[tool.flwr.app.config]
job = ""
"""
MODULE = 'from mycel.engines.flower.apps import client, server\n\n__all__ = ["client", "server"]\n'


@dataclass(frozen=True)
class Certificates:
    """Files of a server's certificate, its key, and the authority that clients trust."""

    certificate: Path
    key: Path
    authority: Path


def environment(home: Path, line: Path | None = None) -> dict[str, str]:
    """Return the environment of Flower's programs: no word to the outside, our own scripts first on the path."""
    if find_spec("flwr") is None:
        raise ExtraMissing("Flower", "federation")
    found = {
        **os.environ,
        "FLWR_HOME": str(home / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(POLL),
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    return found | ({LINE: str(line)} if line else {})


def superlink(home: Path, port: int, files: Certificates | None, line: Path) -> subprocess.Popen[bytes]:
    """Start a SuperLink on the loopback; with certificates only nodes with a registered key may join."""
    command = ["flower-superlink", "--host", LOOPBACK, "--port", str(port), "--disable-runtime-dependency-installation"]
    command += ["--database", str(home / "superlink.sqlite")]
    if files is None:
        command += ["--insecure"]
    else:
        command += ["--ssl-certfile", str(files.certificate), "--ssl-keyfile", str(files.key)]
        command += ["--ssl-ca-certfile", str(files.authority), "--enable-supernode-auth"]
    trust = f'root-certificates = "{files.authority}"' if files else "insecure = true"
    (home / "flwr").mkdir(mode=0o700, parents=True, exist_ok=True)
    (home / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "{SUPERLINK}"\n\n[superlink.{SUPERLINK}]\naddress = "{LOOPBACK}:{port}"\n{trust}\n'
    )
    write_app(home)
    return start(command, environment(home, line), home / "superlink.log")


def write_app(home: Path) -> None:
    """Write the app that Flower is to run: a door to `apps.py` of the installed package."""
    app = home / "app"
    app.mkdir(parents=True, exist_ok=True)
    for name, text in (("pyproject.toml", PROJECT), ("mycel_apps.py", MODULE), ("LICENSE", "Apache-2.0\n")):
        (app / name).write_text(text)


def supernode(
    home: Path, superlink: str, authority: Path | None, key: Path | None, line: Path
) -> subprocess.Popen[bytes]:
    """Start a SuperNode that connects to ``superlink`` and hands its messages to whoever listens at ``line``."""
    command = ["flower-supernode", "--superlink", superlink, "--host", LOOPBACK, "--port", str(free_port())]
    command += ["--node-config", f'mycel="{line}"']
    command += ["--root-certificates", str(authority)] if authority else ["--insecure"]
    command += ["--auth-supernode-private-key", str(key)] if key else []
    return start(command, environment(home), home / "supernode.log")


def _flwr(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command, silent = ["flwr", *arguments], subprocess.DEVNULL
    return subprocess.run(command, cwd=home, env=environment(home), stdin=silent, capture_output=True, text=True)


def _failure(done: subprocess.CompletedProcess[str]) -> EngineError:
    words = (done.stdout + done.stderr).strip()[-500:]
    return EngineError(f"Flower's command `{' '.join(done.args[:3])}` failed: {words}")


def flwr(home: Path, *arguments: str) -> dict[str, object]:
    """Run one of Flower's own commands and return what it says."""
    done, said = _flwr(home, *arguments, "--format", "json"), dict[str, object]()
    with suppress(ValueError):
        said = json.loads(done.stdout[max(done.stdout.find("{"), 0) :])
    if done.returncode or not said.get("success"):
        raise _failure(done)
    return said


def register(home: Path, public_key: Path) -> int:
    """Make a node's key known to the SuperLink and return the node's number."""
    return int(str(flwr(home, "supernode", "register", str(public_key), SUPERLINK)["node-id"]))


def unregister(home: Path, node: int) -> None:
    """Make the SuperLink forget a node's key."""
    flwr(home, "supernode", "unregister", str(node), SUPERLINK)


def submit(home: Path, job: str) -> str:
    """Start the ServerApp; ``job`` reaches every ClientApp. Return the run's number."""
    settings = home / "run.toml"
    settings.write_text(f"job = {json.dumps(job)}\n")
    return str(flwr(home, "run", str(home / "app"), SUPERLINK, "--run-config", str(settings))["run-id"])


def has_ended(home: Path, run: str) -> bool:
    """Whether a run's ServerApp has come to its end."""
    listed: Any = flwr(home, "list", SUPERLINK, "--run-id", run)["runs"]
    return any(str(each["status"]).startswith("finished") for each in listed)


def bundle(home: Path) -> bytes:
    """Return the app as every copy of this version packs it, to the byte."""
    write_app(home)
    for old in home.glob("*.fab"):
        old.unlink()
    done = _flwr(home, "build", "--app", str(home / "app"))
    made = list(home.glob("*.fab"))
    if len(made) != 1:
        raise _failure(done)
    return made[0].read_bytes()
