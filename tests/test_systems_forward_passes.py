"""Two-point estimates, and FedMeZO, which trains by them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mycel.errors import RecipeError
from mycel.finetune.fedmezo import deviations, differences, step_bytes
from mycel.models.footprint import peak_bytes
from mycel.recipe.schema import Recipe
from mycel.rounds.gradients import two_point
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.registry import load_system
from mycel.rounds.system import Answer, State
from mycel.wire.algebra import cosine
from mycel.wire.parcel import Parcel
from mycel.wire.randomness import direction
from rounds_by_hand import FORWARD, SMALL, same


def test_estimates_turn_towards_the_gradient_as_directions_are_added() -> None:
    size = 300
    gradient = direction(5, (size,))
    weights = {"w": nn.Parameter(torch.zeros(size), requires_grad=False)}
    total, cosines = torch.zeros(size), {}
    for sample in range(1, 3001):
        slope, _ = two_point(lambda: gradient @ weights["w"], weights, 1000 * sample, 1e-2)
        total += slope * direction(1000 * sample, (size,))
        if sample in (30, 300, 3000):
            cosines[sample] = cosine({"w": total}, {"w": gradient})
    for count, found in cosines.items():
        assert found == pytest.approx(math.sqrt(count / (count + size + 1)), rel=0.1)
    # Without bias: the mean estimate has the gradient's length, not only its direction.
    assert float(total @ gradient) / 3000 == pytest.approx(float(gradient @ gradient), rel=0.1)


def test_a_slope_is_exact_on_a_parabola_and_wrong_by_the_square_of_the_step_on_a_cubic() -> None:
    weights = {"w": nn.Parameter(torch.full((1,), 0.5, dtype=torch.float64), requires_grad=False)}
    z = float(direction(3, (1,)))
    parabola, _ = two_point(lambda: weights["w"].square().sum(), weights, 3, 0.1)
    assert parabola == pytest.approx(2 * 0.5 * z)
    errors = [two_point(lambda: weights["w"].pow(3).sum(), weights, 3, step)[0] - 0.75 * z for step in (0.1, 0.2)]
    assert errors[1] == pytest.approx(4 * errors[0], rel=1e-3)


def test_a_two_point_estimate_keeps_no_copy_of_the_model() -> None:
    shapes = [(40, 50)] * 12
    weights = {str(i): nn.Parameter(torch.ones(shape), requires_grad=False) for i, shape in enumerate(shapes)}
    before = {name: weight.clone() for name, weight in weights.items()}
    peak = peak_bytes(lambda: two_point(lambda: weights["0"].sum(), weights, 7, 1e-3))
    assert peak <= 2 * 40 * 50 * 4
    for name, weight in weights.items():
        torch.testing.assert_close(weight.data, before[name], rtol=1e-6, atol=1e-6)


def test_a_forward_step_takes_the_memory_of_inference(lab: Laboratory) -> None:
    recipe = lab.recipe("fedmezo", {**SMALL, **FORWARD, "data.max_length": 96, "training.batch_size": 8})
    estimated, exact, inference = step_bytes(lab, recipe)
    assert estimated <= 1.1 * inference < exact


def test_without_a_signal_or_with_one_party_fedmezo_is_fedavg_to_the_bit(lab: Laboratory) -> None:
    start = {**SMALL, **FORWARD}
    plain = lab.run(lab.recipe("fedavg", start)).state.shared
    assert same(plain, lab.run(lab.recipe("fedmezo", {**start, "knobs": {"signal": "none"}})).state.shared)
    assert not same(plain, lab.run(lab.recipe("fedmezo", start)).state.shared)
    one = {**start, "data.count": 1}
    assert same(lab.run(lab.recipe("fedavg", one)).state.shared, lab.run(lab.recipe("fedmezo", one)).state.shared)


def test_the_party_farthest_from_the_mean_change_has_the_longest_steps() -> None:
    changes = {node: {"a": torch.full((4,), float(size)), "b": torch.zeros(2)} for node, size in enumerate([0, 1, 5])}
    found = differences(changes)
    assert found == pytest.approx({0: 4.0, 1: 2.0, 2: 6.0})
    assert deviations(found) == pytest.approx({"0": 0.0, "1": -1.0, "2": 1.0})
    assert deviations({0: 2.0, 1: 2.0}) == {"0": 0.0, "1": 0.0}


def test_losses_set_rates_only_once_a_window_of_rounds_is_known() -> None:
    knobs = {"signal": "loss", "window": 2}
    system = load_system(Recipe(system="fedmezo").replace({**FORWARD, "knobs": knobs}))
    state = State(shared={"w": torch.zeros(3)})
    for losses, phi in (((1.0, 3.0), {}), ((2.0, 2.0), {"0": -1.0, "1": 1.0}), ((9.0, 1.0), {"0": 1.0, "1": -1.0})):
        answers = [
            Answer(node, Parcel("answer", {"loss": loss}, {"update/w": torch.ones(3)}), 1, 0, 1.0)
            for node, loss in enumerate(losses)
        ]
        state = system.step(state, system.combine(state, answers))
        assert state.facts["phi"] == phi
    assert system.brief(state, 0).header["phi"] == 1.0


def test_fedmezo_refuses_back_propagation() -> None:
    with pytest.raises(RecipeError, match=r"training\.gradient"):
        load_system(Recipe(system="fedmezo"))
