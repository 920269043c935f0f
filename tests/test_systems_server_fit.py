"""Proxy tuning: logit arithmetic in closed form, its reductions, and what stays at the coordinator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mycel.data.tokens import Batch
from mycel.errors import ModelError, RecipeError
from mycel.finetune.fedpt import FedPT, distillation_loss, predictions
from mycel.recipe.schema import Recipe
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.registry import load_system
from mycel.rounds.simulation import Finished
from mycel.rounds.system import Outcome, State
from mycel.testing.bases import random_base
from mycel.wire.parcel import Tensors


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {}
    for seed, name in enumerate(("small", "large", "t5")):
        made[name] = str(tmp_path_factory.mktemp("bases") / name)
        random_base(Path(made[name]), "t5" if name == "t5" else "llama", seed)
    return made


def recipe_of(lab: Laboratory, folders: dict[str, str], changes: dict[str, Any] | None = None) -> Recipe:
    few = {"data.examples": 8, "data.held_out": 2, "data.max_length": 32, "trainable.rank": 2}
    quick = {"rounds.count": 2, "rounds.local_steps": 2, "training.batch_size": 4, "model.base": folders["small"]}
    alike = {"data.parties": "iid", "data.count": 2}
    knobs = {"large": folders["large"], "distillation_steps": 2, "public_examples": 16}
    return lab.recipe("fedpt", {**few, **quick, **alike, "knobs": knobs, **(changes or {})})


@pytest.fixture(scope="module")
def system(lab: Laboratory, folders: dict[str, str]) -> FedPT:
    made = load_system(recipe_of(lab, folders))
    assert isinstance(made, FedPT)
    return made


@pytest.fixture(scope="module")
def finished(lab: Laboratory, folders: dict[str, str]) -> Finished:
    return lab.run(recipe_of(lab, folders))


def some_state(system: FedPT) -> Tensors:
    """A state whose change in logits is far from zero."""
    source = torch.Generator().manual_seed(7)
    start = system.server.expert.initial(0)
    return {name: tensor + 0.3 * torch.randn(tensor.shape, generator=source) for name, tensor in start.items()}


def some_batch() -> Batch:
    ids = torch.randint(3, 250, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return Batch(ids, mask, ids.masked_fill(mask == 0, -100))


def test_an_untuned_small_model_leaves_the_large_model_as_it_is(system: FedPT) -> None:
    batch = some_batch()
    steered, labels = predictions(system.server.proxy(system.server.expert.initial(0)), batch)
    with torch.no_grad():
        alone, expected = predictions(system.server.large.model, batch)
    assert torch.equal(steered, alone)
    assert torch.equal(labels, expected)


def test_steering_is_the_product_of_distributions_in_closed_form(system: FedPT) -> None:
    batch, state = some_batch(), some_state(system)
    steered, _ = predictions(system.server.proxy(state), batch)
    with torch.no_grad():
        large, _ = predictions(system.server.large.model, batch)
        before, _ = predictions(system.server.small.model, batch)
        with system.server.expert.active():
            after, _ = predictions(system.server.small.model, batch)
    # In terms of probabilities: p is proportional to p_L * p_{s+} / p_{s-}.
    chances = [np.exp(logits.double().numpy()) for logits in (large, before, after)]
    chances = [values / values.sum(-1, keepdims=True) for values in chances]
    product = chances[0] * chances[2] / chances[1]
    expected = product / product.sum(-1, keepdims=True)
    assert np.abs(after.numpy() - before.numpy()).max() > 0.1
    np.testing.assert_allclose(steered.double().softmax(-1).numpy(), expected, rtol=1e-4)


def test_two_alike_models_steer_to_the_tuned_one(lab: Laboratory, folders: dict[str, str]) -> None:
    twin = FedPT(recipe_of(lab, folders, {"knobs": {"large": folders["small"]}}))
    state, batch = some_state(twin), some_batch()
    steered, _ = predictions(twin.server.proxy(state), batch)
    with torch.no_grad(), twin.server.expert.active():
        tuned, _ = predictions(twin.server.small.model, batch)
    torch.testing.assert_close(steered, tuned, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_distillation_loss_is_its_formula(temperature: float) -> None:
    source = torch.Generator().manual_seed(3)
    found, wanted = (torch.randn(6, 11, generator=source, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, 11, (6,), generator=source)

    def soften(logits: torch.Tensor, by: float) -> Any:
        weights = np.exp(logits.numpy() / by)
        return weights / weights.sum(-1, keepdims=True)

    hard = -np.log(soften(found, 1.0)[np.arange(6), labels.numpy()]).mean()
    p, q = soften(wanted, temperature), soften(found, temperature)
    expected = hard + temperature**2 * (p * np.log(p / q)).sum(-1).mean()
    assert float(distillation_loss(found, wanted, labels, temperature)) == pytest.approx(expected, rel=1e-12)


def test_a_model_that_agrees_with_its_teacher_pays_for_the_labels_alone() -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(5))
    labels = torch.tensor([0, 1, 2, 3])
    hard = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(distillation_loss(logits, logits.clone(), labels, 2.0), hard)


def test_without_distillation_it_is_fedavg_to_the_bit(lab: Laboratory, folders: dict[str, str]) -> None:
    none = recipe_of(lab, folders, {"knobs": {"large": folders["large"], "distillation_steps": 0}})
    plain = recipe_of(lab, folders, {"system": "fedavg", "knobs": {}})
    assert lab.run(none).state.sha256() == lab.run(plain).state.sha256()


def test_the_fit_moves_the_state_after_each_average_and_is_repeatable(
    system: FedPT, lab: Laboratory, folders: dict[str, str]
) -> None:
    shared = some_state(system)
    change = {name: torch.zeros_like(tensor) for name, tensor in shared.items()}
    once = system.step(State(shared=shared), Outcome(shared=change))
    again = FedPT(recipe_of(lab, folders)).step(State(shared=shared), Outcome(shared=change))
    assert once.sha256() == again.sha256()
    assert once.facts == {"fits": 1}
    assert any(not torch.equal(once.shared[name], tensor) for name, tensor in shared.items())
    # The second fit draws other batches than the first.
    second = system.step(State(shared=shared, facts={"fits": 1}), Outcome(shared=change))
    assert any(not torch.equal(once.shared[name], tensor) for name, tensor in second.shared.items())


def test_distilling_brings_the_small_model_nearer_to_its_teacher(lab: Laboratory, folders: dict[str, str]) -> None:
    knobs = {"large": folders["large"], "distillation_steps": 30, "distillation_rate": 1e-2, "public_examples": 4}
    system = FedPT(recipe_of(lab, folders, {"knobs": knobs}))
    server, shared = system.server, system.server.expert.initial(0)
    learnt = server.distil(shared, seed=1)
    batch = server.public.batch(list(range(4)), 0)
    wanted, labels = predictions(server.proxy(shared), batch)
    losses = []
    for state in (shared, learnt):
        server.student.load(state)
        with torch.no_grad(), server.student.active():
            found, _ = predictions(server.small.model, batch)
        losses.append(float(distillation_loss(found, wanted, labels, 2.0)))
    assert losses[1] < 0.9 * losses[0]


def test_the_large_model_and_the_small_base_are_untouched(system: FedPT) -> None:
    models = (system.server.large.model, system.server.small.model)
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    system.server.distil(some_state(system), seed=2)
    for model, saved in zip(models, before, strict=True):
        assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_only_the_small_models_trainable_travels(finished: Finished) -> None:
    adapter = 4 * finished.world.trainable().size()
    names = finished.world.trainable().parameters().keys()
    brief = finished.system.brief(finished.state, 0)
    assert {name.partition("/")[2] for name in brief.tensors} == set(names)
    frames = finished.meter.frames(purpose="work")
    assert frames == 2 * 2 * 2  # two parties, two rounds, there and back
    framing = finished.meter.total(purpose="work") - frames * adapter
    assert 0 < framing < frames * 4096


def test_parties_never_open_the_large_base(finished: Finished, folders: dict[str, str]) -> None:
    opened = finished.world.site.bases
    assert folders["small"] in opened
    assert folders["large"] not in opened
    assert "server" not in vars(finished.world.site.system)


def test_two_runs_end_alike(finished: Finished, lab: Laboratory, folders: dict[str, str]) -> None:
    assert lab.run(recipe_of(lab, folders)).state.sha256() == finished.state.sha256()


def test_bases_that_do_not_fit_are_refused_before_any_work(
    lab: Laboratory, folders: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="encoder-decoder"):
        lab.run(recipe_of(lab, folders, {"knobs": {"large": folders["t5"]}}))
    with pytest.raises(ModelError, match="vocabulary"):
        lab.run(recipe_of(lab, folders, {"knobs": {"large": "micro"}}))
    with pytest.raises(RecipeError, match="tiny-t5"):
        load_system(Recipe(system="fedpt", knobs={"large": "tiny-t5"}))
    with pytest.raises(RecipeError, match="objective"):
        load_system(Recipe(system="fedpt").replace({"training.objective": "seq2seq"}))
    with pytest.raises(RecipeError, match="temperature"):
        load_system(Recipe(system="fedpt", knobs={"temperature": 0.0}))


def test_the_run_is_told_which_base_the_coordinator_needs() -> None:
    assert load_system(Recipe(system="fedpt")).bases() == ("small",)
    assert load_system(Recipe(system="fedavg")).bases() == ()
