"""Fleets with a name, and fleets from a file."""

from __future__ import annotations

import math
import tomllib
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mycel.errors import RecipeError
from mycel.fleet.device import Device, Fleet, Link

# The fields of decisions.cost.Coefficients.
CALIBRATED = ("operation", "call", "update", "copy", "contention", "activation", "reference", "cores")
MAY_BE_ZERO = {"latency_ms", "price_per_gib", "price_per_hour"}
_HOME = Link(up_mbps=20, down_mbps=100, latency_ms=20)
_OFFICE = Link(up_mbps=200, down_mbps=200, latency_ms=8)
_MOBILE = Link(up_mbps=8, down_mbps=40, latency_ms=45)

PROFILES: dict[str, Fleet] = {
    "six-laptops": Fleet(
        "six-laptops",
        (
            Device("laptop-a", gflops=60, link=_HOME),
            Device("laptop-b", gflops=45, link=_HOME),
            Device("laptop-c", gflops=80, link=_OFFICE),
            Device("laptop-d", gflops=30, link=_MOBILE),
            Device("laptop-e", gflops=55, link=_OFFICE),
            Device("laptop-f", gflops=40, link=_HOME),
        ),
    ),
    "equal": Fleet("equal", (Device("device", gflops=50, link=_HOME),)),
    "unequal": Fleet(
        "unequal",
        (
            Device("workstation", gflops=400, memory_gib=24, watts=200, link=_OFFICE),
            Device("laptop", gflops=60, link=_HOME),
            Device("old-laptop", gflops=15, memory_gib=4, link=_HOME),
            Device("phone", gflops=6, memory_gib=3, watts=4, link=_MOBILE),
        ),
    ),
    "islands": Fleet(
        "islands",
        # Speeds of 1 : 1.3 : 2.6 : 5.7, as asynchronous local SGD was measured with, over thin, unequal links.
        (
            Device("campus", gflops=100, memory_gib=64, watts=300, link=Link(200, 200, 15)),
            Device("lab", gflops=77, memory_gib=48, watts=250, link=Link(100, 100, 25)),
            Device("office", gflops=38.5, memory_gib=32, watts=120, link=Link(50, 100, 35)),
            Device("home", gflops=17.5, memory_gib=16, watts=60, link=Link(20, 80, 40)),
        ),
    ),
    "flaky": Fleet(
        "flaky",
        (
            Device("steady", gflops=50, link=_HOME),
            Device("sleepy", gflops=25, reliability=0.7, link=_MOBILE),
            Device("steady-too", gflops=60, link=_HOME),
        ),
    ),
}


def load_fleet(name: str) -> Fleet:
    """Return a built-in profile, or the fleet that a TOML file of ``[[device]]`` tables describes."""
    if name in PROFILES:
        return PROFILES[name]
    path = Path(name)
    if path.suffix != ".toml":
        near = get_close_matches(name, PROFILES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"built in are {', '.join(PROFILES)}; or name a .toml file"
        raise RecipeError(f"fleet.devices is {name!r}, which is no known fleet: {hint}")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise RecipeError(f"fleet.devices names the file {name!r}, which {reason}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"the fleet file {name!r} is not TOML: {error}") from error
    tables = content.get("device")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise RecipeError(f"the fleet file {name!r} holds no [[device]] table; one per machine is needed")
    devices = tuple(_device(table, index, name) for index, table in enumerate(tables))
    _check_names(devices, name)
    return Fleet(path.stem, devices, _calibration(content.get("calibration", {}), name))


def _calibration(table: Any, source: str) -> dict[str, float]:
    if not isinstance(table, dict):
        raise RecipeError(f"calibration of the fleet file {source!r} is {table!r}; a table is needed")
    for key, value in table.items():
        if key not in CALIBRATED:
            raise RecipeError(
                f"calibration of {source!r} has the unknown key {key!r}; known are {', '.join(CALIBRATED)}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise RecipeError(f"calibration.{key} of {source!r} is {value!r}; a finite number of 0 or more is needed")
    return {key: float(value) for key, value in table.items()}


def _check_names(devices: tuple[Device, ...], source: str) -> None:
    names = [device.name for device in devices]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise RecipeError(
            f"the fleet file {source!r} names the device {twice[0]!r} twice; each needs a name of its own"
        )
    for device in devices:
        for other in device.unreachable:
            if other not in names or other == device.name:
                near = get_close_matches(other, [name for name in names if name != device.name], 1)
                hint = f"did you mean {near[0]!r}?" if near else f"the others are {', '.join(names)}"
                raise RecipeError(
                    f"unreachable of the device {device.name!r} names {other!r}, which is no other: {hint}"
                )


def _device(table: dict[str, Any], index: int, source: str) -> Device:
    where = f"device {index + 1} of {source!r}"
    values = dict(table)
    table = values.pop("link", {})
    if not isinstance(table, dict):
        raise RecipeError(f"link of {where} is {table!r}; a table such as {{ up_mbps = 20 }} is needed")
    link = Link(**_numbers(table, Link, f"link of {where}"))
    name = str(values.pop("name", f"device-{index}"))
    unreachable = values.pop("unreachable", [])
    if not isinstance(unreachable, list) or not all(isinstance(other, str) for other in unreachable):
        raise RecipeError(f"unreachable of {where} is {unreachable!r}; a list of devices' names is needed")
    device = Device(name=name, link=link, unreachable=tuple(unreachable), **_numbers(values, Device, where))
    if not 0 < device.reliability <= 1:
        raise RecipeError(f"reliability of {where} is {device.reliability}; it lies above 0 and at most 1")
    return device


def _numbers(table: dict[str, Any], kind: type[Device] | type[Link], where: str) -> dict[str, float]:
    known = [item.name for item in fields(kind) if item.name not in {"name", "link", "unreachable"}]
    for key, value in table.items():
        if key not in known:
            near = get_close_matches(key, known, 1)
            raise RecipeError(
                f"{where} has the unknown key {key!r}; "
                + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}")
            )
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and key not in MAY_BE_ZERO):
            raise RecipeError(f"{key} of {where} is {value!r}; a finite number above zero is needed")
    return {key: float(value) for key, value in table.items()}
