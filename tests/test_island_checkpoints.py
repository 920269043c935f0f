"""An island's checkpoints: whole or passed over, and a sentence for each that is not this training's."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from mycel.collectives.apply import lay_out, named_weights
from mycel.collectives.ranks import Meeting, Ranks, make_ranks, process_group
from mycel.collectives.saving import MANIFEST, Checkpoints
from mycel.collectives.step import Trainer
from mycel.errors import RunError
from mycel.models.random_llama import llama_config
from mycel.recipe.schema import Layout

ROWS = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """The only rank of an island."""
    with process_group(Meeting(str(tmp_path_factory.mktemp("meeting") / "file"), 0, 1)) as device:
        yield make_ranks(Layout(), device)


def trainer(ranks: Ranks, hidden: int = 16, blocks: int = 2) -> Trainer:
    torch.manual_seed(3)
    stage = lay_out(LlamaForCausalLM(llama_config(hidden, blocks, 64, 32, 2)), ranks)
    return Trainer(stage, ranks, torch.optim.AdamW(stage.parameters(), lr=0.01))


def trained(ranks: Ranks, folder: Path) -> list[float]:
    """Save after steps 1 and 2 and return the losses of steps 2 and 3."""
    made, saves = trainer(ranks), Checkpoints(folder, "this training")
    losses = []
    for step in range(4):
        losses.append(made.step(ROWS, 0.01))
        if step in (0, 1):
            saves.save(step + 1, named_weights(made.stage), made.optimizer)
    saves.finish()
    return losses[2:]


def load(ranks: Ranks, folder: Path, recipe: str = "this training", **shape: int) -> tuple[int, Trainer]:
    made = trainer(ranks, **shape)
    return Checkpoints(folder, recipe).load(named_weights(made.stage), made.optimizer), made


@pytest.fixture(scope="module")
def saved(alone: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, trained(alone, folder)


@pytest.fixture
def folder(saved: tuple[Path, list[float]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


def test_the_newest_whole_checkpoint_goes_on_to_the_bit(
    alone: Ranks, saved: tuple[Path, list[float]], folder: Path
) -> None:
    (folder / "step-of-another-kind").mkdir()
    (folder / "step-of-another-kind" / MANIFEST).write_text("{}")
    step, made = load(alone, folder)
    assert step == 2
    assert [made.step(ROWS, 0.01) for _ in range(2)] == saved[1]


def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(
    alone: Ranks, saved: tuple[Path, list[float]], folder: Path
) -> None:
    (folder / "step-00000002" / MANIFEST).unlink()
    step, made = load(alone, folder)
    assert step == 1
    assert [made.step(ROWS, 0.01) for _ in range(3)][1:] == saved[1]
    (folder / "step-00000001" / MANIFEST).unlink()
    assert load(alone, folder)[0] == 0


def test_a_checkpoint_that_cannot_be_written_is_said_so_and_the_one_before_is_whole(
    alone: Ranks, saved: tuple[Path, list[float]], folder: Path
) -> None:
    made, saves = trainer(alone), Checkpoints(folder, "this training")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        made.step(ROWS, 0.01)
        saves.save(3, named_weights(made.stage), made.optimizer)
        with pytest.raises(RunError, match=r"cannot be written \(.*\): make room"):
            saves.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    step, other = load(alone, folder)
    assert step == 2
    assert other.step(ROWS, 0.01) == saved[1][0]


def _data(folder: Path) -> Path:
    return next(folder.glob("step-00000002/*.safetensors"))


def _shortened(folder: Path) -> None:
    _data(folder).write_bytes(_data(folder).read_bytes()[:-1])


def _changed(folder: Path) -> None:
    content = bytearray(_data(folder).read_bytes())
    content[-1] ^= 1
    _data(folder).write_bytes(content)


def _renamed(folder: Path) -> None:
    (folder / "step-00000002").rename(folder / "step-00000005")


@pytest.mark.parametrize(
    "harm",
    [
        _shortened,
        _changed,
        _renamed,
        lambda folder: _data(folder).write_bytes(b""),
        lambda folder: _data(folder).unlink(),
        lambda folder: shutil.copy(_data(folder), folder / "step-00000002/more.safetensors"),
    ],
)
def test_a_checkpoint_whose_files_are_not_those_written_is_refused(
    alone: Ranks, folder: Path, harm: Callable[[Path], Any]
) -> None:
    harm(folder)
    with pytest.raises(RunError, match=r"is damaged \(.* is not what was written\): remove the folder"):
        load(alone, folder)


@pytest.mark.parametrize(
    "content", ["", "[1, 2]", "{", '{"files": {}}', '{"files": 3, "recipe_sha256": "", "step": 1}']
)
def test_a_manifest_that_cannot_be_read_is_refused(alone: Ranks, folder: Path, content: str) -> None:
    (folder / "step-00000002" / MANIFEST).write_text(content)
    with pytest.raises(RunError, match="cannot be read: remove the folder"):
        load(alone, folder)


def test_a_manifest_that_names_files_elsewhere_is_refused(alone: Ranks, folder: Path) -> None:
    path = folder / "step-00000002" / MANIFEST
    content = json.loads(path.read_text())
    path.write_text(
        json.dumps({**content, "files": {"../../" + name: hash for name, hash in content["files"].items()}})
    )
    with pytest.raises(RunError, match="is damaged"):
        load(alone, folder)


def test_a_checkpoint_of_another_recipe_is_refused(alone: Ranks, folder: Path) -> None:
    with pytest.raises(RunError, match="is of another training"):
        load(alone, folder, recipe="another training")


@pytest.mark.parametrize("shape", [{"hidden": 32}, {"blocks": 3}])
def test_a_checkpoint_of_another_model_is_refused(alone: Ranks, folder: Path, shape: dict[str, int]) -> None:
    with pytest.raises(RunError, match=r"does not fit this model \(.*\): resume with the model"):
        load(alone, folder, "this training", **shape)
