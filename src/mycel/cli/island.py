"""``mycel run --nproc N``, or under ``torchrun``: the inside of one island."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from mycel.errors import RecipeError
from mycel.recipe import load_recipe

if TYPE_CHECKING:
    from mycel.recipe.schema import Recipe


def island_command(name: str, overrides: list[str], out: Path | None, resume: bool, as_json: bool, ranks: int) -> None:
    """Start the ranks of an island, or be one of those that were started."""
    recipe = load_recipe(name, overrides)
    folder = out or Path("runs") / f"{Path(name.partition(':')[0]).stem}-{recipe.seed}"
    from mycel.collectives.ranks import under_torchrun
    from mycel.run.island import check_island, run_island
    from mycel.run.launching import launch

    if not under_torchrun():
        check_island(recipe, ranks)
        if recipe.layout.recovery != "restart":
            from mycel.run.enduring import run_enduring

            _show(recipe, run_enduring(recipe, folder, resume), folder, as_json)
            return
        words = ["run", name, *overrides, "--out", str(folder), *(["--json"] * as_json)]
        raise typer.Exit(launch(recipe, words, ranks, folder, resume))
    if recipe.layout.recovery != "restart":
        raise RecipeError(
            f"layout.recovery is {recipe.layout.recovery!r}, for ranks of one machine that mycel itself starts: "
            'use --nproc, or set it to "restart" under torchrun'
        )
    result = run_island(recipe, folder, resume)
    if result is not None:
        _show(recipe, result, folder, as_json)


def _show(recipe: Recipe, result: dict[str, Any], folder: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
        return
    from mycel.report.wording import loss_text

    losses, console = result["final"]["mixture"], Console()
    if "recoveries" in result:
        told = f"{len(result['recoveries'])} deaths survived"
    else:
        sent = f"{result['bytes']['up'] / 1e6:.1f} MB sent by rank 0"
        foretold = result.get("predicted", {}).get("step_seconds")
        said = f" (foretold for the fleet {recipe.fleet.devices}: {foretold:.3f})" if foretold else ""
        told = f"median step {result['step_seconds'] or 0:.3f} s{said}, {sent}"
    console.print(
        f"{result['ranks']} ranks: held-out loss from {loss_text(losses['base'])} to {loss_text(losses['federated'])} "
        f"in {recipe.rounds.count} steps; {told}\nrun folder  {folder}\nmodel       {folder / 'model'}"
    )
