"""What each codec costs and saves: ``python benchmarks/codecs.py [--json]``.

Every codec encodes and decodes one tensor that looks like an update: normal, with rows of unlike scale. In the
same run, turn by turn with it, the tensor is copied in memory; medians of both make the last columns, so that
figures from different machines compare. Bytes are those of the whole frame.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import TypedDict

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mycel.wire.codecs import parse_codec
from mycel.wire.parcel import Parcel

SPECS = (
    "raw",
    "zstd",
    "bf16",
    "bf16+zstd",
    "int8(64)",
    "int8(64)+zstd",
    "topk(0.1)",
    "topk(0.1)+zstd",
    "topk(0.1)+int8(64)",
    "topk(0.1)+int8(64)+zstd",
    "topk(0.01)+int8(64)+zstd",
    "seeds(256)",
)


class Row(TypedDict):
    """Figures of one codec; throughputs in megabytes of float32 a second, the last four without unit."""

    codec: str
    encode_megabytes_per_second: float
    decode_megabytes_per_second: float
    encode_to_copy: float
    decode_to_copy: float
    bytes_to_raw: float
    relative_error: float


def measure(spec: str, tensor: Tensor, repeats: int) -> Row:
    """Time a codec and a copy of the same tensor in turns."""
    codec, shape = parse_codec(spec), tuple(tensor.shape)
    parts, target = codec.encode(tensor), torch.empty_like(tensor)
    decoded = codec.decode(parts, shape)
    copying, encoding, decoding = [], [], []
    for _ in range(repeats):
        copying.append(seconds(lambda: target.copy_(tensor)))
        # Raw hands over the tensor itself; copying it is the least that sending it could cost.
        encoding.append(seconds(lambda: [part.clone() for part in codec.encode(tensor).values()]))
        decoding.append(seconds(lambda: codec.decode(parts, shape).clone()))
    copy, encode, decode = (statistics.median(times) for times in (copying, encoding, decoding))
    size = tensor.numel() * 4
    frame = Parcel("benchmark", {}, {"update": tensor}).to_bytes(codec)
    return {
        "codec": codec.spec,
        "encode_megabytes_per_second": size / encode / 1e6,
        "decode_megabytes_per_second": size / decode / 1e6,
        "encode_to_copy": copy / encode,
        "decode_to_copy": copy / decode,
        "bytes_to_raw": len(frame) / size,
        "relative_error": float((decoded - tensor).norm() / tensor.norm()),
    }


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def update(elements: int) -> Tensor:
    """Return a seeded tensor of about ``elements`` in rows of 1024 whose scales differ by orders of magnitude."""
    source = torch.Generator().manual_seed(1)
    rows = max(elements // 1024, 1)
    scales = torch.empty(rows, 1).normal_(generator=source).exp()
    return torch.empty(rows, 1024).normal_(generator=source) * scales * 1e-3


def table(rows: list[Row], elements: int) -> Table:
    """Lay the figures out for a terminal."""
    title = f"Codecs on {elements:,} float32 elements, {torch.get_num_threads()} thread"
    drawn = Table(title=title)
    drawn.add_column("codec")
    for heading in ("encode MB/s", "decode MB/s", "encode / copy", "decode / copy", "bytes / raw", "error"):
        drawn.add_column(heading, justify="right")
    for row in rows:
        drawn.add_row(
            row["codec"],
            f"{row['encode_megabytes_per_second']:,.0f}",
            f"{row['decode_megabytes_per_second']:,.0f}",
            f"{row['encode_to_copy']:.3f}",
            f"{row['decode_to_copy']:.3f}",
            f"{row['bytes_to_raw']:.4f}",
            f"{row['relative_error']:.2g}",
        )
    return drawn


def main() -> None:
    """Measure every codec and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--elements", type=int, default=1 << 22, help="elements of the tensor")
    parser.add_argument("--repeats", type=int, default=7, help="measurements, of which the median counts")
    parser.add_argument("codecs", nargs="*", default=SPECS, help="codecs to measure in place of the usual ones")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tensor = update(options.elements)
    rows = [measure(spec, tensor, options.repeats) for spec in options.codecs]
    if options.json:
        print(json.dumps({"elements": tensor.numel(), "codecs": rows}, indent=2))
    else:
        Console().print(table(rows, tensor.numel()))


if __name__ == "__main__":
    main()
