"""Run folders as a run writes them, made up, and a reader of the pages made from them."""

from __future__ import annotations

import io
import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mycel.recipe.schema import Recipe

PARTIES = ("web", "text processing", "concurrency", "numbers", "files", "network")
HOSTILE = '<script>alert(1)</script> & "it\'s" $x_1$ [bold red]x[/] \x1b[31m 医院'


def synthetic(names: tuple[str, ...] = PARTIES, rounds: int = 8, seed: int = 7, pull: float = 1.0) -> dict[str, Any]:
    """Make a result as a run writes it: parties unlike each other, losses that fall."""
    chance = random.Random(seed)
    recipe = Recipe(title="Six teams tune one model", seed=seed, knobs={"strength": 0.1})
    per_party = {
        name: {
            "base": (base := 4.1 + chance.uniform(-0.4, 0.4)),
            "local_only": base - chance.uniform(0.7, 1.0),
            "federated": base - pull * chance.uniform(0.8, 1.3),
            "personal": base - pull * chance.uniform(1.0, 1.4),
            "centralised": base - chance.uniform(1.2, 1.5),
        }
        for name in names
    }
    up, down, count = 412_336, 409_112, len(names)
    entries: list[dict[str, Any]] = [
        {
            "round": index + 1,
            "loss": 3.02 + 1.09 * 0.62 ** (pull * (index + 1)),
            "bytes_up": up * count,
            "bytes_down": down * count,
            "virtual_seconds": 45.0 * (index + 1) + chance.uniform(0, 6),
            "answers": count - (index == 3),
            "dropped": int(index >= 3),
        }
        for index in range(rounds)
    ]
    final = entries[-1]["loss"]
    return {
        "title": recipe.title,
        "system": "fedavg",
        "recipe": {**recipe.model_dump(mode="json"), "sha256": recipe.sha256()},
        "seed": seed,
        "parties": [
            {"name": name, "samples": 320 + 7 * i, "tokens": 31_200 + 911 * i, "rank": 16, "device": f"laptop-{i}"}
            for i, name in enumerate(names)
        ],
        "rounds": entries,
        "final": {
            "loss": final,
            "perplexity": math.exp(final),
            "token_accuracy": 0.4127,
            "mixture": {"base": 4.11, "local_only_mean": 3.391, "federated": final, "centralised": 2.953},
            "own": {
                f"{arm}_mean": sum(scores[arm] for scores in per_party.values()) / count
                for arm in ("base", "local_only", "federated", "personal", "centralised")
            },
            "per_party": per_party,
        },
        "bytes": {
            "up": up * count * rounds,
            "down": down * count * rounds,
            "per_party": {name: {"up": up * rounds + 31 * i, "down": down * rounds} for i, name in enumerate(names)},
            "by_purpose": {"work": {"up": up * count * rounds, "down": down * count * rounds}},
        },
        "dropped": {"late": 0, "invalid": 0, "lost": 1},
        "state_sha256": "5f" * 32,
        "seconds": 88.2,
        "virtual_seconds": entries[-1]["virtual_seconds"] + 12.0,
        "predicted": {"virtual_seconds": 371.0, "bytes": {"up": up * count * rounds}},
        "arms": {},
    }


def events_of(result: dict[str, Any], seed: int = 3) -> list[dict[str, Any]]:
    """Make the event log of a synchronous run."""
    chance, clock, events = random.Random(seed), 0.0, []
    for entry in result["rounds"]:
        for slot in range(len(result["parties"])):
            node = {"arm": "system", "round": entry["round"] - 1, "node": slot}
            started = clock + chance.uniform(2, 6)
            computed = started + chance.uniform(14, 24)
            at = min(computed + chance.uniform(3, 9), entry["virtual_seconds"])
            events.append({"event": "ask", **node, "bytes": 409_112, "at": clock})
            if entry["round"] == 4 and slot == 2:
                events.append({"event": "drop", **node, "bytes": 412_336, "at": at, "reason": "lost"})
                continue
            answer = {"at": at, "started": started, "computed": computed, "staleness": 0, "loss": 3.2}
            events.append({"event": "answer", **node, "bytes": 412_336, **answer})
        events.append({"event": "round", "arm": "system", **entry})
        clock = entry["virtual_seconds"]
    return [{"n": number, **event} for number, event in enumerate(events)]


def save(folder: Path, result: dict[str, Any], events: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    lines = [json.dumps(event) + "\n" for event in (events_of(result) if events is None else events)]
    (folder / "events.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """Read a page back: the tables with their exact values, and every tag that was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, dict[str, list[float]]] = {}
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.shown: list[tuple[float, str]] = []
        self.table = self.row = ""
        self.in_head = False
        self.value: float | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        found = dict(attrs)
        if tag == "table":
            self.table = found["id"] or ""
            self.tables[self.table] = {}
        elif tag in ("tr", "dd"):
            self.row = ""
        elif tag == "th":
            self.in_head = True
        elif tag == "data":
            self.value = float(found["value"] or "")
            if self.table:
                self.tables[self.table].setdefault(self.row, []).append(self.value)

    def handle_endtag(self, tag: str) -> None:
        if tag == "th":
            self.in_head = False
        elif tag == "table":
            self.table = ""

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.in_head:
            self.row += data
        if self.value is not None:
            self.shown.append((self.value, data))
            self.value = None


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def terminal(table: Table) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()
