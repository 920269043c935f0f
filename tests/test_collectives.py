"""Inside an island: every layout equals one process, and a checkpoint of one layout goes on in another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mycel.collectives.units import Chain
from mycel.decisions.layout import FAMILIES, check_layout, stage_blocks
from mycel.errors import ModelError, RecipeError
from mycel.models.sizes import SIZES
from mycel.recipe.schema import Layout, Training
from small_runs import environment, mycel

HERE = Path(__file__).parent
SHORT = ("rounds.count=4", "data.examples=24", "data.held_out=4", "data.max_length=32", "training.batch_size=4")


def ranks(count: int, program: str, *words: str | Path) -> None:
    """Run a test program on ranks of this machine."""
    starter = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    environ = {**environment(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*starter, str(count), str(HERE / program), *map(str, words)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_layout_has_the_loss_and_gradients_of_one_process(tmp_path: Path, count: int) -> None:
    ranks(count, "equality_worker.py", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert len(found) >= {1: 2, 2: 12, 4: 20}[count]
    assert max(found.values()) < 1e-12, found


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_a_checkpoint_of_one_layout_goes_on_in_another_with_the_same_losses(tmp_path: Path) -> None:
    whole = ("layout.data=2", "layout.pipeline=1", "layout.micro_batches=1", "layout.checkpoint_every=2")
    mycel("run", "island", *SHORT, *whole, "--nproc", "2", "--out", "whole", "--json", folder=tmp_path)
    undisturbed = json.loads((tmp_path / "whole/result.json").read_text(encoding="utf-8"))
    assert undisturbed["predicted"]["step_seconds"] > 0
    # What a kill after the second step leaves behind.
    (tmp_path / "whole").rename(tmp_path / "cut")
    last = tmp_path / "cut/work/island/step-00000004"
    (last / "checkpoint.json").unlink()
    other = ("layout.data=1", "layout.tensor=1", "layout.pipeline=1", "layout.micro_batches=1")
    mycel("run", "island", *SHORT, *other, "--nproc", "1", "--out", "cut", "--resume", folder=tmp_path)
    resumed = json.loads((tmp_path / "cut/result.json").read_text(encoding="utf-8"))
    assert resumed["curve"]["first_step"] == 2
    assert resumed["curve"]["losses"] == pytest.approx(undisturbed["curve"]["losses"][2:], rel=1e-5)
    assert resumed["final"]["loss"] == pytest.approx(undisturbed["final"]["loss"], rel=1e-5)
    damaged = next((tmp_path / "cut/work/island/step-00000004").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-8])
    words = ("run", "island", *SHORT, *other, "--nproc", "1", "--out", "cut", "--resume")
    assert "is damaged" in mycel(*words, folder=tmp_path, expect=1).stderr


@pytest.mark.parametrize(
    ("layout", "count", "sentence"),
    [
        (Layout(data=2), 3, "makes 2 ranks, and there are 3"),
        (Layout(tensor=3), 3, "does not divide the 4 attention heads"),
        (Layout(data=3), 3, "does not divide the 4 rows of a step"),
        (Layout(pipeline=4, micro_batches=4), 4, "the model has 2 blocks"),
        (Layout(sequence=5), 5, "does not divide the 32 tokens of a row"),
        (Layout(pipeline=2, micro_batches=1, schedule="1f1b"), 2, "fewer than the 2 stages"),
        (Layout(data=2, micro_batches=3), 2, "does not divide the 2 rows that a data rank"),
        (Layout(pipeline=2, blocks=[1, 2]), 2, "2 numbers above zero that add up to 2 are needed"),
        (Layout(schedule="interleaved", chunks=2), 1, "an order of a pipeline, and layout.pipeline is 1"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_with_what_would_do(layout: Layout, count: int, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        check_layout(layout, count, SIZES["micro"].config(), batch_size=4, length=32)


def small(kind: str, **changes: Any) -> PreTrainedModel:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(1)
    found: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, **heads, **changes))
    return found.eval()


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_parts_of_every_family_that_is_taken_compute_what_the_model_does(kind: str) -> None:
    model, rows = small(kind), torch.arange(3, 51).view(2, 24)
    chain = Chain(model, Training())
    units = {index: chain.build(index) for index in range(chain.count)}
    with torch.no_grad():
        assert torch.equal(chain.forward(units, 0, chain.count, rows), model(input_ids=rows).logits)


@pytest.mark.parametrize(
    ("kind", "changes", "layout", "sentence"),
    [
        ("gemma2", {}, Layout(data=2), "the family 'gemma2' is none whose parts ranks can train"),
        ("granite", {}, Layout(data=2), "the family 'granite' is none"),
        ("mistral", {"sliding_window": 8}, Layout(data=2), "its last 8 tokens, and ranks attend to all 32 of a row"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            Layout(data=2),
            "set data.max_length to 8 or less",
        ),
        ("qwen3", {}, Layout(tensor=2), "qwen3 norms queries by head"),
    ],
)
def test_a_model_whose_parts_compute_something_else_is_refused(
    kind: str, changes: dict[str, Any], layout: Layout, sentence: str
) -> None:
    with pytest.raises((ModelError, RecipeError), match=sentence):
        check_layout(layout, 2, small(kind, **changes).config, batch_size=4, length=32)


def test_stages_share_out_every_block_once() -> None:
    assert [list(part) for part in stage_blocks(5, 3)] == [[0, 1], [2, 3], [4]]
    assert [len(part) for part in stage_blocks(4, 2, [1, 3])] == [1, 3]
    with pytest.raises(RecipeError, match="add up to 4"):
        stage_blocks(4, 2, [1, 1])
