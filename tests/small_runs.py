"""Small recipes over three parties' own files, and the command line in a process of its own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from mycel.recipe.schema import Recipe

WORDS = [
    "the",
    "party",
    "keeps",
    "its",
    "text",
    "at",
    "home",
    "and",
    "sends",
    "a",
    "change",
    "of",
    "few",
    "numbers",
    "that",
    "moves",
    "one",
    "model",
    "for",
    "all",
]


def write_parties(folder: Path) -> list[str]:
    """Write a JSONL file of prompts and responses for each of three parties."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for party in range(3):
        chance, path = random.Random(party), folder / f"party-{party}.jsonl"
        rows = [
            {"prompt": " ".join(chance.sample(WORDS, 4)), "response": " ".join(chance.sample(WORDS, 5))}
            for _ in range(24)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        paths.append(str(path))
    return paths


def small_recipe(folder: Path, changes: dict[str, Any] | None = None) -> Recipe:
    """Return a recipe of three rounds of two steps on the smallest base."""
    start = {
        "title": "Three parties and three rounds",
        "model.base": "micro",
        "trainable.rank": 2,
        "data.parties": write_parties(folder),
        "data.examples": 12,
        "data.held_out": 4,
        "data.max_length": 24,
        "training.batch_size": 2,
        "rounds.count": 3,
        "rounds.local_steps": 2,
        "engine.workers": 0,
    }
    return Recipe().replace({**start, **(changes or {})})


def write_recipe(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """Write the small recipe as TOML."""
    path = folder / "small.toml"
    path.write_text(small_recipe(folder / "data", changes).to_toml(), encoding="utf-8")
    return path


def command(*words: str | Path) -> list[str]:
    """Return the command line that runs ``mycel`` with ``words``."""
    return [sys.executable, "-m", "mycel", *map(str, words)]


def environment() -> dict[str, str]:
    """Return this process's environment, in which another one finds the same package."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "COLUMNS": "200"}


def mycel(*words: str | Path, folder: Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run ``mycel`` in ``folder`` and check its exit status."""
    done = subprocess.run(
        command(*words), cwd=folder, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == expect, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def events_of(folder: Path) -> list[dict[str, Any]]:
    """Return the events of a run; every line parses."""
    return [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def without_seconds(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result without the one entry that differs from run to run."""
    return {key: value for key, value in result.items() if key != "seconds"}
