"""Every codec against the public suite, and what each promises beyond it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mycel.errors import ParcelError, RecipeError
from mycel.testing.codecs import check_codec
from mycel.wire.codec import Codec, Parts
from mycel.wire.codecs import RAW, parse_codec
from mycel.wire.codecs.layout import LaidOut

torch.set_num_threads(1)
lawful = settings(deadline=None, derandomize=True)

SPECS = [
    "raw",
    "bf16",
    "int8",
    "int8(7)",
    "int8(4096)",
    "topk(0.1)",
    "topk(0.003)",
    "topk(1)",
    "seeds(64)",
    "zstd",
    "bf16+zstd",
    "int8+zstd",
    "topk(0.1)+int8(64)+zstd",
    "topk(0.1)+bf16",
    "topk(0.5)+topk(0.5)",
    "topk(0.1)+seeds(32)+int8(64)",
    "seeds(32)+bf16+zstd",
    "raw+int8",
]


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed))


def decoded(codec: Codec, tensor: Tensor) -> Tensor:
    return codec.decode(codec.encode(tensor), tuple(tensor.shape))


@pytest.mark.parametrize("spec", SPECS)
def test_laws(spec: str) -> None:
    check_codec(spec)


class Broken(LaidOut):
    """Obeys every law but one: the last element is lost."""

    spec = "raw"

    def layout(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return RAW.layout(shape)

    def encode(self, tensor: Tensor) -> Parts:
        flat = tensor.clone().reshape(-1)
        flat[-1:] = 0
        return {"values": flat.reshape(tensor.shape)}

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        return parts["values"]

    def error_bound(self, tensor: Tensor) -> float:
        return 0.0


def test_the_suite_finds_a_broken_codec() -> None:
    with pytest.raises(AssertionError, match="within the bound"):
        check_codec(Broken())


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("int8", "int8(64)"),
        ("seeds", "seeds(256)"),
        ("topk(.5)", "topk(0.5)"),
        ("topk(1e-3)", "topk(0.001)"),
        (" topk(0.1) + int8 + zstd ", "topk(0.1)+int8(64)+zstd"),
        ("raw", "raw"),
        ("raw+zstd", "zstd"),
    ],
)
def test_specs_have_one_canonical_form(spec: str, canonical: str) -> None:
    assert parse_codec(spec).spec == canonical


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("int9", "did you mean 'int8'"),
        ("top-k(0.1)", "did you mean 'topk'"),
        ("gzip", "known are raw, bf16|did you mean 'zstd'"),
        ("", "known are raw"),
        ("topk", "fraction above 0"),
        ("topk(0)", "fraction above 0"),
        ("topk(1.5)", "fraction above 0"),
        ("topk(nan)", "fraction above 0"),
        ("topk(0.1", "did you mean 'topk'"),
        ("int8()", "integer from 1"),
        ("int8(0)", "integer from 1"),
        ("int8(-4)", "integer from 1"),
        ("int8(1e3)", "integer from 1"),
        ("seeds(99999999)", "integer from 1"),
        ("bf16(2)", "takes no parameter"),
        ("int8+topk(0.1)", "leaves no float values"),
        ("bf16+int8", "leaves no float values"),
        ("zstd+int8", "at the end"),
        ("zstd+zstd", "at the end"),
        ("zstd(3)", "at the end"),
        ("raw+" * 40 + "raw", "letters"),
    ],
)
def test_bad_specs_are_refused_with_a_hint(spec: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=hint):
        parse_codec(spec)


@lawful
@given(st.text(max_size=30) | st.from_regex(r"(topk|int8|seeds|zstd|raw)\([0-9.e+-]{0,6}\)(\+\w{1,5})?"))
def test_any_text_is_a_codec_or_a_recipe_error(spec: str) -> None:
    try:
        codec = parse_codec(spec)
    except RecipeError:
        return
    assert parse_codec(codec.spec).spec == codec.spec


@lawful
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=200),
    st.sampled_from(["raw", "bf16", "int8(3)", "topk(0.3)", "zstd", "topk(0.5)+int8(2)+zstd"]),
)
def test_errors_stay_within_the_bound(values: list[float], spec: str) -> None:
    codec, tensor = parse_codec(spec), torch.tensor(values, dtype=torch.float32)
    errors = (decoded(codec, tensor).double() - tensor.double()).abs()
    assert (errors <= codec.error_bound(tensor)).all()


def test_int8_error_is_bounded_block_by_block() -> None:
    tensor = normal(50, 64) * torch.logspace(-6, 6, 50)[:, None]
    steps = tensor.abs().amax(1, keepdim=True) / 127
    errors = (decoded(parse_codec("int8(64)"), tensor) - tensor).abs()
    assert (errors <= steps * 0.5001).all()


def test_int8_gives_back_what_it_made() -> None:
    codec = parse_codec("int8(16)")
    once = decoded(codec, normal(1000))
    assert torch.allclose(decoded(codec, once), once, rtol=1e-6, atol=0)


@lawful
@given(st.integers(1, 400), st.floats(0.01, 1.0), st.integers(1, 5))
def test_topk_keeps_the_largest_and_the_first_of_equals(count: int, fraction: float, variety: int) -> None:
    source = torch.Generator().manual_seed(count)
    tensor = torch.randint(-variety, variety + 1, (count,), generator=source).float()
    kept = math.ceil(fraction * count)
    order = sorted(range(count), key=lambda place: (-abs(tensor[place].item()), place))
    expected = torch.zeros(count)
    expected[order[:kept]] = tensor[order[:kept]]
    assert torch.equal(decoded(parse_codec(f"topk({fraction!r})"), tensor), expected)


@pytest.mark.parametrize(
    ("count", "dtype"),
    [(256, torch.uint8), (257, torch.uint16), (1 << 16, torch.uint16), ((1 << 16) + 1, torch.int32)],
)
def test_topk_places_take_the_smallest_type(count: int, dtype: torch.dtype) -> None:
    tensor = torch.zeros(count)
    tensor[-1] = 5.0
    codec = parse_codec("topk(1e-9)")
    parts = codec.encode(tensor)
    assert parts["gaps"].dtype == dtype
    assert torch.equal(codec.decode(parts, (count,)), tensor)


@pytest.mark.parametrize("gaps", [[3, 0, 1], [0, 9, 1], [200, 1, 1], [9, 1, 1]])
def test_topk_refuses_places_that_do_not_exist(gaps: list[int]) -> None:
    parts = {"gaps": torch.tensor(gaps, dtype=torch.uint8), "values": torch.ones(3)}
    with pytest.raises(ParcelError, match="places"):
        parse_codec("topk(0.3)").decode(parts, (10,))


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf, 3e38])
def test_int8_refuses_scales_that_encoding_never_makes(scale: float) -> None:
    parts = {"levels": torch.ones(4, dtype=torch.int8), "scales": torch.tensor([scale])}
    with pytest.raises(ParcelError, match="scale"):
        parse_codec("int8").decode(parts, (4,))


@pytest.mark.parametrize("spec", ["bf16", "int8", "topk(0.5)", "topk(0.5)+int8+zstd"])
def test_the_largest_floats_stay_finite(spec: str) -> None:
    codec, tensor = parse_codec(spec), torch.full((100,), torch.finfo(torch.float32).max)
    errors = (decoded(codec, tensor).double() - tensor.double()).abs()
    assert (errors <= codec.error_bound(tensor)).all()


def test_seeds_refuse_a_negative_seed() -> None:
    parts = {"seed": torch.tensor(-1), "values": torch.ones(4)}
    with pytest.raises(ParcelError, match="-1, which is negative"):
        parse_codec("seeds(4)").decode(parts, (10,))


def test_seeds_are_unbiased_with_the_stated_variance() -> None:
    size, count, draws = 2000, 64, 200
    codec, tensor = parse_codec(f"seeds({count})"), normal(size)
    lengths = [1 + draw / 1024 for draw in range(draws)]
    found = torch.stack([decoded(codec, tensor * length) / length for length in lengths])
    energy = tensor.square().sum()
    variance = (found - tensor).square().sum(1).mean() / energy
    assert variance.item() == pytest.approx((size - 1) / count, rel=0.05)
    left = (found.mean(0) - tensor).square().sum() / energy
    assert left.item() == pytest.approx((size - 1) / count / draws, rel=0.15)


@pytest.mark.parametrize("count", [64, 256, 1024])
def test_seeds_reach_the_cosine_of_theory(count: int) -> None:
    size = 2000
    codec = parse_codec(f"seeds({count})")
    tensors = [normal(size, seed=seed) for seed in range(4)]
    cosines = [torch.cosine_similarity(decoded(codec, tensor), tensor, dim=0) for tensor in tensors]
    assert torch.stack(cosines).mean().item() == pytest.approx(math.sqrt(count / (count + size)), rel=0.05)


def test_seeds_take_the_same_bytes_whatever_the_size() -> None:
    codec = parse_codec("seeds(32)")
    sizes = [sum(part.nbytes for part in codec.encode(normal(n)).values()) for n in (1_000, 10_000, 100_000)]
    assert sizes == [32 * 4 + 8] * 3


def test_seeds_refuse_work_without_end() -> None:
    parts = {"seed": torch.tensor(1), "values": torch.ones(1 << 16)}
    with pytest.raises(ParcelError, match="random signs"):
        parse_codec("seeds(65536)").decode(parts, (1 << 30,))


def test_small_tensors_pass_seeds_untouched() -> None:
    tensor = normal(64)
    assert torch.equal(decoded(parse_codec("seeds(64)"), tensor), tensor)


@pytest.mark.parametrize("spec", ["bf16", "int8", "topk(0.1)", "seeds(8)", "topk(0.1)+int8+zstd"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_lossy_codecs_refuse_what_is_not_finite(spec: str, value: float) -> None:
    tensor = normal(300)
    tensor[123] = value
    with pytest.raises(ParcelError, match="NaN or infinite"):
        parse_codec(spec).encode(tensor)


@pytest.mark.parametrize(
    ("spec", "share"), [("bf16", 0.5), ("int8(64)", 0.2657), ("topk(0.1)", 0.2), ("topk(0.1)+int8(64)", 0.12657)]
)
def test_sizes_follow_the_formula(spec: str, share: float) -> None:
    tensor = normal(1 << 17)
    found = sum(part.nbytes for part in parse_codec(spec).encode(tensor).values()) / tensor.nbytes
    assert found == pytest.approx(share, rel=1e-3)


def test_entropy_coding_pays_where_bytes_repeat() -> None:
    tensor = normal(1 << 16)
    sizes = {
        spec: sum(part.nbytes for part in parse_codec(spec).encode(tensor).values())
        for spec in ("raw", "zstd", "bf16", "bf16+zstd", "topk(0.1)+int8", "topk(0.1)+int8+zstd")
    }
    assert sizes["zstd"] < 0.92 * sizes["raw"]
    assert sizes["bf16+zstd"] < 0.8 * sizes["bf16"]
    # Half a byte a place in place of two: this is what gaps are for.
    assert sizes["topk(0.1)+int8+zstd"] < 0.55 * sizes["topk(0.1)+int8"]
