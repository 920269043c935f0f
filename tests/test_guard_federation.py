"""Masked sums over a federation of real processes: the guard's messages are ordinary requests there too."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the federation extra is not installed")

from mycel.data.parties import load_parties
from mycel.federation.demo import village
from mycel.recipe import load_recipe
from mycel.run.execute import run_recipe
from test_federation_processes import RECIPE, go

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
MASKED = ['wire.codec="fixed(8,0.05)"', 'guard.sums="masked"', "rounds.count=2", "trainable.rank=4"]


def test_masked_sums_over_sockets_come_to_the_state_of_one_process(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", [*RECIPE, *MASKED, "engine.workers=0"])
    here = run_recipe(recipe, tmp_path / "here")
    with village(tmp_path / "village", load_parties(recipe.data, recipe.seed)) as made:
        there = go(made, tmp_path / "there", *MASKED).finish()
    assert there["state_sha256"] == here["state_sha256"]
    # keys, shares and opened shares of three parties in two rounds
    assert there["bytes"]["by_purpose"]["guard"]["up"] == here["bytes"]["by_purpose"]["guard"]["up"] > 0
