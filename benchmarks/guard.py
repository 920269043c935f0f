"""What guards cost: ``python benchmarks/guard.py [--json] [--part secagg,sums,rounds,filters]``.

secagg    100 parties, updates of 1 MB, 30 of them leave: bytes per party and the coordinator's time, against float32
          updates in the open that are parsed, checked and averaged, party for party
sums      sums under masks, encrypted, and inside the simulated enclave, beside plain ones: a party's bytes and seconds,
          the coordinator's seconds, the largest error of the mean
rounds    a whole round of six parties with each guard, against the same round without one
filters   final loss with 20 % and 40 % of ten parties lying in each way, against a run of honest parties; of a backdoor
          also the share of its phrase that the trigger makes likeliest
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from common import arguments, show
from guards import GUARDS
from mycel.data.parties import load_parties
from mycel.guard.contract import Guard, PartyGuard, Sealed
from mycel.guard.enclosed import EnclaveGuard, EnclaveParty
from mycel.guard.encrypted import CkksGuard, CkksParty
from mycel.guard.secagg.guard import SUM, MaskGuard, MaskParty
from mycel.models.base import find_base
from mycel.rounds.assaults import Scene, backdoor_success
from mycel.rounds.laboratory import Laboratory, laboratory
from mycel.wire.algebra import weighted_mean
from mycel.wire.codecs.fixed import Fixed
from mycel.wire.parcel import Parcel, Tensors

ELEMENTS = 250_000  # float32 numbers of 1 MB
PARTIES, LEAVING = 100, 30
REPEATS = 5  # of which the one in the middle counts
CODEC = Fixed(16, 0.5)
SMALL: dict[str, Any] = {"data.examples": 48, "data.max_length": 64, "rounds.local_steps": 5, "guard.replayable": True}
BACKDOOR = "backdoor(3)"
LIES = ("label_flip", "sign_flip", "scale(10)", "little_is_enough(1.5)", BACKDOOR)
FILTERS = (
    "",
    "median",
    "trimmed_mean(0.4)",
    "krum(0.4)",
    "multi_krum(0.4)",
    "norm_bound(1.0)",
    "geometric_median",
    "foolsgold",
    "fltrust",
)


class Wire:
    """Carries messages to parties in this process, counts bytes, and keeps their time apart from the coordinator's."""

    def __init__(self, leaving: Mapping[str, set[int]], party: PartyGuard) -> None:
        self.party, self.leaving = party, leaving
        self.kept: dict[int, Tensors] = {}
        self.up: dict[int, int] = {}
        self.down: dict[int, int] = {}
        self.elsewhere = 0.0

    async def post(self, messages: Mapping[int, Parcel]) -> dict[int, Parcel]:
        """Hand each message to its party and return what comes back."""
        found: dict[int, bytes] = {}
        for node, message in messages.items():
            frame = message.to_bytes()
            self.down[node] = self.down.get(node, 0) + len(frame)
            begun = time.perf_counter()
            if node not in self.leaving.get(message.kind, set()):
                answer, self.kept[node] = self.party.answer(node, Parcel.from_bytes(frame), self.kept.get(node, {}))
                found[node] = answer.to_bytes()
                self.up[node] = self.up.get(node, 0) + len(found[node])
            self.elsewhere += time.perf_counter() - begun
        return {node: Parcel.from_bytes(frame) for node, frame in found.items()}


def secure_sums() -> list[dict[str, Any]]:
    """Time the coordinator on plain and on masked sums of the same updates."""
    updates = {
        node: {"update/a": 0.05 * torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(node))}
        for node in range(PARTIES)
    }
    frames = {node: Parcel("answer", {"samples": 100}, update).to_bytes() for node, update in updates.items()}
    plain = median(_in_the_open(frames) for _ in range(REPEATS))
    rows = [{"sums": "plain", "bytes": len(frames[0]), "ratio": 1.0, "seconds": plain, "times plain": 1.0, "exact": 1}]
    for thin, leave in ((thin, leave) for leave in (LEAVING, 0) for thin in (False, True)):
        found = [_masked(updates, thin, leave, len(frames[0])) for _ in range(REPEATS)]
        middle = sorted(found, key=lambda row: row["seconds"])[REPEATS // 2]
        middle["times plain"] *= (PARTIES - LEAVING) / plain
        rows.append({**middle, "exact": min(row["exact"] for row in found)})
    return rows


def _in_the_open(frames: Mapping[int, bytes]) -> float:
    staying = range(PARTIES - LEAVING)
    begun = time.perf_counter()
    parsed = [Parcel.from_bytes(frames[node]) for node in staying]
    for parcel in parsed:
        assert all(bool(torch.isfinite(value).all()) for value in parcel.tensors.values())
    weighted_mean([parcel.tensors for parcel in parsed], [100.0] * len(parsed))
    return time.perf_counter() - begun


def _masked(updates: dict[int, Tensors], thin: bool, leave: int, size: int) -> dict[str, Any]:
    # A third of them leaves before sending its update, the others between sending it and revealing shares.
    leaving = {"guard.reveal": set(range(PARTIES - leave, PARTIES - leave // 3))}
    gone = set(range(PARTIES - leave // 3, PARTIES))
    wire, weights = Wire(leaving, MaskParty(CODEC)), dict.fromkeys(range(PARTIES), 100)
    guard = MaskGuard(CODEC, {"a": (ELEMENTS,)}, weights, 0.67, thin)
    begun = time.perf_counter()
    present = asyncio.run(guard.prepare(wire.post, range(PARTIES)))
    preparing = time.perf_counter() - begun - wire.elsewhere
    sealed = {}
    for node in (node for node in present if node not in gone):
        hidden, wire.kept[node] = wire.party.seal(
            node, {"a": updates[node]["update/a"]}, 100, True, guard.terms(), wire.kept[node]
        )
        sealed[node] = Parcel("answer", {"samples": 100}, hidden).to_bytes()
        wire.up[node] += len(sealed[node])
    wire.elsewhere = 0.0
    begun = time.perf_counter()
    answers = []
    for node, frame in sealed.items():
        parcel = Parcel.from_bytes(frame)
        guard.check(node, parcel)
        answers.append(Sealed(node, parcel, 100))
    opened = asyncio.run(guard.open(wire.post, answers))
    opening = time.perf_counter() - begun - wire.elsewhere
    levels = sum(CODEC.levels(updates[node]["update/a"]) * 100 for node in sealed)
    assert isinstance(levels, torch.Tensor)
    whole = [wire.up[node] + wire.down[node] for node in sealed if node not in leaving["guard.reveal"]]
    assert SUM in answers[0].parcel.tensors
    return {
        "sums": f"{'sparsely masked' if thin else 'masked'}, {leave} leave",
        "bytes": max(whole),
        "ratio": max(whole) / size,
        "seconds": preparing + opening,
        "times plain": (preparing + opening) / len(sealed),
        "exact": int(torch.equal(opened.total["a"], CODEC.value(levels))),
    }


def whole_rounds(lab: Laboratory) -> list[dict[str, Any]]:
    """Time runs of two rounds with and without guards."""
    lab.run(lab.recipe("fedavg", {**SMALL, "rounds.count": 1}))
    rows: list[dict[str, Any]] = []
    for name, changes in GUARDS.items():
        recipe = lab.recipe("fedavg", {**SMALL, **changes, "rounds.count": 2, "rounds.evaluate_every": 2})
        begun = time.perf_counter()
        finished = lab.run(recipe)
        seconds = time.perf_counter() - begun
        first = rows[0] if rows else {"seconds": seconds, "bytes up": finished.meter.total("up")}
        up = finished.meter.total("up")
        rows.append(
            {
                "guard": name,
                "seconds": seconds,
                "times none": seconds / first["seconds"],
                "bytes up": up,
                "bytes, times none": up / first["bytes up"],
                "loss": finished.loss(),
            }
        )
    return rows


def liars(lab: Laboratory, filters: Sequence[str], lies: Sequence[str]) -> list[dict[str, Any]]:
    """Final losses: a row for each filter, a column for each lie, and two for whether a backdoor was planted."""
    ten = {**SMALL, "data.parties": "iid", "data.count": 10, "rounds.count": 4, "rounds.evaluate_every": 4}
    rows = []
    for spec in filters:
        guarded = {**ten, "guard.filter": spec, "guard.root": "python-library" if spec == "fltrust" else ""}
        clean = lab.run(lab.recipe("fedavg", guarded))
        row: dict[str, Any] = {"filter": spec or "none", "untuned": clean.loss(0), "honest": clean.loss()}
        for lie, share in product(lies, (0.2, 0.4)):
            recipe = lab.recipe("fedavg", {**guarded, "threat.attack": lie, "threat.share": share})
            finished = lab.run(recipe)
            row[f"{lie} {share:.0%}"] = finished.loss()
            if lie == BACKDOOR:
                scene = Scene(finished, recipe, load_parties(recipe.data, recipe.seed), 0)
                row[f"planted {share:.0%}"] = backdoor_success(scene)
        rows.append(row)
    return rows


def other_sums() -> list[dict[str, Any]]:
    """Add ten updates of 40,000 numbers in each way, messages and keys included; all parties stay."""
    size, count = 40_000, 10
    weights = dict.fromkeys(range(count), 100)
    updates = {node: 0.05 * torch.randn(size, generator=torch.Generator().manual_seed(node)) for node in weights}
    mean = torch.stack(list(updates.values())).double().mean(0)
    shapes = {"a": (size,)}
    halves: dict[str, tuple[Guard, PartyGuard]] = {
        "masks, fixed(16,0.5)": (MaskGuard(CODEC, shapes, weights, 0.67, True), MaskParty(CODEC)),
        "CKKS": (CkksGuard(shapes, weights), CkksParty()),
        "enclave (simulated)": (EnclaveGuard(shapes, weights), EnclaveParty()),
    }
    plain = {"sums": "plain float32", "bytes": 4 * size, "party s": 0.0, "coordinator s": 0.0, "largest error": 0.0}
    return [plain, *(_added(name, *pair, updates, mean) for name, pair in halves.items())]


def _added(name: str, guard: Guard, party: PartyGuard, updates: Mapping[int, Tensor], mean: Tensor) -> dict[str, Any]:
    wire, begun = Wire({}, party), time.perf_counter()
    try:
        present = asyncio.run(guard.prepare(wire.post, sorted(updates)))
        answers = []
        for node in present:
            started = time.perf_counter()
            hidden, wire.kept[node] = party.seal(node, {"a": updates[node]}, 100, True, guard.terms(), wire.kept[node])
            frame = Parcel("answer", {"samples": 100}, hidden).to_bytes()
            wire.elsewhere += time.perf_counter() - started
            wire.up[node] += len(frame)
            answers.append(Sealed(node, Parcel.from_bytes(frame), 100))
        opened = asyncio.run(guard.open(wire.post, answers))
    finally:
        guard.close()
    return {
        "sums": name,
        "bytes": max(wire.up[node] + wire.down[node] for node in updates),
        "party s": wire.elsewhere / len(updates),
        "coordinator s": time.perf_counter() - begun - wire.elsewhere,
        "largest error": float((opened.total["a"].double() / opened.weight - mean).abs().max()),
    }


def main() -> None:
    """Measure the parts that are asked for."""
    options = arguments(
        __doc__ or "",
        part={"default": "secagg,sums,rounds,filters", "help": "parts, with commas between"},
        base={"default": "micro", "help": "base model"},
        filters={"default": ";".join(FILTERS), "help": "filters of that part, with semicolons between; empty: none"},
        lies={"default": ";".join(LIES), "help": "lies of that part, with semicolons between"},
    )
    torch.set_num_threads(1)
    parts = options.part.split(",")
    if "secagg" in parts:
        show(f"{PARTIES} parties, 1 MB each, {LEAVING} leave", secure_sums(), options.json)
    if "sums" in parts:
        rows = other_sums()
        if not options.json:
            rows = [{**row, "largest error": f"{row['largest error']:.1e}"} for row in rows]
        show("Ten updates of 40,000 numbers", rows, options.json)
    if {"rounds", "filters"} & set(parts):
        find_base(options.base)
        with laboratory(workers=0, base=options.base) as lab:
            if "rounds" in parts:
                show(f"Two rounds of six parties, base {options.base}", whole_rounds(lab), options.json)
            if "filters" in parts:
                show(
                    f"Final loss, ten parties, base {options.base}",
                    liars(lab, options.filters.split(";"), options.lies.split(";")),
                    options.json,
                )


if __name__ == "__main__":
    main()
