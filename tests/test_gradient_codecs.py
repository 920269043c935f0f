"""Gradients that cross data ranks through codecs: every rank ends with the same mean, and nothing is lost for good."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mycel.decisions.layout import check_layout
from mycel.errors import RecipeError
from mycel.models.sizes import SIZES
from mycel.recipe.schema import Layout
from test_collectives import ranks

LOSSY = ("bf16", "int8(32)", "topk(0.25)", "lattice(8)", "topk(0.25)+int8(32)+zstd")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("codecs") / "found.json"
    ranks(2, "codec_worker.py", path)
    made: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return made


@pytest.mark.slow
def test_without_loss_the_mean_is_the_mean_and_a_model_trains_as_in_one_process(found: dict[str, Any]) -> None:
    assert found["raw"]["off"] < 1e-7
    assert found["raw"]["off_over_time"] < 1e-6
    assert found["model"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("spec", LOSSY)
def test_whatever_a_codec_loses_all_ranks_hold_the_same_bits(found: dict[str, Any], spec: str) -> None:
    assert found[spec]["alike"]
    assert found[spec]["sent"] < found["raw"]["sent"]


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["topk(0.25)", "int8(32)", "topk(0.25)+int8(32)+zstd"])
def test_with_feedback_what_was_lost_comes_later(found: dict[str, Any], spec: str) -> None:
    # The sums differ by what is still owed, which does not grow with time while the sum does.
    assert found[spec]["off_over_time"] < 0.75 * found[spec]["off"]


@pytest.mark.slow
def test_frames_of_unequal_length_come_in_the_order_of_the_ranks(found: dict[str, Any]) -> None:
    assert found["frames"] == [[0] * 3, [1] * 8]
    assert "other names" in found["refused"]


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        (Layout(data=2, codec="int9"), "layout.codec .* 'int9' is unknown"),
        (Layout(data=2, tensor=2, codec="int8"), "layout.tensor is 2"),
        (Layout(tensor=1, codec="int8"), "one rank sees every row"),
    ],
)
def test_codecs_that_cannot_be_are_refused_before_work(layout: Layout, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        check_layout(layout, layout.data * layout.tensor, SIZES["micro"].config(), batch_size=4, length=32)
