"""Run a recipe inside one island: ranks over `torch.distributed`, sharded checkpoints, one result at rank 0."""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mycel.collectives.program import Course, Program, checkpoint_folder
from mycel.collectives.ranks import island
from mycel.collectives.saving import Checkpoints
from mycel.data.cleaned import parse_cleaning
from mycel.data.parties import load_parties
from mycel.data.tokens import TokenStore
from mycel.decisions.layout import check_layout, ranks_of
from mycel.errors import EngineError, RecipeError, RunError
from mycel.models.base import Base, find_base, open_base, save_model
from mycel.models.layers import weight_sites
from mycel.recipe.schema import Recipe
from mycel.rounds.registry import load_system
from mycel.run.folder import RunFolder, write_json
from mycel.run.foretelling import foretold
from mycel.run.log import EventLog
from mycel.wire.algebra import seed_of

TRAINED = ("synchronous",)  # systems whose steps the ranks of one island can take


def check_island(recipe: Recipe, ranks: int) -> None:
    """Refuse what the ranks of an island cannot train, before any of them starts."""
    if recipe.system not in TRAINED:
        raise RecipeError(
            f"system is {recipe.system!r}, and the ranks of one island train in step: "
            'set system = "synchronous", or run without --nproc'
        )
    load_system(recipe)
    parse_cleaning(recipe.data.cleaning)
    if not recipe.data.pack:
        raise RecipeError("data.pack is false, and the ranks of an island need rows of one length: set it to true")
    base = open_base(find_base(recipe.model.base))
    check_layout(recipe.layout, ranks, base.model.config, recipe.training.batch_size, recipe.data.max_length)


def run_island(recipe: Recipe, out: Path, resume: bool) -> dict[str, Any] | None:
    """Train as one rank of the island that the environment describes; the result at rank 0, None elsewhere."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    check_island(recipe, int(os.environ["WORLD_SIZE"]))
    started, folder = time.monotonic(), RunFolder(out)
    with ExitStack() as stack:
        ranks = stack.enter_context(island(recipe.layout))
        base = open_base(find_base(recipe.model.base))
        if ranks.first:
            stack.enter_context(folder.held(recipe, resume))
            write_tokens(recipe, base, folder)
        dist.barrier()
        store = TokenStore.open(folder.tokens)
        program = Program(recipe, ranks, base, start_weights(recipe, base), load_system(recipe).rate)  # type: ignore[attr-defined]
        log = EventLog(folder.events) if ranks.first else None
        earlier = _losses(folder.events) if ranks.first else {}
        saves = Checkpoints(checkpoint_folder(out), recipe.sha256())

        def note(step: int, loss: float) -> None:
            assert log is not None
            log.record("step", "island", step=step, loss=loss)

        try:
            before = program.evaluate(store.held_out(0))
            course = program.train(store.pooled(), recipe.rounds.count, saves, note)
            after = program.evaluate(store.held_out(0))
        except FloatingPointError as error:
            raise RunError(str(error)) from error
        finally:
            if log is not None:
                log.close()
        weights = program.collect()
        if not ranks.first:
            return None
        result = _result(recipe, folder, store, course, (before, after), time.monotonic() - started)
        result["predicted"] = foretold(recipe, base.model.config)
        result["curve"]["before"] = [earlier.get(step) for step in range(course.first)]
        save_weights(base, weights, folder)
        write_json(folder.result, result)
        return result


def _losses(events: Path) -> dict[int, float]:
    """Each step's loss that the log of a run knows, the last one where a step was taken again."""
    entries = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()] if events.exists() else []
    return {entry["step"]: entry["loss"] for entry in entries if entry["event"] == "step"}


def start_weights(recipe: Recipe, base: Base) -> dict[str, torch.Tensor]:
    """Weights that a run begins from: drawn anew, or the base's."""
    from mycel.pretrain.weights import fresh_weights

    if recipe.knobs.get("fresh", True):
        return fresh_weights(base, seed_of(recipe.seed, "coordinator", "fresh weights"))
    return {name: weight.detach().clone() for name, weight in base.model.named_parameters()}


def write_tokens(recipe: Recipe, base: Base, folder: RunFolder) -> None:
    """Tokenise the recipe's text into the run folder, once."""
    if not folder.tokens.exists():
        parties = load_parties(recipe.data, recipe.seed)
        if recipe.data.cleaning:
            write_json(folder.cleaning, {party.name: party.cleaned for party in parties})
        temporary = folder.tokens.with_name(".tokens.safetensors")
        TokenStore.build(parties, base.tokenizer, recipe.data.max_length, True).save(temporary)
        temporary.replace(folder.tokens)


def save_weights(base: Base, weights: dict[str, torch.Tensor], folder: RunFolder) -> None:
    """Put whole weights into the base and write it as the run's model."""
    sites = weight_sites(base.model)
    with torch.no_grad():
        for name, tensor in weights.items():
            if name not in sites:
                raise EngineError(f"the island's weight {name!r} is none of the base's")
            module, leaf = sites[name][0]
            getattr(module, leaf).copy_(tensor)
    save_model(base, folder.model)


def about(recipe: Recipe, folder: RunFolder, losses: tuple[float, float]) -> dict[str, Any]:
    """Return what every result of an island says: which run it was, what cleaning left, and the held-out losses.

    A loss that is no number, as where the held-out text fills no batch, is None.
    """
    before, after = (loss if math.isfinite(loss) else None for loss in losses)
    cleaned = {"cleaning": json.loads(folder.cleaning.read_text(encoding="utf-8"))} if recipe.data.cleaning else {}
    return {
        "title": recipe.title,
        "system": recipe.system,
        "recipe": {**recipe.model_dump(mode="json"), "sha256": recipe.sha256()},
        "seed": recipe.seed,
        "layout": recipe.layout.model_dump(mode="json"),
        "ranks": ranks_of(recipe.layout),
        "rounds": [],
        "final": {"loss": after, "mixture": {"base": before, "federated": after}},
        **cleaned,
    }


def _result(
    recipe: Recipe, folder: RunFolder, store: TokenStore, course: Course, losses: tuple[float, float], seconds: float
) -> dict[str, Any]:
    steps = sorted(course.seconds)
    return {
        **about(recipe, folder, losses),
        "parties": [
            {"name": name, "samples": len(store.train(index)), "tokens": int(store.train(index).lengths().sum())}
            for index, name in enumerate(store.names)
        ],
        "curve": {"first_step": course.first, "losses": course.losses},
        "bytes": {"up": course.sent, "down": course.sent},
        "step_seconds": steps[len(steps) // 2] if steps else None,
        "seconds": round(seconds, 3),
    }
