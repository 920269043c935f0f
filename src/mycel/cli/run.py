"""``mycel run``: live progress on standard error, a table or JSON on standard output."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from mycel.cli.progress import show_progress
from mycel.recipe import load_recipe


def run_command(
    name: str,
    overrides: list[str],
    out: Path | None,
    resume: bool,
    as_json: bool,
    on: str = "",
    key: Path | None = None,
) -> None:
    """Run a recipe for a person or a script."""
    recipe = load_recipe(name, overrides)
    folder = out or Path("runs") / f"{Path(name.partition(':')[0]).stem}-{recipe.seed}"
    messages = Console(stderr=True)
    messages.print(f"[bold]{recipe.title or recipe.system}[/bold]  (system {recipe.system}, seed {recipe.seed})")
    with show_progress(messages) as watcher:
        watcher.phase("loading libraries", 0, 1)
        if on:
            from mycel.federation.execute import run_federated

            watcher.phase("loading libraries", 1, 1)
            result = run_federated(recipe, on, folder, resume, watcher, key)
        else:
            from mycel.run.execute import run_recipe

            watcher.phase("loading libraries", 1, 1)
            result = run_recipe(recipe, folder, resume, watcher)
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
        return
    from mycel.report import bytes_line, summary_table, ways_table

    console = Console()
    ways = ways_table(result)
    console.print(summary_table(result) if ways is None else ways)
    console.print(bytes_line(result))
    if "left_out" in result:
        console.print(result["left_out"])
    console.print(f"run folder  {folder}\nreport      {folder / 'report.html'}\nmodel       {folder / 'model'}")
    console.print("\nNext:")
    console.print(
        f"  mycel run {name} seed={recipe.seed + 1} wire.codec=int8   [dim]# another seed, a quarter of the bytes[/dim]"
    )
    console.print("  mycel claims fedavg flora_stacking        [dim]# what papers claim, measured here[/dim]")
    console.print(f"  mycel compare {folder} OTHER_RUN           [dim]# two runs side by side[/dim]")
