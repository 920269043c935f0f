"""``mycel fleet probe``: what this machine can do, as a fleet file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

fleet_app = typer.Typer(help="Describe the machines that take part.", no_args_is_help=True)


@fleet_app.callback()
def about() -> None:
    """Describe the machines that take part."""


@fleet_app.command(epilog="Example: mycel fleet probe --out fleet.toml")
def probe(
    out: Annotated[Path, typer.Option(help="File to write; it must not exist.")] = Path("fleet.toml"),
    seconds: Annotated[float, typer.Option(min=0.1, max=300, help="How long to measure, about.")] = 20.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Measure a core's training speed, memory and what ranks cost each other here; write a fleet of one device."""
    from rich.console import Console

    from mycel.fleet.probe import probe as measure
    from mycel.fleet.probe import refuse_existing, write_probe

    refuse_existing(out)
    from mycel.run.calibrating import calibrate

    with Console(stderr=True).status("measuring this machine"):
        found = measure(*calibrate(0.9 * seconds), 0.1 * seconds)
    write_probe(out, found)
    if as_json:
        print(json.dumps({**asdict(found), "file": str(out)}, indent=2, allow_nan=False))
        return
    Console().print(
        f"{found.name}: {found.gflops:.1f} GFLOP/s training on one of {found.calibration['cores']:.0f} cores, "
        f"{found.memory_gib:.1f} GiB free; ranks exchange {1e-6 / found.calibration['copy']:,.0f} MB/s, "
        f"{1e6 * found.calibration['call']:.0f} us a call\n"
        f"written to {out}; add watts, prices and the links that really join the machines, then: "
        f"mycel plan island --fleet {out}"
    )
