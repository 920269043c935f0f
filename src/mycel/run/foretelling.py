"""What an island's run is foretold to take on the recipe's fleet, to be set beside what it took."""

from __future__ import annotations

from typing import Any

from mycel.decisions.cost import Coefficients, Work, predict
from mycel.decisions.graph import graph_of
from mycel.decisions.layout import ranks_of, stage_blocks
from mycel.fleet import load_fleet
from mycel.recipe.schema import Recipe


def foretold(recipe: Recipe, config: Any) -> dict[str, Any]:
    """Return seconds of a step and bytes of rank 0, under the names that ``result.json`` measures the same under.

    Parameters
    ----------
    config : transformers configuration
        Of the model that is laid out; every rank is the fleet's next device, which begins again at its end.
    """
    layout, fleet = recipe.layout, load_fleet(recipe.fleet.devices)
    work = Work(graph_of(config, recipe.data.max_length), recipe.training.batch_size)
    stages = layout.pipeline * layout.chunks
    split = [len(part) for part in stage_blocks(config.num_hidden_layers, stages, layout.blocks or None)]
    devices = [fleet[rank] for rank in range(ranks_of(layout))]
    found = predict(work, layout, split, devices, Coefficients(**fleet.calibration))
    sent = round(found.ranks[0].bytes * recipe.rounds.count)
    return {"step_seconds": found.seconds, "bytes": {"up": sent, "down": sent}}
