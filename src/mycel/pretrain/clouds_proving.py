"""What cross-cloud training is measured on: three clouds of unlike speed and price, one of which may hold nonsense."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mycel.data.parties import load_parties
from mycel.decisions.clouds import Cheapest, Cloud, Market, Meeting
from mycel.pretrain.proving import pretraining
from mycel.rounds.laboratory import Trail
from mycel.rounds.training import batch_loss

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory

SPEEDS = (20, 40, 80)  # GFLOP/s
WIDE = "link = { up_mbps = 1000, down_mbps = 1000, latency_ms = 1 }"
# Prices as large clouds publish them: an hour of one accelerator, and a GiB that leaves for the internet.
PRICES = Market(
    (
        Cloud("dear egress", 4.0, 4.1, 0.12, 1.25e9),
        Cloud("slow and cheap", 2.0, 1.3, 0.02, 1.25e9),
        Cloud("free egress", 3.0, 3.2, 0.0, 6e8),
    ),
    400_000,
    2.6e9,
    2.6e9,
    (8, 32, 128, 512),
    14.5 * 3600,
)


@dataclass(frozen=True)
class Nonsense:
    """What became of the cloud that holds nonsense: its share of the weight, and the loss on the others' text."""

    share: float
    loss: float


def fleet(lab: Laboratory) -> str:
    """Write the three clouds as a fleet file."""
    path = lab.folder / "clouds.toml"
    tables = [f'[[device]]\nname = "cloud-{speed}"\ngflops = {speed}\n{WIDE}\n' for speed in SPEEDS]
    path.write_text("\n".join(tables), encoding="utf-8")
    return str(path)


def idle_share(lab: Laboratory, partition: str) -> float:
    """Share of the clouds' time between meetings in which they do not compute."""
    changes: dict[str, Any] = {"data.count": 3, "rounds.count": 3, "rounds.local_steps": 24}
    changes |= {"fleet.devices": fleet(lab), "wire.codec": "int8", "wire.brief_codec": "bf16"}
    recipe = lab.recipe("cross_cloud", pretraining({**changes, "knobs": {"partition": partition}}))
    finished = lab.run(recipe, watch=(trail := Trail()))
    steps = finished.state.facts["steps"]
    busy = sum(finished.world.compute_seconds(node, steps[node], 0) for node in range(3))
    each = (trail.moments[-1] - trail.moments[1]) / (recipe.rounds.count - 1)  # the first round also evaluates
    return 1 - busy / (3 * each)


def with_nonsense(lab: Laboratory, aggregation: str) -> Nonsense:
    """Train over two clouds of text and one of the same words shuffled; score on the text of the first two."""
    paths = _write(lab)
    changes: dict[str, Any] = {
        "data.parties": paths,
        "data.examples": 400,
        "data.held_out": 8,
        "rounds.count": 6,
        "rounds.local_steps": 16,
        "fleet.devices": "equal",
        "knobs": {"aggregation": aggregation},
    }
    finished = lab.run(lab.recipe("cross_cloud", pretraining(changes)))
    site = finished.world.site
    trainable = site.bind(None)
    trainable.load(finished.state.shared)
    losses = []
    with trainable.active(), torch.no_grad():
        for party in (0, 1):
            table = site.store.held_out(party)
            losses.append(float(batch_loss(site.base.model, table.batch(range(len(table)), 0))))
    return Nonsense(finished.state.facts["shares"]["2"], sum(losses) / len(losses))


def _write(lab: Laboratory) -> list[str]:
    spec = lab.recipe("cross_cloud", pretraining({"data.parties": "iid", "data.count": 3, "data.examples": 300})).data
    chance, paths = random.Random(3), []
    for index, party in enumerate(load_parties(spec, 1)):
        path = Path(lab.folder) / f"cloud-{index}.jsonl"
        with path.open("w", encoding="utf-8") as lines:
            for example in [*party.train, *party.held_out]:
                words = example.response.split()
                if index == 2:
                    words = ["".join(chance.sample(word, len(word))) for word in chance.sample(words, len(words))]
                    lines.write(json.dumps({"text": " ".join(words)}) + "\n")
                else:
                    lines.write(json.dumps({"text": example.response}) + "\n")
        paths.append(str(path))
    return paths


def money() -> tuple[float, float]:
    """Price of the cheapest meeting, and of meeting every 8 steps at the fastest cloud."""
    plan = Cheapest()
    return plan.cost(PRICES, plan.decide(PRICES)), plan.cost(PRICES, Meeting((0, 1, 2), 0, 8))
