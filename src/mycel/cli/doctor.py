"""``mycel doctor``: what this machine has, and one line to mend each fault."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "datasets", "safetensors")
MEMORY_GIB = 2.0
DISK_GIB = 2.0
HUB = "huggingface.co"


@dataclass(frozen=True)
class Finding:
    """One thing looked at: whether it is well, what was found, and what would mend it."""

    name: str
    well: bool
    found: str
    mend: str = ""


def doctor_command(as_json: bool) -> None:
    """Look at everything and print it; the exit status is 1 when something needed is missing."""
    checks: tuple[Callable[[], Finding], ...] = (
        _python,
        *map(_library, LIBRARIES),
        _cores,
        _memory,
        _disk,
        _cache,
        _hub,
    )
    findings = [check() for check in checks]
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        table = Table(show_header=False, box=None)
        for finding in findings:
            mark = "[green]well[/green]" if finding.well else "[yellow]mend[/yellow]"
            table.add_row(mark, finding.name, finding.found, finding.mend)
        Console().print(table)
    if not all(finding.well or finding.name == "model hub" for finding in findings):
        raise SystemExit(1)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding(
        "python", sys.version_info >= (3, 11), version, "" if sys.version_info >= (3, 11) else "3.11 or newer"
    )


def _library(name: str) -> Callable[[], Finding]:
    def check() -> Finding:
        try:
            return Finding(name, True, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            return Finding(name, False, "not installed", f"pip install {name}")

    return check


def _cores() -> Finding:
    return Finding("cores", True, f"{os.cpu_count()}, one worker process each")


def _memory() -> Finding:
    free = psutil.virtual_memory().available / 2**30
    mend = "" if free >= MEMORY_GIB else f"{MEMORY_GIB:g} GiB are wanted: close something, or engine.workers=1"
    return Finding("memory", free >= MEMORY_GIB, f"{free:.1f} GiB available", mend)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    mend = "" if free >= DISK_GIB else f"{DISK_GIB:g} GiB are wanted here: make room or use --out elsewhere"
    return Finding("disk", free >= DISK_GIB, f"{free:.1f} GiB free here", mend)


def _cache() -> Finding:
    from platformdirs import user_cache_dir

    folder = Path(os.environ.get("MYCEL_CACHE") or user_cache_dir("mycel"))
    parent = next(place for place in (folder, *folder.parents) if place.exists())
    well = os.access(parent, os.W_OK)
    return Finding("cache", well, str(folder), "" if well else "set MYCEL_CACHE to a folder that can be written")


def _hub() -> Finding:
    try:
        socket.create_connection((HUB, 443), timeout=2).close()
    except OSError:
        return Finding("model hub", False, "not reachable", "built-in sizes and local paths work without it")
    return Finding("model hub", True, "reachable")
