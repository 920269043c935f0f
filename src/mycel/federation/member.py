"""A party of a real federation: its own data, its own base, and the site that works on them.

What reaches it is a recipe and briefs. It takes no path, no data source and no code from them: examples come from the
folder that its administrator named, and what leaves is what `rounds.site` lets leave, and counts.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mycel.data.cleaned import clean_examples
from mycel.data.parties import PartyData, load_parties
from mycel.data.sources import load_examples
from mycel.data.tokens import TokenStore
from mycel.decisions.layout import check_layout, layout_of
from mycel.engines.line import Control
from mycel.errors import ModelError, ParcelError, RecipeError
from mycel.federation.consent import Consent
from mycel.fleet import load_fleet
from mycel.models.base import Base, find_base, open_base
from mycel.recipe.load import check
from mycel.recipe.schema import Recipe
from mycel.rounds.sealing import Sealing
from mycel.rounds.simulation import describe
from mycel.rounds.site import Job, Site
from mycel.rounds.world import World
from mycel.run.plan import peak_bytes

if TYPE_CHECKING:
    from mycel.collectives.leading import Leader
    from mycel.collectives.processes import RankProcesses

VERSION = 1  # of what travels beside parcels


@dataclass(frozen=True)
class Task:
    """What a coordinator tells every party of a run before its first brief; JSON on the wire.

    Attributes
    ----------
    run : str
        A name that no other run has, so that what a party keeps at home for one is never used for another.
    base : str
        Hash of the base's files, which must be the same everywhere.
    """

    recipe: Recipe
    run: str
    base: str

    def to_json(self) -> str:
        """Serialise."""
        content = {"version": VERSION, "run": self.run, "base": self.base}
        return json.dumps({**content, "recipe": self.recipe.model_dump(mode="json", exclude={"engine"})})

    @classmethod
    def from_json(cls, text: str) -> Task:
        """Inverse of ``to_json``; whatever is unsound is refused."""
        try:
            content = json.loads(text)
            version, run, base, recipe = (content[key] for key in ("version", "run", "base", "recipe"))
        except (ValueError, TypeError, LookupError) as error:
            raise RecipeError(f"the coordinator's task is damaged: {str(error)[:80]}") from error
        if version != VERSION:
            raise RecipeError(f"the coordinator speaks version {str(version)[:20]}, this party {VERSION}: update Mycel")
        return cls(check(recipe, "the coordinator's recipe"), str(run), str(base))


def base_sha256(folder: Path) -> str:
    """Hash of a base's weights, shape and vocabulary: equal models have equal hashes wherever they lie."""
    digest = hashlib.sha256()
    names = [
        path for path in sorted(folder.iterdir()) if path.suffix == ".safetensors" or path.name == "tokenizer.json"
    ]
    for path in names:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class PrivateSite(Site):
    """A site whose store holds one party alone, whatever its number in the federation."""

    own: int = 0

    @cached_property
    def sealing(self) -> Sealing:
        """What answers go through before they leave."""
        spread = self.job.recipe.data
        return Sealing(self.job.recipe, len(spread.parties) if isinstance(spread.parties, list) else spread.count)

    def holding(self, node: int) -> int:
        """Its own examples, and nobody else's."""
        if node not in (self.own, -1):
            raise ParcelError(f"the brief asks for the examples of party {node}, and this is party {self.own}")
        return 0


class PrivateSites:
    """What rank 0 of a party's island runs, where the island's processes are the party's own."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader
        self._sites: dict[str, PrivateSite] = {}
        self._bases: dict[str, Base] = {}

    def open(self, arm: str, job: str) -> None:
        """Make a run known, as ``Membership`` describes it."""
        content = json.loads(job)
        site = PrivateSite(Job.from_json(content["job"]), self._bases, leader=self._leader)
        site.own = int(content["own"])
        self._sites[arm] = site

    def handle(self, arm: str, node: int, frame: bytes, home: bytes) -> tuple[bytes, bytes]:
        """Carry out one brief."""
        return self._sites[arm].handle(node, frame, home)

    def close(self) -> None:
        """Nothing to give back."""


@dataclass
class Membership:
    """Hosts a party's part in every run that it consents to.

    Parameters
    ----------
    data : Path
        A file or folder of examples; or a folder with ``train.jsonl`` and ``held_out.jsonl``, which are kept as they
        are.
    folder : Path
        Where token stores lie.
    ranks : RankProcesses, optional
        The party is an island of so many processes here.
    leader : Leader, optional
        The party is an island, of which this process is rank 0.
    """

    name: str
    data: Path
    folder: Path
    consent: Consent = field(default_factory=Consent)
    ranks: RankProcesses | None = None
    leader: Leader | None = None
    _sites: dict[str, PrivateSite] = field(default_factory=dict)
    _about: dict[str, Control] = field(default_factory=dict)
    _bases: dict[str, Base] = field(default_factory=dict)
    _cleaned: dict[str, int] = field(default_factory=dict)

    def describe(self, arm: str, job: str, node: int) -> Control:
        """Open a run, if this party consents to it, and say what its coordinator may know: counts."""
        if arm not in self._sites:
            task = Task.from_json(job)
            self.consent.check(task.recipe)
            torch.set_num_threads(self.consent.threads)
            site = self._open(arm, task, node)
            self._check_island(site)
            (about,) = describe(site.store, task.recipe)
            ranks = task.recipe.trainable.rank
            rank = ranks[node % len(ranks)] if isinstance(ranks, list) else about.rank
            world = World(task.recipe, load_fleet(task.recipe.fleet.devices), [about], site)
            world.sizes = {about.rank: site.bind(rank).size()}
            self.consent.check_memory(peak_bytes(world, about))
            counts = {"samples": about.samples, "mean_tokens": about.mean_tokens, "held_out": about.held_out_tokens}
            cleaned = {"cleaning": self._cleaned} if task.recipe.data.cleaning else {}
            self._sites[arm], self._about[arm] = site, {"name": self.name, "rank": rank, **counts, **cleaned}
        return self._about[arm]

    def _open(self, arm: str, task: Task, node: int) -> PrivateSite:
        base = find_base(task.recipe.model.base)
        found = base_sha256(base)
        if found != task.base:
            raise ModelError(
                f"the base {task.recipe.model.base!r} is another here ({found[:12]}) than at the coordinator "
                f"({task.base[:12]}): copy its folder, and name it in the recipe"
            )
        spec, path = task.recipe.data, self.folder / f"{arm}.safetensors"
        tokenizer = open_base(base).tokenizer
        party = self._examples(task.recipe)
        self._cleaned = party.cleaned
        TokenStore.build([party], tokenizer, spec.max_length, spec.pack).save(path)
        site = PrivateSite(Job(task.recipe, str(base), str(path)), self._bases, leader=self.leader)
        site.own = node
        return site

    def _check_island(self, site: PrivateSite) -> None:
        """Refuse a recipe that this party's ranks cannot share out."""
        size = self.ranks.size if self.ranks else self.leader.size if self.leader else 1
        recipe = site.job.recipe
        if size > 1 and site.system.inside:
            config, rows = site.base.model.config, recipe.training.batch_size
            check_layout(layout_of(recipe.layout, size), size, config, rows, recipe.data.max_length)

    def _examples(self, recipe: Recipe) -> PartyData:
        spec = recipe.data
        train, held_out = self.data / "train.jsonl", self.data / "held_out.jsonl"
        if train.exists() and held_out.exists():
            examples, measured = load_examples(str(train)), load_examples(str(held_out))
            cleaned: dict[str, int] = {}
            if spec.cleaning:
                examples, cleaned = clean_examples(examples, spec.cleaning, self.name)
                measured, _ = clean_examples(measured, spec.cleaning, self.name)
            return PartyData(self.name, examples[: spec.examples], measured[: spec.held_out], cleaned)
        (party,) = load_parties(spec.model_copy(update={"parties": [str(self.data)]}), recipe.seed)
        return party

    def handle(self, arm: str, node: int, frame: bytes, home: bytes) -> tuple[bytes, bytes]:
        """Carry out one brief."""
        site = self._sites[arm]
        if self.ranks is None or not site.system.inside:
            return site.handle(node, frame, home)
        job = json.dumps({"job": site.job.to_json(), "own": site.own})
        return self.ranks.handle(arm, job, node, frame, home)
