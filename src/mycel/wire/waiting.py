"""Parcels that wait, whole on a shelf, or in a file from which their tensors are read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mycel.errors import ParcelError
from mycel.wire.parcel import Limits, Parcel, decode_one, read_envelope, sort_parts
from mycel.wire.shelf import Kept


class Loadable(Protocol):
    """A parcel that is decoded when it is asked for."""

    def load(self) -> Parcel:
        """Decode the parcel."""


@dataclass(frozen=True)
class Shelved:
    """A parcel whose frame waits on a shelf; it is decoded each time it is asked for, so many take no memory."""

    frame: Kept
    limits: Limits

    def load(self) -> Parcel:
        """Decode the parcel."""
        return Parcel.from_bytes(bytes(self.frame), self.limits)


@dataclass(frozen=True)
class OneByOne(Mapping[str, Tensor]):
    """Named tensors, each read and decoded when it is asked for; nothing else of the file is in memory, or mapped."""

    frame: Kept
    envelope: dict[str, Any]
    owners: dict[str, list[str]]

    def __getitem__(self, name: str) -> Tensor:
        parts = self.owners[name]
        try:
            with safe_open(self.frame.path, "pt") as file:  # opened anew: what was mapped before is let go
                return decode_one(name, {part: file.get_tensor(part) for part in parts}, self.envelope)
        except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
            raise ParcelError(f"tensor {name!r} of the frame is damaged: {error}; ask for it again") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.owners)

    def __len__(self) -> int:
        return len(self.owners)

    def under(self, start: str) -> Renamed:
        """Return those whose names begin so, under what follows."""
        return Renamed(self, {name[len(start) :]: name for name in self.owners if name.startswith(start)})


@dataclass(frozen=True)
class Renamed(Mapping[str, Tensor]):
    """Some of the tensors, under other names."""

    whole: OneByOne
    names: dict[str, str]

    def __getitem__(self, name: str) -> Tensor:
        return self.whole[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Waiting:
    """A parcel whose tensors stay in a file, which is kept as long as they are."""

    kind: str
    header: dict[str, Any]
    tensors: OneByOne

    @classmethod
    def of(cls, frame: Kept, limits: Limits) -> Waiting:
        """Read a frame's header; anything unsound in it raises ``ParcelError``."""
        if frame.path is None:
            raise ParcelError("the frame is in memory and cannot wait in a file")
        envelope = read_envelope(frame, limits)
        try:
            with safe_open(frame.path, "pt") as file:
                names = sorted(file.keys())
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise ParcelError(f"the frame's tensors are damaged: {error}; ask for it again") from error
        owners = dict(sorted(sort_parts(names, envelope, limits).items()))
        return cls(envelope["kind"], envelope.get("header", {}), OneByOne(frame, envelope, owners))
