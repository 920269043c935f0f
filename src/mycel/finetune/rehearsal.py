"""Private fine-tuning with a measured loss of privacy: rehearsal against forgetting, models averaged, audited.

Popov et al. 2018, "Distributed Fine-tuning of Language Models on Private Data" (catalogue number 91).

    party k:      each batch mixes private examples with a share of a general corpus ("random rehearsal"); few steps
    coordinator:  averages the models
    audit:        how much likelier a party's texts are under a model that saw them than under one that did not

Here the general corpus is drawn from what every holder of the recipe can read: the recipe's own source, pooled, from
another seed. A batch of rehearsal follows a private one in the ratio ``rehearsal``, which on average trains the same
mixture; that batches are whole is ours. With ``rehearsal = 0`` this is federated averaging. The paper's empirical
(epsilon, delta) fits the tail of likelihood ratios; here the audit is the membership attack of `rounds.assaults`, for a
fitted tail is no bound.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from mycel.data.parties import load_parties
from mycel.data.tokens import TokenTable
from mycel.finetune.fedavg import FedAvg, FedAvgKnobs
from mycel.guard.attacks.memorisation import losses
from mycel.guard.attacks.safety import HARMLESS, requests
from mycel.rounds.assaults import membership, stage
from mycel.rounds.laboratory import Measured
from mycel.wire.algebra import group, seed_of, subtract
from mycel.wire.parcel import Parcel

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.party import Party


SETTINGS = {
    "data.held_out": 12,
    "rounds.local_steps": 10,
    "rounds.evaluate_every": 4,
}


class RehearsalKnobs(FedAvgKnobs):
    """Settings of rehearsal."""

    rehearsal: float = Field(0.5, ge=0, lt=1, description="share of steps on the general corpus")
    general: str = Field("python-library", description="source of the general corpus")


class Rehearsal(FedAvg):
    """Federated averaging whose parties also train on what everyone may read."""

    Knobs = RehearsalKnobs

    def work(self, brief: Parcel, party: Party) -> Parcel:
        """Train on a table in which the general corpus has its share, and send the change."""
        trainable = self.adopt(brief, party)
        share = self.knobs.rehearsal
        if share:
            wanted = max(1, round(len(party.examples) * share / (1 - share)))
            general = self.general(party)
            start = seed_of(party.seed, "rehearsal") % max(len(general) - wanted, 1)
            party.examples = joined(party.examples, general.slice(start, min(start + wanted, len(general))))
        samples = party.samples
        result = party.train(trainable, correct=self.correction(brief, party))
        answer = party.answer(result.loss, subtract(trainable.state(), group(brief.tensors, "shared")))
        return Parcel(answer.kind, {**answer.header, "samples": samples}, answer.tensors)

    def general(self, party: Party) -> TokenTable:
        """The general corpus, tokenised once per process."""
        key = f"{id(party.base)}"
        if key not in self._tables:
            data = self.recipe.data
            changes = {"source": self.knobs.general, "parties": "pooled", "count": 1}
            spec = data.model_validate(data.model_dump() | changes)
            (found,) = load_parties(spec, seed_of(self.recipe.seed, "general"))
            self._tables[key] = TokenTable.from_examples(found.train, party.base.tokenizer, data.max_length)
        return self._tables[key]

    _tables: dict[str, TokenTable] = {}  # noqa: RUF012


def joined(one: TokenTable, other: TokenTable) -> TokenTable:
    """Return a table that holds the examples of both."""
    parts = []
    for table in (one, other):
        first, last = int(table.offsets[0]), int(table.offsets[-1])
        parts.append((table.ids[first:last], table.offsets - first))
    ids = torch.cat([part[0] for part in parts])
    offsets = torch.cat([parts[0][1], parts[1][1][1:] + len(parts[0][0])])
    return TokenTable(ids, offsets, torch.cat([one.prompts, other.prompts]), one.end_id)


def write_parties(folder: Path) -> list[str]:
    """Write what six users type: short questions and answers in a manner that the base has never seen."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"user-{user}.jsonl" for user in range(6)]
    for user, path in enumerate(paths):
        rows = [json.dumps({"prompt": ask, "response": reply}) for ask, reply in requests(80, 200 + user, HARMLESS)]
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return [str(path) for path in paths]


def claim(lab: Laboratory) -> Measured:
    """Users tune: their perplexity falls, that of the library's text rises less with rehearsal; the audit beside."""
    figures: dict[str, float] = {}
    users = write_parties(lab.folder / "users")
    for name, share in (("with", 0.5), ("without", 0.0)):
        recipe = lab.recipe(
            "rehearsal",
            {**SETTINGS, "data.parties": users, "knobs": {"rehearsal": share}},
        )
        scene = stage(lab, recipe)
        world, system = scene.finished.world, scene.finished.system
        assert isinstance(system, Rehearsal)
        data = recipe.data.model_validate(recipe.data.model_dump() | {"source": "python-library", "parties": "pooled"})
        (public,) = load_parties(data, seed_of(recipe.seed, "unseen"))
        general = scene.table(public.held_out)
        own = scene.table([example for party in scene.parties for example in party.held_out])
        for kind, table in (("own", own), ("general", general)):
            before = float(losses(world.base.model, table, 0).mean().exp())
            figures[f"{kind}_{name}"] = float(scene.score(table).mean().exp()) / before
        figures[f"audit_{name}"] = membership(scene)
    rise = {name: figures[f"general_{name}"] - 1 for name in ("with", "without")}
    fall = 1 - figures["own_with"]
    return Measured(
        f"own perplexity falls by {fall:.0%} (without rehearsal {1 - figures['own_without']:.0%}); general perplexity "
        f"changes by {rise['with']:+.0%} (without {rise['without']:+.0%}); membership told at "
        f"{figures['audit_with']:.2f} (without {figures['audit_without']:.2f}; 0.5 is guessing)",
        fall >= 0.3 and rise["with"] <= 0.05 and rise["with"] < rise["without"],
        figures,
    )
