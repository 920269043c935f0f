"""What blocks leave for their way back: gradients to the bit, memory as foretold, the choice the best there is."""

from __future__ import annotations

import gc
import os
import random
import resource
from typing import Any

import pytest
import torch

from mycel.collectives.apply import lay_out, named_weights
from mycel.collectives.keeping import Spill, mapped
from mycel.collectives.ranks import make_ranks
from mycel.collectives.saving import prime
from mycel.collectives.step import Trainer
from mycel.collectives.together import together
from mycel.decisions.cost import GIB, NOMINAL, Work, memory_of
from mycel.decisions.graph import graph_of
from mycel.decisions.keeping import MIB, Knapsack, Room, Treatment, every_choice, peak
from mycel.decisions.layout import check_layout
from mycel.decisions.planner import Plans, Task
from mycel.errors import RecipeError, RunError
from mycel.fleet.device import Device
from mycel.models.optimizer import make_optimizer
from mycel.models.sizes import SIZES
from mycel.pretrain.activation_memory import held_by, small
from mycel.recipe.schema import Layout, Training
from mycel.run.placing import advice
from mycel.testing.decisions import check_decision

LAYOUTS = (
    Layout(data=2, micro_batches=2),
    Layout(tensor=2),
    Layout(sequence=2),
    Layout.model_validate({"pipeline": 2, "chunks": 2, "schedule": "zbv", "micro_batches": 4}),
)


def _gradients(layout: Layout, device: torch.device) -> dict[str, torch.Tensor]:
    ranks = make_ranks(layout, device)
    stage = lay_out(small(4), ranks)
    trainer = Trainer(stage, ranks, torch.optim.SGD(stage.parameters(), lr=0.1))
    trainer.gradients(torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1)))
    found = {name: weight.grad for name, weight in named_weights(stage).items() if weight.grad is not None}
    return {name: getattr(gradient, "_local_tensor", gradient) for name, gradient in found.items()}


def _differing(device: torch.device) -> list[str]:
    """Ways and layouts on this rank whose gradients are not those of keeping everything, to the bit."""
    wrong = []
    for layout in LAYOUTS:
        kept = _gradients(layout, device)
        ways_here = [["recompute"], ["offload"], ["offload", "keep", "recompute", "keep"]]
        if layout.pipeline == 1:
            ways_here += [["selective"], ["selective", "offload", "keep", "recompute"]]
        for ways in ways_here:
            found = _gradients(layout.model_copy(update={"activations": ways}), device)
            assert kept.keys() == found.keys()
            if not all(torch.equal(found[name], gradient) for name, gradient in kept.items()):
                wrong.append(f"{ways} in {layout}")
    return wrong


@pytest.mark.slow
def test_whatever_blocks_leave_the_gradients_are_the_same_to_the_bit() -> None:
    assert together(2, _differing) == [[], []]


@pytest.mark.slow
def test_the_peak_is_as_foretold_and_within_the_budget() -> None:
    [found] = together(1, lambda device: held_by(device, (0.0, 0.8, 0.5, 0.3)))
    for each in found:
        assert each["measured"] == pytest.approx(each["predicted"], rel=0.15)
        if each["budget"]:
            assert each["predicted"] <= each["budget"]
    peaks = [each["measured"] for each in found]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < 0.5 * peaks[0]


def _rooms(count: int) -> list[Room]:
    chance = random.Random(8)
    rooms: list[Room] = []
    while len(rooms) < count:
        blocks = tuple(
            tuple(
                Treatment(str(way), chance.uniform(0, 5), chance.uniform(0, 9), chance.choice([0.0, 2.0, 4.0]))
                for way in range(chance.randint(1, 4))
            )
            for _ in range(chance.randint(1, 5))
        )
        room = Room(blocks, chance.uniform(5, 40))
        if any(not Knapsack().fault(room, chosen) for chosen in every_choice(room)):
            rooms.append(room)
    return rooms


def test_the_choice_is_the_best_of_all() -> None:
    def exact(room: Room) -> float:
        sound = [chosen for chosen in every_choice(room) if peak(room, chosen) <= room.bytes]
        return min(Knapsack().cost(room, chosen) for chosen in sound)

    check_decision(Knapsack(), _rooms(150), exact)


def test_a_budget_that_nothing_fits_is_refused_with_what_would_do() -> None:
    ways = (Treatment("keep", 0, 4 * MIB), Treatment("recompute", 1, 1 * MIB, 3 * MIB))
    with pytest.raises(RecipeError, match="is 4, and 3 blocks need 6 at least"):
        Knapsack().decide(Room((ways,) * 3, 4 * MIB))
    assert Knapsack().decide(Room((ways,) * 3, 9 * MIB)) == (0, 1, 1)


DIVIDED = {"schedule": "zbv", "chunks": 2, "pipeline": 2, "micro_batches": 2}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"recompute": True, "activation_mib": 5.0}, "layout.recompute and layout.activation_mib both"),
        ({"activations": ["selective"], **DIVIDED}, "goes back in two: try recompute"),
        ({"activations": ["keep"] * 3}, "has 3 entries, and the model 4 blocks"),
    ],
)
def test_two_ways_with_the_same_activations_are_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        check_layout(Layout.model_validate(given), given.get("pipeline", 1), SIZES["tiny"].config(), 4, 32)


def test_what_waits_in_a_file_comes_back_or_is_refused() -> None:
    spill = Spill()
    tensors = [torch.randn(7, 100), torch.randn(600).bfloat16(), torch.randint(0, 9, (50, 40)).t()]
    kept = [spill.pack(tensor) for tensor in tensors]
    assert spill.written == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert all(torch.equal(spill.unpack(each), tensor) for each, tensor in zip(kept, tensors, strict=True))
    small_one = torch.ones(3)
    assert spill.pack(small_one) is small_one
    os.pwrite(spill._file, b"\x01\x02", 40)
    with pytest.raises(RunError, match="came back changed"):
        spill.unpack(kept[0])
    del kept
    gc.collect()
    spill.pack(tensors[0])
    assert os.fstat(spill._file).st_size == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_a_full_disk_is_a_sentence_and_what_was_begun_takes_no_place() -> None:
    spill, tensor, before = Spill(), torch.randn(900), resource.getrlimit(resource.RLIMIT_FSIZE)
    spill.pack(torch.randn(300))
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(RunError, match="3600 bytes of activations could not be written: is the disk full"):
            spill.pack(tensor)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    gc.collect()
    kept = spill.pack(tensor)
    assert torch.equal(spill.unpack(kept), tensor)
    assert os.fstat(spill._file).st_size == 3600


def test_an_optimiser_whose_memory_lies_in_a_file_takes_the_same_steps() -> None:
    models = [torch.nn.Linear(30, 20) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [make_optimizer(dict(model.named_parameters()), Training(weight_decay=0.1)) for model in models]
    prime(dict(models[1].named_parameters()), optimizers[1])
    assert mapped(optimizers[1]) == 2 * 4 * (30 * 20 + 20)
    for step in range(5):
        entering = torch.randn(4, 30, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(entering).square().sum().backward()
            optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_plan_that_computes_again_says_how_much_could_be_kept() -> None:
    config = SIZES["tiny"].config()
    work = Work(graph_of(config, 64), 8)
    needed = [memory_of(work, layout, (4,), 0, NOMINAL) / GIB for layout in (Layout(), Layout(recompute=True))]
    for share in (0.9, 0.01):
        task = Task(work, config, (Device("a", 50, needed[1] + share * (needed[0] - needed[1])),))
        said = advice(task, Plans().decide(task))
        assert said.startswith("layout.activation_mib = ")
        assert " keep" in said
    roomy = Task(work, config, (Device("a", 50, 2 * needed[0]),))
    assert not advice(roomy, Plans().decide(roomy))
