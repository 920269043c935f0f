"""Training that goes on when ranks die: the same processes, the same version, another formation.

A step is torn when a collective breaks. Then every survivor leaves its group, meets the others in the next epoch, asks
its system who computes what from now on, and all together find the newest version at which every unit can be had, from
live units, copies in memory, the disk or the start. A step is committed by a last collective which nobody passes before
all have the summed gradients: if one rank has taken the step, all others can.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mycel.collectives.copies import DiskCopies, MemoryCopies
from mycel.collectives.exchange import Exchange
from mycel.collectives.formation import Formation, Recovery, Transfer, restoration
from mycel.collectives.hooks import gather_frames
from mycel.collectives.membership import Line
from mycel.collectives.passage import Note, Passage
from mycel.collectives.step import IGNORED, check_loss, targets_of
from mycel.collectives.units import Chain, Unit
from mycel.collectives.waiting import LIMITS, receive, send
from mycel.wire.parcel import Parcel, Tensors


@dataclass
class Diary:
    """What one rank saw: losses by step, when each version was reached, and every recovery."""

    losses: dict[int, float] = field(default_factory=dict)
    reached: list[tuple[int, float]] = field(default_factory=list)
    recoveries: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Enduring:
    """One member's part.

    Parameters
    ----------
    rows_of : callable
        The whole batch (B, T) of a step, the same on every rank whenever it is asked for.
    pieces : int
        Into which every batch is divided.
    copy_every, save_every : int
        Steps between copies in memory and on disk; 0: none.
    """

    line: Line
    chain: Chain
    system: Recovery
    rows_of: Callable[[int], Tensor]
    rate: Callable[[int], float]
    pieces: int
    note: Note = lambda phase: None
    disk: DiskCopies | None = None
    copy_every: int = 0
    save_every: int = 0

    def __post_init__(self) -> None:
        self.version, self.units, self.diary = -1, dict[int, Unit](), Diary()
        self.formation: Formation | None = None
        self.copies = MemoryCopies((), (), 2 * self.pieces)
        self._passage = Passage(self.chain, self.line.member, self._during)
        self._ready: tuple[float, float] | None = None
        self._exchange: Exchange | None = None

    def train(self, steps: int, hand_over: Callable[[Parcel], None]) -> None:
        """Train to version ``steps`` and hand over what came of it, until everybody has.

        Raises
        ------
        EngineError
            Those that are left cannot go on.
        FloatingPointError
            The loss is no finite number.
        """
        while True:
            if self._exchange is None:
                self._attempt(self._regroup)
            elif self.version < steps:
                self._attempt(self._step)
            else:
                self.note("report")
                hand_over(self._report())
                if self.line.parted():
                    self.line.leave()
                    return
                self._torn()  # somebody died at the very end, and may need what is here

    def _report(self) -> Parcel:
        """What came of the training, with this rank's weights."""
        diary, states = self.diary, [held.state() for held in self.units.values()]
        weights = {name: value for state in states for name, value in state.items() if name.startswith("weight.")}
        header = {
            "epoch": self.line.epoch,
            "losses": {str(step): loss for step, loss in diary.losses.items()},
            "reached": diary.reached,
            "recoveries": diary.recoveries,
            "spared": self._passage.spared,
            "sent": self.copies.sent,
        }
        return Parcel("report", header, weights)

    def _attempt(self, work: Callable[[], None]) -> None:
        torn = False
        try:
            work()
        except RuntimeError as error:
            torn, self.line.broken = True, str(error)
        if torn:  # the error's frames referred to the group, and had to be gone before it can end
            self._torn()

    def _torn(self) -> None:
        self._exchange = None
        self.copies.abandon()
        self.line.leave()

    def _regroup(self) -> None:
        began = time.perf_counter()
        self.line.join()
        members, me = self.line.members, self.line.member
        self.formation = self.system.formation(self.line.epochs)
        self.formation.check(self.chain.count, self.pieces)
        exchange = Exchange(self.chain, self.formation, members, me)
        keepers = {member: self.system.keepers(member) for member in members}
        targets = [members.index(other) for other in keepers[me] if other in members]
        self.copies.open(targets, [members.index(other) for other in members if me in keepers[other]])
        before, moved = self.version, self._restore(members)
        if self.copy_every:
            self.copies.begin(self.version, self._own())
            self.copies.finish()
        self._exchange = exchange
        self.diary.recoveries.append(
            {
                "epoch": self.line.epoch,
                "before": before,
                "version": self.version,
                "units": moved,
                "seconds": time.perf_counter() - began,
            }
        )

    def _restore(self, members: list[int]) -> int:
        assert self.formation is not None
        saved = self.disk.versions() if self.disk else []
        here = {unit: {0, *saved} for unit in range(self.chain.count)}
        for unit, versions in self.copies.versions().items():
            here[unit] |= versions
        for unit in self.units:
            here[unit] |= {self.version} | ({self.version + 1} if self._ready else set())
        told = json.dumps({str(unit): sorted(versions) for unit, versions in here.items()}).encode()
        inventories = {}
        for member, frame in zip(members, gather_frames(told, dist.group.WORLD), strict=True):  # type: ignore[arg-type]
            inventories[member] = {int(unit): set(found) for unit, found in json.loads(frame).items()}
        needs = self.formation.needs()
        version, transfers = restoration(needs, inventories)
        if self._ready and version == self.version + 1:
            self._apply()
        wanted = needs.get(self.line.member, set())
        fetched = self._transfer(transfers, version, members)
        missing = {
            unit: fetched.get(unit) or self._state(unit, version) for unit in wanted if not self._live(unit, version)
        }
        if any(unit in self.units for unit in missing) or version != self.version:
            self._passage.forget()
        self.units = {unit: self.units.get(unit) or self.chain.build(unit) for unit in sorted(wanted)}
        for unit, state in missing.items():
            self.units[unit].load(state)
        self.version, self._ready = version, None
        self.copies.back_to(version)
        return len(transfers)

    def _live(self, unit: int, version: int) -> bool:
        return unit in self.units and self.version == version

    def _state(self, unit: int, version: int) -> Tensors:
        if self._live(unit, version):
            return self.units[unit].state()
        copies = self.copies.states(version)
        if unit in copies:
            return copies[unit]
        if self.disk and version in self.disk.versions():
            return self.disk.load(version, unit)
        return self.chain.build(unit).state()

    def _transfer(self, transfers: list[Transfer], version: int, members: list[int]) -> dict[int, Tensors]:
        """Send and receive units, in an order that all share."""
        found: dict[int, Tensors] = {}
        for transfer in transfers:
            if transfer.source == self.line.member:
                frame = Parcel("unit", {}, self._state(transfer.unit, version)).to_bytes()
                content = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
                send(torch.tensor([content.numel()]), members.index(transfer.target))
                send(content, members.index(transfer.target))
            elif transfer.target == self.line.member:
                source = members.index(transfer.source)
                length = receive(torch.zeros(1, dtype=torch.int64), source)
                content = receive(torch.empty(int(length), dtype=torch.uint8), source)
                found[transfer.unit] = Parcel.from_bytes(content.numpy().tobytes(), LIMITS).tensors
        return found

    def _step(self) -> None:
        assert self.formation is not None
        assert self._exchange is not None
        rows = self.rows_of(self.version)
        count = rows.shape[0] * (rows.shape[1] - 1)
        targets = targets_of(rows).chunk(self.pieces)

        def loss_of(logits: Tensor, piece: int) -> Tensor:
            flat, wanted = logits.reshape(-1, logits.shape[-1]), targets[piece].reshape(-1)
            return nn.functional.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum") / count

        own = self._passage.run(
            self.formation, self.units, self.line.members, rows.chunk(self.pieces), loss_of, self.system.redundant
        )
        self.note("exchange")
        self._exchange.sum(self.units)
        ready = self._exchange.totals(own, self.units)
        check_loss(ready[0])
        self.copies.finish()
        self._ready = ready
        self.note("commit")
        dist.barrier()
        self.note("apply")
        self._apply()
        if self.copy_every and self.version % self.copy_every == 0:
            self.copies.begin(self.version, self._own())
        if self.disk and self.save_every and self.version % self.save_every == 0:
            self._save()

    def _apply(self) -> None:
        assert self._ready is not None
        loss, norm = self._ready
        limit = self.chain.training.clip_norm
        for unit in self.units.values():
            for weight in unit.weights.values():
                if limit and norm > limit and weight.grad is not None:
                    weight.grad.mul_(limit / (norm + 1e-6))
            for group in unit.optimizer.param_groups:
                group["lr"] = self.rate(self.version)
            unit.optimizer.step()
        self.diary.losses[self.version] = loss
        self.version, self._ready = self.version + 1, None
        self.diary.reached.append((self.version, time.time()))
        self._passage.forget()

    def _own(self) -> dict[int, Unit]:
        """Units of this member's own segments, without its shadows."""
        assert self.formation is not None
        held = {u for way in self.formation.pipelines for s in way if s.member == self.line.member for u in s.units}
        return {unit: self.units[unit] for unit in sorted(held)}

    def _save(self) -> None:
        assert self.formation is not None
        assert self.disk is not None
        for segment in self.formation.pipelines[0]:
            if segment.member == self.line.member:
                for unit in segment.units:
                    self.disk.save(self.version, unit, self.units[unit].state())
                if not segment.first:
                    self.disk.prune()

    def _during(self, phase: str) -> None:
        if phase == "between":
            self.copies.pump()
        else:
            self.note(phase)
