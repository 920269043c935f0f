"""Training across a cut: gradients through peers, prompts, and SplitLoRA's reductions."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from decoders import decoder
from mycel.errors import EngineError, RecipeError
from mycel.finetune.split_lora import SplitLora
from mycel.models.cut import Cut
from mycel.recipe.schema import Recipe
from mycel.rounds.registry import load_system
from mycel.segments.segment import Segment
from mycel.segments.training import Chain
from swarms import bench

IDS = torch.tensor([[5, 17, 9, 44, 3], [7, 30, 12, 90, 4]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    decoder("llama-untied").save_pretrained(place)
    return place


@pytest.mark.parametrize("lost", ["", "forward", "backward"])
def test_gradients_through_peers_equal_local_ones(folder: Path, lost: str) -> None:
    cut = Cut.open(folder)
    prompt = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))

    def loss(tail: torch.Tensor) -> torch.Tensor:
        return cross_entropy(cut.head(tail)[:, 3:-1].flatten(0, 1), IDS[:, 1:].flatten())

    local = prompt.clone().requires_grad_()
    loss(cut.run(torch.cat([local, cut.embed(IDS)], 1))).backward()  # type: ignore[no-untyped-call]

    async def remote() -> torch.Tensor:
        async with bench(folder, [(0, 2), (2, 4), (0, 4)]) as made:
            mine = prompt.clone().requires_grad_()
            hidden = torch.cat([mine, cut.embed(IDS)], 1)
            chain = Chain(made.model)
            if lost == "forward":
                made.member((await made.model.directory.route(0, 4, 1.0))[0].peer).kill()
            tail = (await chain.forward(hidden)).requires_grad_()
            loss(tail).backward()  # type: ignore[no-untyped-call]
            if lost == "backward":
                made.member(chain._stages[-1].leg.peer).kill()
            assert tail.grad is not None
            hidden.backward(await chain.backward(tail.grad))  # type: ignore[no-untyped-call]
            assert mine.grad is not None
            return mine.grad

    torch.testing.assert_close(asyncio.run(remote()), local.grad, rtol=1e-4, atol=1e-7)


def test_a_segment_collects_its_own_gradients(folder: Path) -> None:
    whole, part = Cut.open(folder), Cut.open(folder, 1, 3, embed=False, head=False)
    for cut in (whole, part):
        cut.block(1).requires_grad_(True)
    states = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1))
    whole.run(states, 1, 3).square().sum().backward()  # type: ignore[no-untyped-call]
    segment = Segment(part)
    made = segment.forward(states, "batch")
    segment.backward(2 * made, "batch")
    for mine, right in zip(segment.trainable(), whole.block(1).parameters(), strict=True):
        torch.testing.assert_close(mine.grad, right.grad, rtol=1e-4, atol=1e-5)
    with pytest.raises(EngineError, match="waits here"):
        segment.backward(made, "batch")


@pytest.mark.parametrize("cut", [0, 1, 3, 4])
def test_split_lora_with_one_client_is_centralised_lora_wherever_it_is_cut(folder: Path, cut: int) -> None:
    split, whole = SplitLora(folder, 1, cut), SplitLora(folder, 1, 0)
    for _ in range(4):
        assert split.step(0, IDS) == pytest.approx(whole.step(0, IDS), rel=1e-5)
    split.average()
    torch.testing.assert_close(split.adapters(), whole.adapters(), rtol=0, atol=1e-5)


def test_split_lora_averages_clients_and_never_the_server(folder: Path) -> None:
    split = SplitLora(folder, 2, 2)
    split.step(0, IDS)
    split.step(1, IDS.flip(1))
    name = next(name for name in split.clients[0].lora if "lora_B" in name)
    mean = (split.clients[0].lora[name] + split.clients[1].lora[name]).detach() / 2
    server = {name: each.detach().clone() for name, each in split.server.lora.items()}
    split.average()
    for client in split.clients:
        assert torch.equal(client.lora[name].detach(), mean)
    assert all(torch.equal(each, split.server.lora[name].detach()) for name, each in server.items())
    assert not set(split.clients[0].lora) & set(split.server.lora)


def test_a_recipe_cannot_run_a_system_of_segments() -> None:
    with pytest.raises(RecipeError, match="works by segments and not in rounds"):
        load_system(Recipe(system="petals"))
