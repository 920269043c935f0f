"""Gradients that cross data ranks through a codec of the wire: one interface inside an island and between islands.

Each rank encodes its own gradient; all frames are gathered and every rank decodes and averages the same ones, so that
all hold the same sum to the bit, whatever the codec loses. With error feedback, what a rank's codec lost is added to
its next gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mycel.collectives.ranks import Ranks
from mycel.collectives.waiting import LIMITS
from mycel.errors import ParcelError
from mycel.wire.codecs import parse_codec
from mycel.wire.feedback import compensate
from mycel.wire.parcel import Parcel, Tensors


@dataclass
class CodecExchange:
    """Averages gradients over the replicas as encoded frames.

    Attributes
    ----------
    sent : int
        Bytes of this rank's frames so far.
    """

    ranks: Ranks
    spec: str
    feedback: bool = True
    sent: int = 0
    _residual: Tensors = field(default_factory=dict)

    def average(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Replace every gradient by the mean over the replicas of what their codecs carried."""
        own: Tensors = {
            name: weight.grad.detach().float() for name, weight in weights.items() if weight.grad is not None
        }
        codec = parse_codec(self.spec)
        if self.feedback and not codec.lossless:
            own, self._residual = compensate(own, self._residual, codec)
        frame = Parcel("gradient", {}, own).to_bytes(codec)
        self.sent += len(frame)
        group = self.ranks.replicas.get_group()
        frames = gather_frames(frame, group)
        total: Tensors = {}
        for each in frames:
            found = Parcel.from_bytes(each, LIMITS).tensors
            if found.keys() != own.keys():
                raise ParcelError("a rank's gradients have other names than this one's: its layout differs")
            total = {name: total[name] + tensor if total else tensor for name, tensor in found.items()}
        for name, mean in total.items():
            gradient = weights[name].grad
            assert gradient is not None
            gradient.copy_(mean / len(frames))


def gather_frames(frame: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """Return every rank's frame, in the order of the ranks; frames may differ in length."""
    size = dist.get_world_size(group)
    lengths = torch.zeros(size, dtype=torch.int64)
    dist.all_gather_single(lengths, torch.tensor([len(frame)]), group=group)
    longest = int(lengths.max())
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(frame)] = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
    gathered = torch.empty(size * longest, dtype=torch.uint8)
    dist.all_gather_single(gathered, padded, group=group)
    rows: list[Tensor] = list(gathered.view(size, longest))
    return [row[: int(length)].numpy().tobytes() for row, length in zip(rows, lengths, strict=True)]
