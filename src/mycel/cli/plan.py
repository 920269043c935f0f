"""``mycel plan``: a recipe's cost before it runs."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from mycel.recipe import load_recipe


def plan_command(name: str, overrides: list[str], as_json: bool) -> None:
    """Print the forecast of a recipe."""
    recipe = load_recipe(name, overrides)
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
    for column in ("examples", "rank", "down", "up", "compute", "round", "memory"):
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
        )
    console = Console()
    console.print(table)
    up = "the system's own" if forecast.bytes_up is None else f"{forecast.bytes_up / 1e6:.2f} MB"
    console.print(
        f"{forecast.parameters:,} parameters, {forecast.trained:,} trained; {forecast.rounds} rounds take about "
        f"{forecast.virtual_seconds:.1f} s on this fleet, {forecast.bytes_down / 1e6:.2f} MB down and {up} up"
    )
