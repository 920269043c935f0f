"""Codecs by name; each lives in a file of its own.

    raw          float32 as it is              topk(0.1)    a fraction by magnitude, and its places
    bf16         bfloat16                      seeds(256)   scalars on random directions, and a seed
    int8(64)     blocks of 8-bit integers      zstd         entropy coding of what stands before it
    lattice(8)   unbiased, on a shifted grid   rounding(8)  unbiased, up or down by chance
    fixed(8,0.1) whole numbers of one step, up to a reach: sums of them mean sums

A chain, ``topk(0.1)+int8(64)+zstd``, applies them from left to right.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from functools import lru_cache

from mycel.errors import RecipeError
from mycel.wire.codec import Codec
from mycel.wire.codecs.bf16 import BFloat16
from mycel.wire.codecs.chain import Chain
from mycel.wire.codecs.fixed import MOST_BITS, Fixed
from mycel.wire.codecs.int8 import Int8
from mycel.wire.codecs.lattice import Lattice, Rounding
from mycel.wire.codecs.layout import LaidOut
from mycel.wire.codecs.raw import RAW, Raw
from mycel.wire.codecs.seeds import Seeds
from mycel.wire.codecs.topk import TopK
from mycel.wire.codecs.zstd import Zstd

__all__ = ["CODECS", "RAW", "Chain", "Raw", "Zstd", "parse_codec"]

CODECS = ("raw", "bf16", "int8", "fixed", "topk", "seeds", "lattice", "rounding", "zstd")
LONGEST_SPEC = 100
LINK = re.compile(r"([a-z][a-z0-9]*)(?:\(([^()]*)\))?")


@lru_cache(maxsize=256)
def parse_codec(spec: str) -> Codec:
    """Return the codec that ``spec`` names, e.g. ``"topk(0.1)+int8(64)+zstd"``.

    Raises
    ------
    RecipeError
        When a name is unknown, a parameter is missing or out of range, or the links do not fit together.
    """
    if len(spec) > LONGEST_SPEC:
        raise RecipeError(f"wire.codec {spec[:40]!r}... has {len(spec)} letters, at most {LONGEST_SPEC} make sense")
    texts = spec.replace(" ", "").split("+")
    entropy = texts[-1] == "zstd"
    links = [_link(text, spec) for text in (texts[:-1] if entropy else texts)]
    codec = _chain(links) if links else RAW
    return Zstd(codec) if entropy else codec


def _chain(links: list[LaidOut]) -> LaidOut:
    codec = links[-1]
    for link in reversed(links[:-1]):
        codec = Chain(link, codec)
    return codec


def _link(text: str, spec: str) -> LaidOut:
    match = LINK.fullmatch(text)
    name, argument = match.groups() if match else (text, None)
    if name == "zstd":
        raise RecipeError(f"wire.codec {spec!r}: 'zstd' takes no parameter and stands once, at the end")
    if name not in CODECS:
        near = get_close_matches(name, CODECS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(CODECS)}"
        raise RecipeError(f"wire.codec {spec!r}: {name!r} is unknown; {hint}")
    if name == "int8":
        return Int8(_integer(spec, name, "64" if argument is None else argument))
    if name == "fixed":
        return _fixed(spec, argument or "")
    if name == "topk":
        return TopK(_fraction(spec, name, argument or ""))
    if name == "seeds":
        return Seeds(_integer(spec, name, "256" if argument is None else argument))
    if name in {"lattice", "rounding"}:
        bits = _integer(spec, name, "8" if argument is None else argument, 8)
        if bits < 2:
            raise RecipeError(f"wire.codec {spec!r}: {name} takes 2 to 8 bits, found {bits}")
        return Lattice(bits) if name == "lattice" else Rounding(bits)
    if argument is not None:
        raise RecipeError(f"wire.codec {spec!r}: {name!r} takes no parameter, found {argument!r}")
    return RAW if name == "raw" else BFloat16()


def _integer(spec: str, name: str, text: str, most: int = 1 << 16) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= most:
        raise RecipeError(f"wire.codec {spec!r}: {name} takes an integer from 1 to {most:,}, found {text!r}")
    return int(text)


def _fixed(spec: str, argument: str) -> Fixed:
    sound = re.fullmatch(r"([0-9]{1,2}),([0-9]*\.?[0-9]+(?:e[+-]?[0-9]{1,2})?)", argument)
    bits, reach = (int(sound[1]), float(sound[2])) if sound else (0, 0.0)
    if not 2 <= bits <= MOST_BITS or not 1e-30 <= reach <= 1e30:
        raise RecipeError(
            f"wire.codec {spec!r}: fixed takes 2 to {MOST_BITS} bits and the largest magnitude, e.g. fixed(16,0.5)"
        )
    return Fixed(bits, reach)


def _fraction(spec: str, name: str, text: str) -> float:
    sound = re.fullmatch(r"[0-9]*\.?[0-9]+(e-?[0-9]{1,3})?", text)
    if not sound or not 0 < float(text) <= 1:
        raise RecipeError(f"wire.codec {spec!r}: {name} takes a fraction above 0 and at most 1, e.g. {name}(0.1)")
    return float(text)
