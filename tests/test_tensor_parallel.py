"""Blocks shared out inside compute what whole blocks compute: unequal shares, star and ring, forward and backward."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from decoders import decoder
from mycel.decisions.shares import shares
from mycel.errors import ModelError
from mycel.models.cut import Cut
from mycel.segments.mesh import Mesh, Pace, listening
from mycel.segments.ranks import Group, ranks
from mycel.segments.tensor_parallel import Sharded, side_by_side
from mycel.segments.window import Window
from test_segments import greedy

FAMILIES = ["llama", "gpt-neox", "phi", "gemma2", "qwen3", "granite"]


@given(st.integers(1, 60), st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_shares_give_every_unit_once_and_nobody_more_than_a_unit_too_much(units: int, weights: list[float]) -> None:
    if units < len(weights):
        with pytest.raises(ModelError):
            shares(units, weights)
        return
    found = shares(units, weights)
    assert [unit for mine in found for unit in mine] == list(range(units))
    spare = units - len(weights)
    for mine, weight in zip(found, weights, strict=True):
        assert abs(len(mine) - 1 - spare * weight / sum(weights)) < 1


class _Meeting:
    """Adds up what threads bring, in the order of ranks."""

    def __init__(self, size: int) -> None:
        self.given: list[Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size, timeout=30)

    def of(self, rank: int) -> Callable[[Tensor], Tensor]:
        def total(tensor: Tensor) -> Tensor:
            self.given[rank] = tensor.detach()
            self.barrier.wait()
            found = sum(each for each in self.given if each is not None)
            self.barrier.wait()
            assert isinstance(found, Tensor)
            return found

        return total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("syncs", [1, 2])
def test_unequal_shares_equal_the_whole_forward_and_backward(family: str, syncs: int) -> None:
    whole = Cut.of(decoder(family))
    if syncs == 1 and not side_by_side(whole):
        with pytest.raises(ModelError, match="two sums"):
            Sharded(whole, 0, (1.0, 1.0), lambda tensor: tensor, syncs=1)
        return
    weights = (1.0, 3.0) if family in {"phi", "gpt-neox"} else (1.0, 1.0)
    meeting, states = _Meeting(2), torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    entered = states.clone().requires_grad_()
    right = whole.run(entered)
    right.square().sum().backward()  # type: ignore[no-untyped-call]
    found: dict[int, tuple[Tensor, Tensor]] = {}

    cuts = [Cut.of(decoder(family)) for _ in range(2)]

    def work(rank: int) -> None:
        cut = cuts[rank]
        Sharded(cut, rank, weights, meeting.of(rank), syncs)
        mine = states.clone().requires_grad_()
        made = cut.run(mine)
        # The residual's gradient is everyone's; what the shares add was summed on the way back.
        made.square().sum().backward()  # type: ignore[no-untyped-call]
        assert mine.grad is not None
        found[rank] = made.detach(), mine.grad

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert entered.grad is not None
    for rank in range(2):
        torch.testing.assert_close(found[rank][0], right.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[rank][1], entered.grad, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    decoder("llama-untied").save_pretrained(place)
    return place


@pytest.mark.parametrize(
    "changes",
    [{"reduce": "star"}, {"reduce": "ring", "ids": True}, {"window": 2}],
    ids=["star", "ring-with-ids", "window"],
)
def test_processes_give_the_whole_models_greedy_tokens(folder: Path, changes: dict[str, object]) -> None:
    prompt = [5, 17, 9, 44]
    with ranks(Group(folder, (1.0, 1.0), pace=Pace(latency=1e-4), **changes)) as master:  # type: ignore[arg-type]
        assert master.generate(prompt, 8) == greedy(folder, prompt, 8)
        assert master.generate(prompt[:2], 4) == greedy(folder, prompt[:2], 4)
        assert master.sums.calls == (8 + 4) * 2 * 4  # two sums a block and token, of four blocks


@pytest.mark.parametrize("window", [1, 2, 9])
def test_a_window_of_weights_computes_what_all_do(folder: Path, window: int) -> None:
    whole, some = Cut.open(folder), Window(folder, window)
    states = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(3))
    try:
        with torch.inference_mode():
            right, cache = whole.run(states), some.cut.new_cache()
            parts = torch.cat([some.cut.run(part, cache=cache) for part in (states[:, :4], states[:, 4:])], 1)
        torch.testing.assert_close(parts, right, rtol=1e-5, atol=1e-5)
        held = [index for index in range(4) if not next(some.cut.block(index).parameters()).is_meta]
        assert held == ([] if window < 4 else [0, 1, 2, 3])
        # Two passes, and what was read ahead for the third.
        assert some.reads <= (8 + window if window < 4 else 4)
    finally:
        some.close()


@pytest.mark.parametrize("said", [b"", b"\x01\x00\x00\x00wrong!", b"\x01\x00"])
def test_a_stranger_who_goes_or_knows_no_secret_is_turned_away_and_the_group_meets(said: bytes) -> None:
    servers = listening(2)
    ports = [server.getsockname()[1] for server in servers]
    with socket.create_connection(("127.0.0.1", ports[0])) as stranger:  # the first whom rank 0 takes in
        stranger.sendall(said)
    with ThreadPoolExecutor(2) as threads:
        meshes = list(threads.map(lambda rank: Mesh.connect(rank, servers[rank], ports, "secret"), range(2)))
    assert [sorted(mesh.links) for mesh in meshes] == [[1], [0]]
    for mesh in meshes:
        mesh.close()
