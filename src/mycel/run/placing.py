"""What `mycel plan` says of an island's recipe: who does what, what a step costs, and who stays out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mycel.decisions.cost import GIB, NUMBER, Coefficients, Work, memory_of
from mycel.decisions.graph import graph_of
from mycel.decisions.keeping import MIB, Knapsack, in_flight, room_of
from mycel.decisions.planner import Placement, Plans, Task, left_out
from mycel.fleet import load_fleet
from mycel.models.sizes import SIZES
from mycel.recipe.schema import Recipe


@dataclass(frozen=True)
class IslandPlan:
    """The best placements of a recipe over a fleet, the least cost first, and why devices stay out."""

    steps: int
    placements: list[Placement]
    left_out: dict[str, str]
    advice: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return what ``mycel plan --json`` prints."""
        return {
            "steps": self.steps,
            "plans": [
                {
                    "layout": placement.layout.model_dump(mode="json"),
                    "split": list(placement.split),
                    "devices": [device.name for device in placement.devices],
                    "step": {
                        "seconds": placement.predicted.seconds,
                        "bytes": placement.predicted.bytes,
                        "joules": placement.predicted.joules,
                        "money": placement.predicted.money,
                        **placement.predicted.parts,
                    },
                    "ranks": [asdict(rank) for rank in placement.predicted.ranks],
                }
                for placement in self.placements
            ],
            "left_out": self.left_out,
            "advice": self.advice,
        }


def plan_island(recipe: Recipe, objective: str = "seconds") -> IslandPlan:
    """Plan the layout of an island's recipe over its fleet; nothing is trained and no data is read."""
    config = _config(recipe.model.base)
    work = Work(graph_of(config, recipe.data.max_length), recipe.training.batch_size)
    fleet = load_fleet(recipe.fleet.devices)
    task = Task(work, config, fleet.devices, Coefficients(**fleet.calibration), objective=objective)
    plans = Plans().ranked(task)
    return IslandPlan(recipe.rounds.count, plans, left_out(task, plans[0]), advice(task, plans[0]))


def advice(task: Task, best: Placement) -> str:
    """Say how a plan that computes every block again could keep some of them, where there is room for it."""
    if not best.layout.recompute:
        return ""
    graph, layout, inside = task.work.graph, best.layout, len(best.devices) // best.layout.pipeline
    tokens = task.work.batch_size / layout.data / layout.micro_batches * graph.length / layout.sequence
    one, rooms = graph.blocks[0], []
    leaves, kept = NUMBER * one.leaves * tokens, NUMBER * one.kept * tokens
    left = {"keep": leaves + kept, "selective": leaves + kept, "recompute": leaves, "offload": leaves}
    for place, blocks in enumerate(best.split):
        smallest = min(device.memory_gib for device in best.devices[place * inside : (place + 1) * inside]) * GIB
        needed = memory_of(task.work, layout, best.split, place, task.coefficients)
        activations = in_flight(layout) * blocks * leaves + kept / layout.tensor
        rooms.append(room_of(left, leaves, one.flops * tokens, blocks, layout, smallest - needed + activations))
    chosen = [Knapsack().decide(room) for room in rooms]
    ways = [room.blocks[0][way].name for room, each in zip(rooms, chosen, strict=True) for way in each]
    if "keep" not in ways:
        return ""
    counts = ", ".join(f"{ways.count(way)} {way}" for way in dict.fromkeys(ways))
    limit = min(room.bytes for room in rooms) / MIB
    return (
        f"layout.activation_mib = {limit:.4g} in place of recompute would fit and take less time: "
        f"of {len(ways)} blocks {counts}"
    )


def _config(base: str) -> Any:
    if base in SIZES:
        return SIZES[base].config()
    from transformers import AutoConfig

    from mycel.models.base import find_base

    return AutoConfig.from_pretrained(find_base(base), local_files_only=True)
