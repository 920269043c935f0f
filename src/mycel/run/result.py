"""What a run comes to: the content of ``result.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from mycel.evaluate.metrics import Scores
from mycel.recipe.schema import Recipe
from mycel.rounds.probe import Probes
from mycel.rounds.simulation import Finished
from mycel.rounds.world import Node
from mycel.run.curves import arm_entries

NAMES = {
    "base": "base",
    "local": "local_only",
    "system": "federated",
    "centralised": "centralised",
    "personal": "personal",
}


def build_result(recipe: Recipe, finished: Mapping[str, Finished], probes: Probes, seconds: float) -> dict[str, Any]:
    """Return the result as JSON-able values; losses are mean nats per target token on held-out examples."""
    main = finished["system"]
    nodes = main.world.nodes
    own = {name: probes.own(name) if name in probes.scores else arm.scores() for name, arm in finished.items()}
    own = {name: scores for name, scores in own.items() if name in NAMES}
    own["base"] = probes.own("base") if "base" in probes.scores else main.scores(0)
    mixture = {
        name: _finite(probes.mixture(name) if name in probes.scores else _together(arm.scores()).loss)
        for name, arm in finished.items()
    }
    final = _together(own["system"])
    return {
        "title": recipe.title,
        "system": recipe.system,
        "recipe": {**recipe.model_dump(mode="json"), "sha256": recipe.sha256()},
        "seed": recipe.seed,
        "parties": [_party(node, main) for node in nodes],
        "rounds": _rounds(main),
        "final": {
            "loss": mixture["system"],
            "perplexity": _finite(final.perplexity),
            "token_accuracy": _finite(final.token_accuracy),
            "mixture": {
                "base": _finite(_together(own["base"]).loss),
                "local_only_mean": mixture.get("local"),
                "federated": mixture["system"],
                "centralised": mixture.get("centralised"),
                "personal_mean": mixture.get("personal"),
            },
            "own": {f"{NAMES[name]}_mean": _mean(scores) for name, scores in own.items()},
            "per_party": {
                node.name: {
                    NAMES[name]: _finite(scores[node.index].loss)
                    for name, scores in own.items()
                    if node.index in scores
                }
                for node in nodes
            },
        },
        "bytes": _bytes(main, nodes),
        "dropped": {"late": 0, "invalid": 0, "lost": 0, **main.progress.drops},
        "state_sha256": main.state.sha256(),
        "seconds": round(seconds, 3),
        "virtual_seconds": main.virtual_seconds,
        "guard": dict(main.guard),
        "arms": arm_entries(recipe, finished, mixture),
    }


def _together(scores: Mapping[int, Scores]) -> Scores:
    return sum(scores.values(), Scores())


def _mean(scores: Mapping[int, Scores]) -> float | None:
    return _finite(fmean(score.loss for score in scores.values())) if scores else None


def _finite(number: float) -> float | None:
    """Return what JSON can hold: a loss no party could report, or that overflowed, is null."""
    return number if math.isfinite(number) else None


def _party(node: Node, main: Finished) -> dict[str, Any]:
    return {
        "name": node.name,
        "samples": node.samples,
        "tokens": round(node.samples * node.mean_tokens),
        "rank": node.rank,
        "device": main.world.device(node.index).name,
    }


def _rounds(main: Finished) -> list[dict[str, Any]]:
    entries = []
    for entry in main.progress.rounds:
        seen = {key: value for key, value in entry.items() if not key.startswith("total_")}
        scores = main.scores(entry["round"])
        loss = _finite(main.loss(entry["round"])) if scores else None
        entries.append({**seen, "loss": loss})
    return entries


def _bytes(main: Finished, nodes: list[Node]) -> dict[str, Any]:
    meter = main.meter
    return {
        "up": meter.total("up"),
        "down": meter.total("down"),
        "per_party": {node.name: {way: meter.total(way, node=node.index) for way in ("up", "down")} for node in nodes},
        "by_purpose": {
            purpose: {way: meter.total(way, purpose=purpose) for way in ("up", "down")}
            for purpose in ("work", "deliver", "late", "guard")
        },
    }
