"""``mycel run RECIPE --nproc N`` with ``layout.recovery``: ranks that die are survived in the others' processes.

Blocks are shared out over ``layout.pipeline`` ranks in each of ``layout.data`` pipelines (Oobleck: in pipelines of at
least ``layout.pipeline`` ranks). Checkpoints on disk are for what memory cannot give back, and for ``--resume``.
"""

from __future__ import annotations

import json
import math
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from mycel.collectives.copies import DiskCopies
from mycel.collectives.enduring import Enduring
from mycel.collectives.formation import Recovery
from mycel.collectives.keeper import Keeper
from mycel.collectives.membership import Line
from mycel.collectives.units import Chain
from mycel.data.stream import sample_rows
from mycel.data.table import TokenTable
from mycel.data.tokens import TokenStore
from mycel.decisions.layout import ranks_of
from mycel.engines.nursery import Nursery
from mycel.errors import RecipeError
from mycel.models.base import Base, find_base, open_base
from mycel.recipe.schema import Layout, Recipe
from mycel.rounds.registry import load_system
from mycel.run.folder import RunFolder, write_json
from mycel.run.island import about, save_weights, start_weights, write_tokens
from mycel.run.log import EventLog
from mycel.wire.algebra import seed_of
from mycel.wire.parcel import Parcel

ALLOWED = {"data", "pipeline", "micro_batches", "checkpoint_every", "recovery"}


def check_enduring(layout: Layout) -> None:
    """Refuse a division that units, which any rank can take over, do not have."""
    plain = Layout()
    for name in sorted(set(Layout.model_fields) - ALLOWED):
        if getattr(layout, name) != getattr(plain, name):
            raise RecipeError(
                f"layout.{name} is {getattr(layout, name)!r}, and layout.recovery = {layout.recovery!r} moves whole "
                f"blocks between ranks: leave it at {getattr(plain, name)!r}"
            )


def recovery_of(layout: Layout, blocks: int) -> Recovery:
    """Return the way of going on that a layout names."""
    from mycel.pretrain.bamboo import Bamboo
    from mycel.pretrain.gemini import Gemini
    from mycel.pretrain.oobleck import Oobleck

    pieces = layout.micro_batches * layout.data
    if layout.recovery == "bamboo":
        return Bamboo(blocks + 2, pieces, layout.data)
    if layout.recovery == "oobleck":
        return Oobleck((0.5, *[1.0] * blocks, 0.5), pieces, layout.pipeline, layout.data - 1)
    return Gemini(blocks + 2, pieces, ranks_of(layout), min(2, ranks_of(layout)), layout.data)


def run_enduring(recipe: Recipe, out: Path, resume: bool) -> dict[str, Any]:
    """Train with processes that this one starts and keeps; return the result."""
    check_enduring(recipe.layout)
    started, folder = time.monotonic(), RunFolder(out)
    with folder.held(recipe, resume):
        base = open_base(find_base(recipe.model.base))
        write_tokens(recipe, base, folder)
        store = TokenStore.open(folder.tokens)
        start = start_weights(recipe, base)
        base.model.load_state_dict(start, strict=False)
        base.model.tie_weights()
        before = _loss(base, store.held_out(0), recipe)
        log = EventLog(folder.events)
        nursery = Nursery(lambda connection: _rank(connection, recipe, base, store.pooled(), out))
        try:
            keeper = Keeper(
                nursery,
                ranks_of(recipe.layout),
                lambda member, first: {},
                recovery_of(recipe.layout, 1).replaces,
                mourn=lambda dead: log.record("died", "island", ranks=dead),
            )
            reports = keeper.run()
            losses = {int(step): loss for each in reports.values() for step, loss in each.header["losses"].items()}
            for step, loss in sorted(losses.items()):
                log.record("step", "island", step=step, loss=loss)
        finally:
            nursery.close()
            log.close()
        weights = {
            name.removeprefix("weight."): tensor for each in reports.values() for name, tensor in each.tensors.items()
        }
        save_weights(base, weights, folder)
        after = _loss(base, store.held_out(0), recipe)
        recoveries = [each for each in reports[min(reports)].header["recoveries"] if each["epoch"]]
        first = min(losses, default=recipe.rounds.count)
        result = {
            **about(recipe, folder, (before, after)),
            "stayed": sorted(keeper.stayed),
            "recoveries": recoveries,
            "curve": {"first_step": first, "losses": [losses[step] for step in sorted(losses)]},
            "seconds": round(time.monotonic() - started, 3),
        }
        write_json(folder.result, result)
        return result


@torch.no_grad()
def _loss(base: Base, table: TokenTable, recipe: Recipe) -> float:
    """Mean loss over rows of one length, in batches as large as a step's."""
    model, size = base.model.eval(), recipe.training.batch_size
    losses = []
    for first in range(0, len(table) - size + 1, size):
        rows = table.batch(range(first, first + size), 0).input_ids
        losses.append(float(model(input_ids=rows, labels=rows).loss))
    return math.fsum(losses) / len(losses) if losses else math.nan


def _rank(connection: Connection, recipe: Recipe, base: Base, table: TokenTable, out: Path) -> None:
    """Be one rank, and report at the end."""
    torch.set_num_threads(1)
    job = json.loads(connection.recv_bytes())
    try:
        enduring = _member(job, recipe, base, table, out)
        enduring.train(recipe.rounds.count, lambda report: connection.send_bytes(report.to_bytes()))
    except Exception as error:  # whatever it is, it must not be taken for a death
        connection.send_bytes(Parcel("report", {"error": f"{type(error).__name__}: {error}"}).to_bytes())


def _member(job: dict[str, Any], recipe: Recipe, base: Base, table: TokenTable, out: Path) -> Enduring:
    layout, size = recipe.layout, recipe.training.batch_size
    chain = Chain(base.model, recipe.training)
    seed = seed_of(recipe.seed, "stream", 0)

    def rows_of(step: int) -> torch.Tensor:
        rows: torch.Tensor = table.batch(sample_rows(len(table), step * size, size, seed).tolist(), 0).input_ids
        return rows

    rate = load_system(recipe).rate  # type: ignore[attr-defined]
    return Enduring(
        Line(job["port"], job["member"], epoch=job["epoch"] - 1),
        chain,
        recovery_of(layout, chain.depth),
        rows_of,
        rate,
        layout.micro_batches * layout.data,
        disk=DiskCopies(out / "work" / "units", chain.count),
        copy_every=1 if layout.recovery == "gemini" else 0,
        save_every=layout.checkpoint_every or recipe.rounds.count,
    )
