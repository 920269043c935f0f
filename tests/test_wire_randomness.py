"""Directions from seeds: the same for everybody, and distributed as they claim."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch

from mycel.wire.randomness import Distribution, direction, seed_pool

torch.set_num_threads(1)
DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_seed_and_a_size_say_everything(distribution: Distribution) -> None:
    torch.manual_seed(1)
    one = direction(7, (60, 35), distribution)
    torch.manual_seed(2)
    other = direction(7, (2100,), distribution)
    assert one.dtype == torch.float32
    assert torch.equal(one.reshape(-1), other)
    assert not torch.equal(one.reshape(-1), direction(8, (2100,), distribution))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_global_random_state_is_left_alone(distribution: Distribution) -> None:
    before = torch.random.get_rng_state()
    direction(3, (100,), distribution)
    seed_pool(3, 10)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", [(), (0, 4), (1,), (63,), (65,)])
def test_every_shape_is_made(shape: tuple[int, ...], distribution: Distribution) -> None:
    made = direction(1, shape, distribution)
    assert tuple(made.shape) == shape
    assert made.isfinite().all()


def test_normal_has_the_moments_of_a_normal() -> None:
    drawn = direction(1, (200_000,)).double()
    assert drawn.mean().item() == pytest.approx(0, abs=0.01)
    assert drawn.square().mean().item() == pytest.approx(1, rel=0.01)
    assert drawn.pow(4).mean().item() == pytest.approx(3, rel=0.03)


def test_truncated_is_cut_where_it_says_and_has_a_third_of_the_variance() -> None:
    size = 100_000
    drawn = direction(1, (size,), "truncated").double()
    limit = 1 / math.sqrt(size)
    assert drawn.abs().max().item() <= limit * (1 + 1e-6)
    assert drawn.abs().max().item() > 0.999 * limit
    assert drawn.mean().item() == pytest.approx(0, abs=0.01 * limit)
    assert (drawn.square().mean() * size).item() == pytest.approx(1 / 3, rel=0.02)


def test_rademacher_is_signs_in_balance_and_without_memory() -> None:
    drawn = direction(1, (200_000,), "rademacher")
    assert torch.equal(drawn.abs(), torch.ones(200_000))
    assert drawn.mean().item() == pytest.approx(0, abs=0.01)
    for lag in (1, 8, 64):
        assert (drawn[lag:] * drawn[:-lag]).mean().item() == pytest.approx(0, abs=0.01)


def test_rademacher_is_the_bits_of_mersenne_twister() -> None:
    twister = np.random.MT19937()
    twister._legacy_seeding(42)
    words = twister.random_raw(8).astype(np.uint32)
    # A 64-bit word takes two outputs, the first one as its upper half; bits come byte by byte from below.
    octets = words.reshape(-1, 2)[:, ::-1].astype("<u4").tobytes()
    bits = [octet >> place & 1 for octet in octets for place in range(7, -1, -1)]
    assert direction(42, (256,), "rademacher").tolist() == [2.0 * bit - 1 for bit in bits]


def test_seeds_that_agree_in_their_lower_half_differ() -> None:
    low, high = direction(5, (64,)), direction(5 + (1 << 32), (64,))
    assert not torch.equal(low, high)


def test_directions_of_a_pool_are_nearly_orthogonal() -> None:
    drawn = torch.stack([direction(seed, (4096,)) for seed in seed_pool(1, 40)])
    cosines = drawn @ drawn.t() / 4096
    off_diagonal = cosines - torch.diag(cosines.diag())
    assert off_diagonal.abs().max().item() < 6 / math.sqrt(4096)


def test_a_pool_is_derived_distinct_and_extends() -> None:
    pool = seed_pool(9, 4096)
    assert pool == seed_pool(9, 4096)
    assert len(set(pool)) == 4096
    assert all(0 <= seed < 1 << 32 for seed in pool)
    assert pool[:100] == seed_pool(9, 100)
    assert pool != seed_pool(10, 4096)
    assert seed_pool(9, 0) == []


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed"):
        direction(seed, (3,))


def test_unknown_distributions_are_refused() -> None:
    with pytest.raises(ValueError, match="normal, truncated, rademacher"):
        direction(1, (3,), "uniform")  # type: ignore[arg-type]
