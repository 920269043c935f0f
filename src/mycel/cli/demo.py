"""``mycel demo``: things to see without preparing anything."""

from __future__ import annotations

from typing import Annotated

import typer

demo_app = typer.Typer(no_args_is_help=True, help="See something work, without preparing anything.")


@demo_app.callback()
def _demos() -> None:
    """Keep ``federation`` a command of its own name, although it is alone."""


@demo_app.command("federation", epilog="Example: mycel demo federation rounds.count=3 --json")
def federation(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides of the recipe.", metavar="[KEY=VALUE]...")
    ] = None,
    recipe: Annotated[str, typer.Option(help="The recipe.")] = "quickstart",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run a coordinator and three parties as real processes with fresh keys; compare with the run in process."""
    from mycel.cli.demo_federation import demo_command

    demo_command(recipe, overrides or [], as_json)


@demo_app.command("swarm", epilog="Example: mycel demo swarm --json")
def swarm(
    model: Annotated[str, typer.Option(help="The model that the peers hold in pieces.")] = "tiny",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Hold a model on four peers, kill one in the middle of an answer, and finish the same answer."""
    from mycel.cli.demo_swarm import demo_swarm_command

    demo_swarm_command(model, as_json)
