"""The Flower application that `flower.py` measures: FedAvg of LoRA states, written as its documentation shows."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from rounds import BareLoop


@lru_cache(maxsize=1)
def loop(base: str, store: str, steps: int) -> BareLoop:
    """Open base and data once per actor."""
    from pathlib import Path

    torch.set_num_threads(1)
    return BareLoop(Path(base), Path(store), steps)


def make_apps(base: str, store: str, steps: int, rounds: int) -> tuple[ServerApp, ClientApp]:
    """Return the server's and the clients' application."""
    client, server = ClientApp(), ServerApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        local = loop(base, store, steps)
        local.start = dict(message.content["arrays"].to_torch_state_dict())
        with local.adapter.active():
            state = local.local(
                int(context.node_config["partition-id"]), int(message.content["config"]["server-round"])
            )
        metrics = MetricRecord({"num-examples": 64})
        return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy: Any = FedAvg(fraction_train=1.0, fraction_evaluate=0.0)
        arrays = ArrayRecord(loop(base, store, steps).start)
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds, train_config=ConfigRecord({}))

    return server, client
