"""Drive the decoder of parcels with atheris, which looks for inputs that reach new branches: `make fuzz`.

Not a test of the suite: it runs as long as it is told to (``-max_total_time=SECONDS``), and needs the extra ``fuzz``.
The law is that of the suite: a frame is decoded, or `ParcelError` says why not, in memory and on disk alike.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mycel.wire", "safetensors"]):
    from mycel.errors import ParcelError
    from mycel.wire.codecs import parse_codec
    from mycel.wire.parcel import Limits, Parcel
    from mycel.wire.shelf import Shelf
    from mycel.wire.waiting import Waiting

import torch

LIMITS = Limits(frame_bytes=1 << 16, elements=1 << 16, tensors=64)
SHELF = Shelf(budget=0, folder=Path(tempfile.mkdtemp(prefix="mycel-fuzz-")))


def decode(frame: bytes) -> bool:
    """Return whether a frame is accepted; anything but ``ParcelError`` is a finding."""
    try:
        Parcel.from_bytes(frame, LIMITS)
    except ParcelError:
        return False
    return True


def waits(frame: bytes) -> bool:
    """Return whether a frame on disk is accepted."""
    try:
        dict(Waiting.of(SHELF.keep(frame), LIMITS).tensors)
    except ParcelError:
        return False
    return True


def once(frame: bytes) -> None:
    """Try one input."""
    if decode(frame) != waits(frame):
        raise AssertionError("memory and disk do not agree on a frame")


def seeds(folder: Path) -> None:
    """Write sound frames to begin from."""
    tensors = {"update/a": torch.linspace(-1, 1, 24).reshape(4, 6), "update/n": torch.arange(3)}
    for number, spec in enumerate(("raw", "bf16", "int8(8)", "topk(0.2)", "seeds(4)", "topk(0.2)+int8(8)")):
        frame = Parcel("answer", {"samples": 2, "loss": 1.5}, tensors).to_bytes(parse_codec(spec))
        (folder / f"{number}.parcel").write_bytes(frame)


def main() -> None:
    """Fuzz until the time is over, or something is found."""
    corpus = Path(tempfile.mkdtemp(prefix="mycel-corpus-"))
    seeds(corpus)
    atheris.Setup([*sys.argv, str(corpus)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
