"""What the runs of an island say at their end, whichever way they were trained."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mycel.cli.island import _show
from mycel.errors import RecipeError
from mycel.recipe import load_recipe
from mycel.run.folder import RunFolder, write_json
from mycel.run.island import about
from mycel.run.launching import smaller


@pytest.mark.parametrize("how", [{"recoveries": []}, {"bytes": {"up": 3}, "step_seconds": None}])
@pytest.mark.parametrize("losses", [(math.nan, 2.5), (2.5, math.inf), (math.nan, math.nan)])
def test_a_loss_that_is_no_number_is_null_in_the_result_and_a_dash_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: dict[str, object], losses: tuple[float, float]
) -> None:
    recipe = load_recipe("island", [])
    found = {**about(recipe, RunFolder(tmp_path), losses), **how}
    wanted = [loss if math.isfinite(loss) else None for loss in losses]
    assert [found["final"]["mixture"][name] for name in ("base", "federated")] == wanted
    assert found["final"]["loss"] == wanted[1]
    assert "cleaning" not in found
    write_json(tmp_path / "result.json", found)
    _show(recipe, found, tmp_path, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "result.json").read_text())
    _show(recipe, found, tmp_path, as_json=False)
    before, after = ("2.500" if loss else "–" for loss in wanted)
    assert f"held-out loss from {before} to {after}" in " ".join(capsys.readouterr().out.split())


def test_what_cleaning_left_is_told_by_every_island(tmp_path: Path) -> None:
    folder, counts = RunFolder(tmp_path), {"all": {"documents": 3, "kept": 2}}
    folder.work.mkdir()
    write_json(folder.cleaning, counts)
    recipe = load_recipe("island", ['data.cleaning=["masks"]'])
    assert about(recipe, folder, (1.0, 1.0))["cleaning"] == counts


def test_fewer_ranks_keep_what_the_layout_says_of_memory_and_one_rank_needs_no_codec() -> None:
    words = [
        "training.batch_size=4",
        "layout.data=2",
        "layout.pipeline=1",
        "layout.codec=int8",
        "layout.micro_batches=1",
    ]
    recipe = load_recipe("island", [*words, 'layout.activations=["offload"]', "layout.offload_optimizer=true"])
    one = smaller(recipe, 2)
    assert (one.data, one.codec, one.activations, one.offload_optimizer) == (1, "", ["offload"], True)


def test_ranks_that_torchrun_started_do_not_take_each_others_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mycel.cli.island import island_command

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="'bamboo', for ranks of one machine"):
        island_command("island", ["layout.recovery=bamboo"], tmp_path, False, False, 0)
