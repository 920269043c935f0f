"""Federated LoRA of an encoder-decoder: equality with a plain loop, byte counts, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict

from mycel.errors import RecipeError
from mycel.finetune.fedavg_t5 import T5, FedAvgT5, centralised
from mycel.models.base import open_base
from mycel.recipe.schema import Recipe
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.registry import load_system
from mycel.rounds.simulation import Finished
from mycel.rounds.system import Answer, State
from mycel.testing.bases import HIDDEN, random_base
from mycel.wire.algebra import with_role
from mycel.wire.parcel import Parcel

RANK = 2
ATTENTION_LAYERS = 6  # two blocks: encoder, decoder, and decoder over encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("bases") / "t5"
    random_base(made, "t5")
    return str(made)


def recipe_of(lab: Laboratory, folder: str, changes: dict[str, Any] | None = None) -> Recipe:
    few = {"data.examples": 12, "data.held_out": 3, "data.count": 2, "data.max_length": 48, "trainable.rank": RANK}
    quick = {"rounds.count": 2, "rounds.local_steps": 3, "training.batch_size": 4}
    return lab.recipe("fedlora_t5", {**T5, **few, **quick, "model.base": folder, **(changes or {})})


@pytest.fixture(scope="module")
def finished(lab: Laboratory, folder: str) -> Finished:
    return lab.run(recipe_of(lab, folder))


def test_one_party_is_centralised_lora(lab: Laboratory, folder: str) -> None:
    one = recipe_of(lab, folder, {"data.count": 1, "rounds.count": 1, "rounds.local_steps": 8})
    plain, alone = centralised(lab, one), lab.run(one).state.shared
    start = lab.world(one).starting_state()
    assert max(float((plain[name] - tensor).abs().max()) for name, tensor in start.items()) > 1e-3
    for name, tensor in plain.items():
        torch.testing.assert_close(alone[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # peft asks transformers by the older name
def test_the_rounds_of_one_party_are_pefts_own_training(lab: Laboratory, folder: str) -> None:
    one = recipe_of(lab, folder, {"data.count": 1})
    world, base = lab.world(one), open_base(Path(folder))
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(base.model, config)
    prefix, suffix = "base_model.model.", ".weight"
    start = {f"{prefix}{name}{suffix}": tensor for name, tensor in world.starting_state().items()}
    assert not set_peft_model_state_dict(model, start).unexpected_keys
    live = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for version in range(one.rounds.count):
        optimizer = torch.optim.AdamW(live, lr=one.training.learning_rate, weight_decay=0.0)
        for batch in world.site.party(0, version).batches():
            optimizer.zero_grad()
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(live, one.training.clip_norm)
            optimizer.step()
    expected = get_peft_model_state_dict(model)
    found = lab.run(one).state.shared
    assert {f"{prefix}{name}{suffix}" for name in found} == set(expected)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[f"{prefix}{name}{suffix}"], rtol=0, atol=1e-5)


def test_it_is_fedavg_to_the_bit(lab: Laboratory, folder: str, finished: Finished) -> None:
    plain = lab.run(recipe_of(lab, folder, {"system": "fedavg"}))
    assert plain.state.sha256() == finished.state.sha256()


def test_an_answer_is_a_and_b_of_queries_and_values_and_its_framing(finished: Finished) -> None:
    predicted = 2 * RANK * (HIDDEN + HIDDEN) * ATTENTION_LAYERS * 4
    # The first round's frames can be made anew, for its brief is known.
    brief = Parcel("work", {"version": 0, "evaluate": 1}, with_role("shared", finished.world.starting_state()))
    frames = [finished.world.site.handle(node, brief.to_bytes(), b"")[0] for node in range(2)]
    for frame in frames:
        (header,) = struct.unpack("<Q", frame[:8])
        assert len(frame) == 8 + header + predicted
    assert finished.progress.rounds[0]["bytes_up"] == sum(len(frame) for frame in frames)
    names = set(Parcel.from_bytes(frames[0]).tensors)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in names} == {"q", "v"}
    assert len(names) == 2 * 2 * ATTENTION_LAYERS


def test_combining_weighs_by_examples_whatever_the_order(lab: Laboratory, folder: str) -> None:
    system = FedAvgT5(recipe_of(lab, folder))
    source = torch.Generator().manual_seed(2)
    shared = {"q.lora_A": torch.zeros(RANK, 5), "q.lora_B": torch.zeros(5, RANK)}
    answers = []
    for node, samples in enumerate((1, 2, 5)):
        change = {name: torch.randn(tensor.shape, generator=source) for name, tensor in shared.items()}
        answers.append(Answer(node, Parcel("answer", {}, with_role("update", change)), samples, 0, float(samples)))
    found = system.step(State(shared=shared), system.combine(State(shared=shared), answers)).shared
    for name in shared:
        expected = sum(answer.weight / 8 * answer.tensors()[name] for answer in answers)
        torch.testing.assert_close(found[name], expected)
        torch.testing.assert_close(system.combine(State(shared=shared), answers[::-1]).shared[name], expected)


def test_training_lowers_the_loss_of_every_party(finished: Finished, lab: Laboratory, folder: str) -> None:
    longer = lab.run(recipe_of(lab, folder, {"rounds.local_steps": 15, "training.learning_rate": 1e-2}))
    before, after = longer.scores(0), longer.scores()
    assert all(after[node].loss < before[node].loss for node in before)


def test_a_decoder_only_base_is_refused(lab: Laboratory, folder: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'micro', which is decoder-only.*tiny-t5"):
        load_system(recipe_of(lab, folder, {"model.base": "micro"}))
    random_base(tmp_path / "llama")
    # Targets are those of the other family, so that the base is opened at all.
    other = {"model.base": str(tmp_path / "llama"), "trainable.targets": ["q_proj", "v_proj"]}
    with pytest.raises(RecipeError, match="decoder alone"):
        lab.run(recipe_of(lab, folder, other))


@pytest.mark.parametrize(("key", "value"), [("training.objective", "causal"), ("trainable.kind", "full")])
def test_what_the_system_is_not_is_refused(lab: Laboratory, folder: str, key: str, value: str) -> None:
    with pytest.raises(RecipeError, match=key):
        load_system(recipe_of(lab, folder, {key: value}))
