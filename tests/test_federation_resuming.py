"""Who takes part in a run that is resumed: those it was begun with, in their order, and nobody else."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the federation extra is not installed")

from mycel.engines.line import Control
from mycel.errors import RunError
from mycel.federation.execute import PARTIES, Federated
from mycel.federation.keeping import forget_old_runs
from mycel.recipe import load_recipe
from mycel.run.folder import RunFolder
from mycel.testing.engines import Echo
from test_federation_engine import Nearby, Parties, _parties

NUMBERS = {"abbey": 70, "clinic": 71, "school": 72}


class Describing(Echo):
    """Says of itself what a coordinator asks for."""

    def describe(self, arm: str, job: str, node: int) -> Control:
        return {"samples": 4, "mean_tokens": 3.0, "held_out": 2, "rank": 2}


async def gathered(parties: Parties, folder: RunFolder, away: str = "", admitted: tuple[str, ...] = ()) -> list[str]:
    """Return who is gathered while one is away, in the order of their numbers."""
    engine = parties.engine()
    assert parties.grid is not None
    parties.grid._contexts.pop(NUMBERS.get(away, 0), None)
    hub = Nearby({name: NUMBERS[name] for name in admitted or NUMBERS})
    going = Federated(load_recipe("quickstart", ["data.count=2", "compare=[]"]), folder, hub=hub)
    try:
        with going.opened():
            nodes = await going.gather(engine)
        assert list(engine.addresses) == [NUMBERS[node.name] for node in nodes]
    finally:
        await engine.close()
    return [node.name for node in nodes]


def test_a_resumed_run_goes_on_with_the_parties_that_it_was_begun_with(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.work.mkdir(parents=True)
    with _parties([Describing() for _ in range(3)]) as parties:
        assert asyncio.run(gathered(parties, folder, away="abbey")) == ["clinic", "school"]
        # Whoever comes later is no part of it, though it was admitted first: node 0 is the clinic's.
        assert asyncio.run(gathered(parties, folder)) == ["clinic", "school"]
        with pytest.raises(RunError, match="clinic is admitted no longer"):
            asyncio.run(gathered(parties, folder, admitted=("abbey", "school")))
        (folder.work / PARTIES).write_text("[1")
        with pytest.raises(RunError, match="is damaged"):
            asyncio.run(gathered(parties, folder))


def test_a_party_forgets_what_was_silent_for_long_and_nothing_else(tmp_path: Path) -> None:
    old, live = "a" * 24, "b" * 24
    for arm in (old, live):
        (tmp_path / "home" / arm).mkdir(parents=True)
        (tmp_path / "home" / arm / "kept.json").write_text("{}")
        (tmp_path / f"{arm}.safetensors").write_bytes(b"")
    (tmp_path / "party.log").write_text("")
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0))
    os.utime(tmp_path / "home" / live / "kept.json")
    assert forget_old_runs(tmp_path) == 3  # a run that lives makes its tokens anew
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left == {"party.log", "home", f"home/{live}", f"home/{live}/kept.json"}


def test_a_fresh_run_takes_who_was_admitted_first(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.work.mkdir(parents=True)
    with _parties([Describing() for _ in range(3)]) as parties:
        assert asyncio.run(gathered(parties, folder)) == ["abbey", "clinic"]
