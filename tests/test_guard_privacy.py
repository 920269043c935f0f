"""Differential privacy: epsilons against published and closed-form values, noise by its statistics."""

from __future__ import annotations

import math

import pytest
import torch

from mycel.errors import RecipeError
from mycel.guard.accounting import Releases, calibrate, epsilon
from mycel.guard.example import Privacy, example_losses, train_private
from mycel.guard.noise import next_bound, noise_source, perturb, split_noise
from mycel.recipe.schema import Recipe
from mycel.rounds.laboratory import Laboratory
from rounds_by_hand import SMALL


@pytest.mark.parametrize(
    ("noise", "odds", "steps", "delta", "published"),
    [
        # TensorFlow Privacy's tutorial on MNIST: batches of 250 from 60,000 for 15 epochs (RDP).
        (1.3, 250 / 60000, 15 * 60000 // 250, 1e-5, 1.18),
        # Abadi et al. 2016, figure 2: q = 0.01, sigma = 4, 10,000 steps: 1.26 by the moments accountant.
        (4.0, 0.01, 10_000, 1e-5, 1.26),
    ],
)
def test_epsilon_is_what_was_published(noise: float, odds: float, steps: int, delta: float, published: float) -> None:
    assert _classic(noise, odds, steps, delta) == pytest.approx(published, rel=0.01)
    # opacus converts more tightly than either paper did: never above what was published.
    assert epsilon([Releases(noise, odds, steps)], delta) <= published * 1.01


def _classic(noise: float, odds: float, steps: int, delta: float) -> float:
    """The same Renyi divergences with the conversion of the two publications: rdp + log(1 / delta) / (order - 1)."""
    from opacus.accountants.analysis import rdp

    orders = [1 + step / 10 for step in range(1, 100)] + list(range(12, 64))
    spent = rdp.compute_rdp(q=odds, noise_multiplier=noise, steps=steps, orders=orders)
    return min(float(cost) + math.log(1 / delta) / (order - 1) for cost, order in zip(spent, orders, strict=True))


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (2.0, 4), (5.0, 1), (8.0, 16)])
def test_prv_matches_the_exact_gaussian_mechanism(noise: float, steps: int) -> None:
    """Balle and Wang 2018, theorem 8, in closed form; n steps are one of sigma / sqrt(n)."""
    delta = 1e-5
    found = epsilon([Releases(noise, 1.0, steps)], delta, "prv")
    sigma = noise / math.sqrt(steps)

    def exact(eps: float) -> float:
        def phi(x: float) -> float:
            return 0.5 * math.erfc(-x / math.sqrt(2))

        return phi(0.5 / sigma - eps * sigma) - math.exp(eps) * phi(-0.5 / sigma - eps * sigma)

    low, high = 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if exact(middle) > delta else (low, middle)
    assert found == pytest.approx(high, rel=0.01, abs=0.01)
    assert epsilon([Releases(noise, 1.0, steps)], delta) >= found * 0.99


def test_more_releases_cost_more_and_more_noise_less() -> None:
    spent = [epsilon([Releases(1.0, 0.1, steps)], 1e-5) for steps in (0, 1, 10, 100)]
    assert spent[0] == 0.0
    assert spent == sorted(spent)
    assert epsilon([Releases(2.0, 0.1, 10)], 1e-5) < spent[2]
    together = epsilon([Releases(1.0, 0.1, 4), Releases(1.0, 0.1, 6)], 1e-5)
    assert together == pytest.approx(spent[2])


def test_calibrated_noise_costs_what_was_asked() -> None:
    noise = calibrate(2.0, 1e-5, 0.1, 50)
    assert 1.98 < epsilon([Releases(noise, 0.1, 50)], 1e-5) <= 2.0


@pytest.mark.parametrize("wanted", [0.0, -1.0, math.nan])
def test_an_epsilon_of_nothing_is_refused(wanted: float) -> None:
    with pytest.raises(RecipeError, match=r"guard\.epsilon"):
        calibrate(wanted, 1e-5, 1.0, 1)


def test_deltas_and_noise_that_mean_nothing_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"guard\.delta"):
        epsilon([Releases(1.0, 1.0, 1)], 0.0)
    with pytest.raises(RecipeError, match="without bound"):
        epsilon([Releases(0.0, 1.0, 1)], 1e-5)


def test_noise_has_the_deviation_it_states_and_is_not_correlated() -> None:
    plain = {"b": torch.full((200, 300), 3.0), "a": torch.zeros(40_000)}
    noisy = perturb(plain, 0.5, noise_source(1))
    draws = torch.cat([(noisy[name] - plain[name]).flatten() for name in plain]).double()
    count = len(draws)
    assert abs(float(draws.mean())) < 5 * 0.5 / math.sqrt(count)
    assert float(draws.std()) == pytest.approx(0.5, rel=5 / math.sqrt(2 * count))
    assert abs(float((draws[1:] * draws[:-1]).mean())) < 5 * 0.25 / math.sqrt(count)
    assert float(((draws / 0.5) ** 4).mean()) == pytest.approx(3.0, abs=5 * math.sqrt(96 / count))


def test_secret_noise_is_another_each_time_and_seeded_noise_the_same() -> None:
    one, other = (torch.randn(8, generator=noise_source(None)) for _ in range(2))
    assert not torch.equal(one, other)
    assert torch.equal(torch.randn(8, generator=noise_source(5)), torch.randn(8, generator=noise_source(5)))


def test_the_bound_follows_the_quantile() -> None:
    """With norms uniform on [0, 10] and a target of 0.5 the bound comes to the median, from either side."""
    for bound in (0.5, 40.0):
        for _ in range(200):
            bound = next_bound(bound, min(bound / 10, 1.0), 0.5)
        assert bound == pytest.approx(5.0, rel=0.01)


def test_noise_shared_between_update_and_count_costs_as_much() -> None:
    left = split_noise(1.0, 10.0)
    assert left**-2 + (2 * 10.0) ** -2 == pytest.approx(1.0)
    with pytest.raises(ValueError):
        split_noise(1.0, 0.4)


def test_private_training_without_noise_and_bound_is_plain_training(lab: Laboratory) -> None:
    """Per-example gradients, not clipped, not noised, of all examples: their mean is the gradient of the mean loss."""
    world = lab.world(lab.recipe("fedavg", {"data.examples": 6, "trainable.rank": 2}))
    trainable, table = world.trainable(), world.site.store.train(0)
    start = trainable.initial(3)
    moved = []
    for private in (True, False):
        trainable.load(start)
        with trainable.active():
            parameters = trainable.parameters()
            optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
            if private:
                privacy = Privacy(1e9, 0.0, 1)
                train_private(world.base.model, parameters, optimizer, table, len(table), 1, 0, privacy)
            else:
                optimizer.zero_grad()
                batch = table.batch(list(range(len(table))), 0, "causal")
                each = example_losses(world.base.model, batch.input_ids, batch.attention_mask, batch.labels)
                each.mean().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        moved.append(trainable.state())
    for name, value in moved[0].items():
        assert torch.allclose(value, moved[1][name], atol=1e-6)


def test_one_example_moves_private_training_by_no_more_than_the_bound(lab: Laboratory) -> None:
    """With the same draws and no noise, leaving one example out moves one step by at most bound * rate / batch."""
    world = lab.world(lab.recipe("fedavg", {"data.examples": 6, "trainable.rank": 2}))
    trainable, table = world.trainable(), world.site.store.train(0)
    start, bound, rate = trainable.initial(3), 0.01, 1.0
    ends = []
    for kept in (table, table.slice(0, len(table) - 1)):
        trainable.load(start)
        with trainable.active():
            parameters = trainable.parameters()
            optimizer = torch.optim.SGD(parameters.values(), lr=rate)
            # A batch size above the examples draws each of them.
            train_private(world.base.model, parameters, optimizer, kept, 8, 1, 0, Privacy(bound, 0.0, 1))
        ends.append(trainable.state())
    gap = torch.cat([(ends[0][name] - value).flatten() for name, value in ends[1].items()]).norm()
    assert 0 < float(gap) <= bound * rate / 8 * 1.001


def test_the_bound_follows_its_quantile_in_a_run_and_draws_are_independent(lab: Laboratory) -> None:
    """Adaptive clipping moves the bound towards the norms; with a cohort of a half, rounds have unlike sizes."""
    changes = {
        "model.base": "micro",
        **SMALL,
        "data.count": 8,
        "rounds.local_steps": 1,
        "rounds.count": 8,
        "rounds.cohort": 0.5,
        "guard.private": "user",
        "guard.noise": 1.0,
        "guard.clip_norm": 1e-3,
        "guard.within": 0.5,
        "guard.replayable": True,
    }
    finished = lab.run(Recipe().replace(changes))
    assert finished.guard["clip_norm"] > 1e-3
    assert finished.guard["rounds"] == 8
    assert len({entry["answers"] for entry in finished.progress.rounds}) > 1
    whole = epsilon([Releases(1.0, 1.0, 8)], 1e-5)
    assert finished.guard["epsilon"] == epsilon([Releases(1.0, 0.5, 8)], 1e-5) < whole
