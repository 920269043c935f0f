"""A coordinating process: one round of federated averaging for each size, over a line to whoever plays Flower."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from multiprocessing.connection import Client, Connection
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch

from mycel.engines.flower.engine import PART, PIECE, FlowerEngine
from mycel.finetune.fedavg import FedAvg
from mycel.fleet import load_fleet
from mycel.recipe.schema import Recipe
from mycel.rounds.coordinator import Coordinator
from mycel.rounds.pace import parse_pace
from mycel.rounds.site import Site
from mycel.rounds.system import State
from mycel.rounds.world import Node, World
from mycel.wire.shelf import Shelf
from villages import peak_of

TENSOR = 1 << 20  # numbers in each tensor of a state, at most


class Large(FedAvg):
    """Federated averaging over a state of so many numbers."""

    numbers = 0

    def begin(self, world: World) -> State:
        """Ones."""
        sizes = [min(TENSOR, self.numbers - start) for start in range(0, self.numbers, TENSOR)]
        return State(shared={f"w{index}": torch.ones(size) for index, size in enumerate(sizes)})


async def one_round(line: Connection, numbers: int, part: int, piece: int) -> None:
    """Run a round over two parties, and check what it comes to."""
    engine = FlowerEngine(line, [1, 2], part=part, piece=piece)
    with tempfile.TemporaryDirectory() as folder:
        coordinator = coordinator_of(engine, numbers, Shelf(budget=part, folder=Path(folder)))
        state = await coordinator.run()
        assert coordinator.progress.rounds[0]["answers"] == 2
        assert all(bool((tensor == 2).all()) for tensor in state.shared.values()), "1 + the mean of 1 and 1 is 2"
        await engine.close()


def coordinator_of(engine: FlowerEngine, numbers: int, shelf: Shelf) -> Coordinator:
    """Return a coordinator of one round of two parties."""
    nodes = [Node(index, name, 1, 1.0, 1) for index, name in enumerate(("one", "two"))]
    made = Recipe().replace({"rounds.count": 1, "data.count": 2, "fleet.devices": "equal"})
    model = SimpleNamespace(parameters=lambda: iter([torch.empty(numbers, device="meta")]))
    world = World(made, load_fleet("equal"), nodes, cast(Site, SimpleNamespace(base=SimpleNamespace(model=model))))
    world.sizes = {None: numbers}
    system = Large(made)
    system.numbers = numbers
    coordinator = Coordinator(
        world, system, engine, parse_pace("synchronous"), lambda event, **fields: None, shelf=shelf
    )
    coordinator.progress.delivered = True  # the round alone is of interest
    return coordinator


def main(path: str) -> None:
    """Take orders from standard input; say for each how much memory the round took beyond what there was."""
    torch.set_num_threads(1)
    for order in sys.stdin:
        numbers, scale = json.loads(order)
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark begins anew
        before = peak_of("self")
        asyncio.run(one_round(Client(path, "AF_UNIX"), numbers, PART // scale, PIECE // scale))
        print(peak_of("self") - before, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
