"""The command line: a few verbs, each a thin door to a room; nothing heavy is imported until a verb needs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mycel.cli.demo import demo_app
from mycel.cli.fleet import fleet_app
from mycel.cli.keys import keys_app
from mycel.cli.serving import add_serving_commands
from mycel.cli.swarming import add_swarm_commands
from mycel.errors import MycelError

app = typer.Typer(
    name="mycel",
    help="Train, tune, align, compress, retrieve for and serve models on machines that do not belong together.",
    epilog="First steps: mycel run quickstart  ·  mycel demo swarm  ·  mycel demo federation  ·  mycel systems",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
RUNS, FEDERATION, MACHINES = "Recipes and runs", "A federation", "Machines, and a first look"
INTERRUPTED = 130  # the exit status that typer makes of a keyboard interrupt

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else.")]
RecipeName = Annotated[str, typer.Argument(help="A built-in name, a TOML file, or file.py:function.", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides, e.g. rounds.count=3 wire.codec=int8.", metavar="[KEY=VALUE]...")
]


def main() -> None:
    """Run the command line; an expected error is one sentence and exit status 1."""
    try:
        app()
    except MycelError as error:
        print(f"mycel: {error}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            print("mycel: stopped; `--resume` goes on from the last round", file=sys.stderr)
        raise


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, allow_nan=False))


@app.command(rich_help_panel=RUNS, epilog="Example: mycel run quickstart seed=2 rounds.count=4 --out runs/second")
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/RECIPE-SEED.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    on: Annotated[str, typer.Option(help="Run it on the federation whose coordinator listens at HOST:PORT.")] = "",
    key: Annotated[Path | None, typer.Option(help="Operator's key, for a coordinator on another machine.")] = None,
    nproc: Annotated[int, typer.Option(min=0, help="Run it inside one island, on so many ranks.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: show progress, then a table; the folder keeps the log, the result, the report and the model."""
    import os

    if nproc or {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        from mycel.cli.island import island_command

        island_command(recipe, overrides or [], out, resume, as_json, nproc)
        return
    from mycel.cli.run import run_command

    run_command(recipe, overrides or [], out, resume, as_json, on, key)


@app.command(rich_help_panel=RUNS, epilog="Example: mycel plan quickstart trainable.rank=32 wire.codec=int8")
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    fleet: Annotated[str, typer.Option(help="A built-in fleet or a fleet.toml; default: the recipe's.")] = "",
    least: Annotated[str, typer.Option(help="What an island's plan makes least: seconds, joules, money.")] = "seconds",
    as_json: AsJson = False,
) -> None:
    """Say who does what and what it will cost before it runs: seconds, bytes, memory, joules and money."""
    from mycel.cli.plan import plan_command

    plan_command(recipe, overrides or [], as_json, fleet, least)


@app.command(rich_help_panel=RUNS, epilog="Example: mycel systems --json")
def systems(as_json: AsJson = False) -> None:
    """List the systems: number in the catalogue, paper, stage, way, and the claim that is measured."""
    from mycel.cli.systems import systems_command

    systems_command(as_json)


@app.command(rich_help_panel=RUNS, epilog="Example: mycel claims fedkseed ferret --json")
def claims(
    names: Annotated[
        list[str] | None, typer.Argument(help="Systems; all when none is named.", metavar="[NAME]...")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what papers claim: paper says, measured here, verdict."""
    from mycel.cli.claims import claims_command

    claims_command(names or [], as_json)


@app.command(rich_help_panel=RUNS, epilog="Example: mycel report runs/quickstart-1")
def report(folder: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="DIR")]) -> None:
    """Write the report page of a run again and say where it is."""
    from mycel.report import write_report, write_serving_report

    served = (folder / "requests.jsonl").is_file()
    typer.echo(str(write_serving_report(folder) if served else write_report(folder)))


@app.command(rich_help_panel=RUNS, epilog="Example: mycel audit runs/quickstart-1")
def audit(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="DIR")],
    as_json: AsJson = False,
) -> None:
    """Say what crossed the wire in a run, and prove by content that what was to stay home did."""
    from mycel.cli.audit import audit_command

    audit_command(folder, as_json)


@app.command(rich_help_panel=RUNS, epilog="Example: mycel compare runs/quickstart-1 runs/quickstart-2")
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs.", metavar="DIR DIR...")],
    out: Annotated[Path, typer.Option(help="Page with overlaid curves.")] = Path("comparison.html"),
    as_json: AsJson = False,
) -> None:
    """Compare runs: a table, and a page of loss against rounds, bytes and virtual time."""
    from mycel.cli.compare import compare_command

    compare_command(folders, out, as_json)


@app.command(rich_help_panel=MACHINES, epilog="Example: mycel doctor --json")
def doctor(as_json: AsJson = False) -> None:
    """Check this machine: Python, libraries, cores, memory, disk, cache and model hub; one line to mend each fault."""
    from mycel.cli.doctor import doctor_command

    doctor_command(as_json)


@app.command(rich_help_panel=FEDERATION, epilog="Example: mycel coordinator --listen 0.0.0.0:7400 --keys keys")
def coordinator(
    listen: Annotated[str, typer.Option(help="HOST:PORT at which parties are expected.")],
    keys: Annotated[Path | None, typer.Option(help="Folder that `mycel keys init` made.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS, no keys: for trials only.")] = False,
) -> None:
    """Serve as a federation's coordinator, on Flower: known parties only, over TLS."""
    from mycel.cli.federation import coordinator_command

    coordinator_command(listen, keys, insecure)


@app.command(
    rich_help_panel=FEDERATION, epilog="Example: mycel join fed.example.org:7400 --key clinic.pem --data ./private"
)
def join(
    address: Annotated[str, typer.Argument(help="HOST:PORT of the coordinator.", metavar="HOST:PORT")],
    data: Annotated[Path, typer.Option(help="This party's examples, a file or folder; they never leave.")],
    key: Annotated[Path | None, typer.Option(help="This party's key file.")] = None,
    name: Annotated[str, typer.Option(help="Name without a key; with one, the key's certificate says it.")] = "",
    consent: Annotated[Path | None, typer.Option(help="TOML file of what this party is willing to do.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS, no key: for trials only.")] = False,
    nproc: Annotated[int, typer.Option(min=1, help="This party is an island of so many ranks here.")] = 1,
) -> None:
    """Take part in a federation with private data; connections go outwards only."""
    from mycel.cli.federation import join_command

    join_command(address, key, data, name, consent, insecure, nproc)


@app.command(
    rich_help_panel=FEDERATION, epilog="Example: mycel status 127.0.0.1:7400 --json  ·  mycel status ./our-swarm"
)
def status(
    address: Annotated[str, typer.Argument(help="HOST:PORT of a coordinator, or a swarm's folder.", metavar="PLACE")],
    key: Annotated[Path | None, typer.Option(help="Operator's key, for a coordinator on another machine.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a federation's parties, leases, round, bytes and deadlines, or who holds which blocks of a swarm."""
    if Path(address).is_dir():
        from mycel.cli.swarm import swarm_status_command

        swarm_status_command(address, as_json)
        return
    from mycel.cli.federation import status_command

    status_command(address, as_json, key)


app.add_typer(keys_app, name="keys", rich_help_panel=FEDERATION)
add_swarm_commands(app)
add_serving_commands(app)
app.add_typer(fleet_app, name="fleet", rich_help_panel=MACHINES)
app.add_typer(demo_app, name="demo", rich_help_panel=MACHINES)
