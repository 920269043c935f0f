"""Error feedback: nothing is lost for good."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mycel.wire.codec import Codec
from mycel.wire.codecs import parse_codec
from mycel.wire.feedback import compensate

torch.set_num_threads(1)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed))


def received(codec: Codec, sent: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: codec.decode(codec.encode(tensor), tuple(tensor.shape)) for name, tensor in sent.items()}


@pytest.mark.parametrize("spec", ["raw", "bf16", "int8", "topk(0.05)", "seeds(16)", "topk(0.1)+int8+zstd"])
def test_what_is_decoded_and_what_is_kept_make_the_whole(spec: str) -> None:
    codec = parse_codec(spec)
    tensors = {"a": normal(30, 20), "b": normal(7, seed=2)}
    residual = {"a": normal(30, 20, seed=3)}
    sent, kept = compensate(tensors, residual, codec)
    arrived = received(codec, sent)
    assert torch.allclose(arrived["a"] + kept["a"], tensors["a"] + residual["a"], rtol=1e-5, atol=1e-4)
    assert torch.allclose(arrived["b"] + kept["b"], tensors["b"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("spec", ["int8(256)", "topk(0.05)", "seeds(64)", "topk(0.2)+int8+zstd"])
def test_a_constant_update_arrives_in_the_mean(spec: str) -> None:
    codec, tensor, rounds = parse_codec(spec), normal(1000), 300
    residual: dict[str, Tensor] = {}
    total = torch.zeros(1000)
    for _ in range(rounds):
        sent, residual = compensate({"x": tensor}, residual, codec)
        total += received(codec, sent)["x"]
    error = (total / rounds - tensor).norm() / tensor.norm()
    alone = (received(codec, {"x": tensor})["x"] - tensor).norm() / tensor.norm()
    assert error < 0.15
    assert error < alone / 5


def test_lossless_codecs_leave_nothing_behind() -> None:
    tensors = {"x": normal(50)}
    sent, kept = compensate(tensors, {}, parse_codec("zstd"))
    assert torch.equal(sent["x"], tensors["x"])
    assert not kept["x"].any()


def test_other_types_pass_and_absent_names_wait() -> None:
    counts, waiting = torch.arange(5), normal(4)
    sent, kept = compensate({"counts": counts}, {"absent": waiting}, parse_codec("int8"))
    assert sent == {"counts": counts}
    assert list(kept) == ["absent"]
    assert torch.equal(kept["absent"], waiting)


def test_arguments_stay_as_they_were() -> None:
    tensors, residual = {"x": normal(40)}, {"x": normal(40, seed=2)}
    compensate(tensors, residual, parse_codec("topk(0.1)"))
    assert torch.equal(tensors["x"], normal(40))
    assert torch.equal(residual["x"], normal(40, seed=2))
