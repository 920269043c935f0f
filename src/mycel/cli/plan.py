"""``mycel plan``: a recipe's cost before it runs."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from mycel.errors import RecipeError
from mycel.recipe import load_recipe
from mycel.recipe.schema import Recipe


def plan_command(name: str, overrides: list[str], as_json: bool, fleet: str = "", least: str = "seconds") -> None:
    """Print the forecast of a recipe: of its parties, or of the ranks of its island."""
    recipe = load_recipe(name, overrides)
    if fleet:
        recipe = recipe.replace({"fleet.devices": fleet})
    if recipe.system == "synchronous" and recipe.data.parties == "pooled":
        _island(recipe, least, as_json)
        return
    with Console(stderr=True).status("reading data and model"):
        from mycel.run.execute import check_recipe
        from mycel.run.plan import make_plan

        check_recipe(recipe)
        forecast = make_plan(recipe)
    if as_json:
        content = {**asdict(forecast), "recipe_sha256": recipe.sha256(), "system": recipe.system}
        print(json.dumps(content, indent=2, allow_nan=False))
        return
    table = Table(title=f"{recipe.title or recipe.system}: one round of each party", title_justify="left")
    for column in ("party", "device"):
        table.add_column(column)
    for column in ("examples", "rank", "down", "up", "compute", "round", "memory", "energy", "money"):
        table.add_column(column, justify="right")
    for party in forecast.parties:
        table.add_row(
            party.name,
            party.device,
            f"{party.samples:,}",
            str(party.rank or "-"),
            f"{party.bytes_down / 1e3:,.1f} kB",
            "system's own" if party.bytes_up is None else f"{party.bytes_up / 1e3:,.1f} kB",
            f"{party.compute_seconds:.2f} s",
            f"{party.round_seconds:.2f} s",
            f"{party.peak_bytes / 1e6:,.0f} MB",
            f"{party.joules:,.0f} J",
            f"{party.money:.2g}",
        )
    console = Console()
    console.print(table)
    up = "the system's own" if forecast.bytes_up is None else f"{forecast.bytes_up / 1e6:.2f} MB"
    console.print(
        f"{forecast.parameters:,} parameters, {forecast.trained:,} trained; {forecast.rounds} rounds take about "
        f"{forecast.virtual_seconds:.1f} s on this fleet, {forecast.bytes_down / 1e6:.2f} MB down and {up} up"
    )


def _island(recipe: Recipe, least: str, as_json: bool) -> None:
    from mycel.decisions.cost import rank_money
    from mycel.decisions.planner import UNITS
    from mycel.run.placing import plan_island

    if least not in UNITS:
        raise RecipeError(f"--least is {least!r}; it is {', '.join(UNITS)}")
    plan = plan_island(recipe, least)
    if as_json:
        content = {**plan.as_json(), "recipe_sha256": recipe.sha256(), "system": recipe.system}
        print(json.dumps(content, indent=2, allow_nan=False))
        return
    console, best = Console(), plan.placements[0]
    table = Table(title=f"{recipe.title or recipe.system}: the best plan, one step", title_justify="left")
    for column in ("device", "does"):
        table.add_column(column)
    for column in ("seconds", "sends", "memory", "energy", "money"):
        table.add_column(column, justify="right")
    inside = len(best.devices) // best.layout.pipeline
    for index, (device, rank) in enumerate(zip(best.devices, best.predicted.ranks, strict=True)):
        first = sum(best.split[: index // inside])
        does = f"blocks {first} to {first + best.split[index // inside] - 1}, rank {index % inside + 1} of {inside}"
        table.add_row(
            device.name,
            does,
            f"{rank.seconds:.3g} s",
            f"{rank.bytes / 1e6:,.2f} MB",
            f"{rank.memory / 1e6:,.0f} MB",
            f"{device.watts * best.predicted.seconds:.3g} J",
            f"{rank_money(device, rank, best.predicted.seconds):.2g}",
        )
    console.print(table)
    for place, placement in enumerate(plan.placements, 1):
        layout, predicted = placement.layout, placement.predicted
        degrees = ", ".join(f"{axis} {getattr(layout, axis)}" for axis in ("data", "tensor", "pipeline", "sequence"))
        console.print(
            f"{place}. {', '.join(device.name for device in placement.devices)}: {degrees}"
            f"{', recomputing' if layout.recompute else ''}; a step {predicted.seconds:.3g} s, "
            f"{predicted.bytes / 1e6:.2f} MB, {predicted.joules:.3g} J, {predicted.money:.2g} of money; "
            f"{plan.steps} steps {predicted.seconds * plan.steps:,.1f} s"
        )
    if plan.advice:
        console.print(plan.advice)
    for device_name, reason in plan.left_out.items():
        console.print(f"without {device_name}: {reason}")
