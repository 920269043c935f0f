"""The laws that every codec obeys, ours or a stranger's."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mycel.errors import ParcelError
from mycel.testing.laws import law as _law
from mycel.wire.codec import Codec, Parts
from mycel.wire.codecs import parse_codec
from mycel.wire.parcel import Parcel

# What a decoder may raise on parts that are not sound; a parcel turns all of them into ParcelError.
REFUSALS = (ParcelError, LookupError, ValueError, RuntimeError, TypeError)


def check_codec(codec: Codec | str) -> None:
    """Hold a codec to its contract; raise ``AssertionError`` with the law it breaks.

    Parameters
    ----------
    codec : Codec or str
        The codec, or the text that ``parse_codec`` makes one of.
    """
    if isinstance(codec, str):
        codec = parse_codec(codec)
    _law(parse_codec(codec.spec).spec == codec.spec, f"parse_codec({codec.spec!r}) gives back this spec")
    for label, tensor in cases():
        where = f"{codec.spec!r} on {label}"
        _check_round_trip(codec, tensor, where)
        _check_determinism(codec, tensor, where)
        _check_parcel(codec, tensor, where)
        _check_refusals(codec, tensor, where)
    for value in (math.nan, math.inf, -math.inf):
        _check_not_finite(codec, value)
    if codec.linear:
        _check_linear(codec)
    _check_contraction(codec)


def cases() -> Iterator[tuple[str, Tensor]]:
    """Tensors that codecs are known to stumble over, seeded, each with a word that says why."""
    source = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape).normal_(generator=source)

    yield "a matrix", normal(37, 29)
    yield "more than one byte of indices", normal(300)
    yield "more than two bytes of indices", normal(70_001)
    yield "one block and a bit", normal(65)
    yield "one element", normal(1)
    yield "a scalar", torch.tensor(-2.5)
    yield "an empty matrix", torch.empty(0, 3)
    yield "zeros", torch.zeros(5, 50)
    yield "minus zeros", -torch.zeros(130)
    yield "ties", torch.tensor([1.0, -1.0, 1.0, -1.0] * 80)
    yield "huge numbers", normal(400) * 1e34
    yield "tiny numbers", normal(400) * 1e-37
    yield "denormal numbers", normal(400) * 1e-42
    yield "magnitudes of every order", normal(400) * torch.logspace(-38, 30, 400)
    yield "a transposed matrix", normal(31, 40).t()
    yield "every third element", normal(1200)[::3]
    yield "one row many times", normal(1, 40).expand(20, 40)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    octets = [part.contiguous().reshape(-1).view(torch.uint8) for part in (one, other)]
    return torch.equal(*octets)


def _same_parts(one: Parts, other: Parts) -> bool:
    return one.keys() == other.keys() and all(_same_bits(one[name], other[name]) for name in one)


def _check_round_trip(codec: Codec, tensor: Tensor, where: str) -> None:
    before = tensor.clone()
    decoded = codec.decode(codec.encode(tensor), tuple(tensor.shape))
    _law(_same_bits(before, tensor), f"{where}: encoding leaves its input as it was")
    _law(decoded.dtype == torch.float32, f"{where}: what is decoded is float32, found {decoded.dtype}")
    _law(decoded.shape == tensor.shape, f"{where}: the shape comes back, found {tuple(decoded.shape)}")
    bound = codec.error_bound(tensor)
    error = (decoded.double() - tensor.double()).abs().max().item() if tensor.numel() else 0.0
    _law(error <= bound, f"{where}: an error of {error:.4g} stays within the bound of {bound:.4g}")
    if codec.lossless:
        _law(_same_bits(decoded, tensor), f"{where}: lossless means equal to the bit")
        again = codec.decode(codec.encode(decoded), tuple(tensor.shape))
        _law(_same_bits(again, decoded), f"{where}: a second round trip changes nothing")


def _check_determinism(codec: Codec, tensor: Tensor, where: str) -> None:
    parts = codec.encode(tensor)
    _law(_same_parts(parts, codec.encode(tensor)), f"{where}: the same tensor encodes to the same parts")
    packed = tensor.contiguous().clone()
    _law(_same_parts(parts, codec.encode(packed)), f"{where}: the order in memory does not show in the parts")
    shape = tuple(tensor.shape)
    decoded = codec.decode(parts, shape)
    _law(_same_bits(decoded, codec.decode(parts, shape)), f"{where}: the same parts decode to the same tensor")


def _check_parcel(codec: Codec, tensor: Tensor, where: str) -> None:
    shape = tuple(tensor.shape)
    frame = Parcel("check", {}, {"x": tensor}).to_bytes(codec)
    arrived = Parcel.from_bytes(frame).tensors["x"]
    decoded = codec.decode(codec.encode(tensor), shape)
    _law(_same_bits(arrived, decoded), f"{where}: a parcel carries it without further loss")


def _check_refusals(codec: Codec, tensor: Tensor, where: str) -> None:
    shape = tuple(tensor.shape)
    parts = codec.encode(tensor)
    for name, part in parts.items():
        rest = {other: value for other, value in parts.items() if other != name}
        flat = part.reshape(-1)
        _refuses(codec, rest, shape, f"{where}: refuses to decode without the part {name!r}")
        _refuses(codec, parts | {name: flat.to(torch.complex64)}, shape, f"{where}: refuses a complex {name!r}")
        _refuses(codec, parts | {name: flat[None, None]}, shape, f"{where}: refuses {name!r} in another shape")
        longer = torch.cat([flat, flat.new_zeros(1)])
        _refuses(codec, parts | {name: longer}, shape, f"{where}: refuses {name!r} with one element more")
        if part.numel():
            _refuses(codec, parts | {name: flat[:-1]}, shape, f"{where}: refuses {name!r} with one less")
            _survives(codec, parts, name, shape, where)
    surplus = parts | {"surplus": torch.zeros(1)}
    _refuses(codec, surplus, shape, f"{where}: refuses a part that it did not make")
    _refuses(codec, {}, shape, f"{where}: refuses to decode nothing")


def _refuses(codec: Codec, parts: Parts, shape: tuple[int, ...], sentence: str) -> None:
    try:
        codec.decode(parts, shape)
    except REFUSALS:
        return
    _law(False, sentence)


def _survives(codec: Codec, parts: Parts, name: str, shape: tuple[int, ...], where: str) -> None:
    """Damage bytes of a part: what comes out has the right shape, or a refusal that a parcel understands."""
    octets = parts[name].contiguous().reshape(-1).view(torch.uint8)
    source = torch.Generator().manual_seed(octets.numel())
    for _ in range(3):
        damaged = octets.clone()
        places = torch.randint(0, len(octets), (1 + len(octets) // 50,), generator=source)
        damaged[places] = torch.randint(0, 256, places.shape, generator=source, dtype=torch.uint8)
        part = damaged.view(parts[name].dtype).reshape(parts[name].shape)
        try:
            decoded = codec.decode(parts | {name: part}, shape)
        except REFUSALS:
            continue
        _law(tuple(decoded.shape) == shape, f"{where}: damage to {name!r} does not change the shape")


def _check_not_finite(codec: Codec, value: float) -> None:
    """NaN and infinity either arrive or are refused; they never become an ordinary number."""
    tensor = torch.linspace(-1, 1, 700)
    tensor[350] = value
    try:
        decoded = codec.decode(codec.encode(tensor), (700,))
    except REFUSALS:
        return
    _law(not decoded[350].isfinite(), f"{codec.spec!r}: {value} arrives as it is, or is refused")


def _check_linear(codec: Codec) -> None:
    source = torch.Generator().manual_seed(2)
    most = min(codec.reach, 1.0) / 4  # so that the sum is still within reach
    one, other = (torch.empty(20, 70).normal_(generator=source).clamp_(-most, most) for _ in range(2))
    parts, more = codec.encode(one), codec.encode(other)
    together = codec.decode({name: parts[name] + more[name] for name in parts}, (20, 70))
    apart = codec.decode(parts, (20, 70)) + codec.decode(more, (20, 70))
    close = torch.allclose(together, apart, rtol=1e-5, atol=1e-5)
    _law(close, f"{codec.spec!r}: linear means that a sum of parts decodes to the sum")


def _check_contraction(codec: Codec) -> None:
    """Encode one direction at many lengths; a random codec draws anew for each.

    The stated variance bounds the spread of what is decoded, and after shrinking by it every codec leaves less
    than there was: the law on which error feedback rests.
    """
    shape, draws = (4096,), 32
    tensor = torch.empty(shape).normal_(generator=torch.Generator().manual_seed(3))
    lengths = [1 + draw / 256 for draw in range(draws)]
    decoded = torch.stack([codec.decode(codec.encode(tensor * length), shape) / length for length in lengths])
    energy, variance = float(tensor.square().sum()), codec.variance(shape)
    spread = float((decoded - decoded.mean(0)).square().sum() / (draws - 1)) / energy
    sound = spread <= 1.2 * variance + 1e-3
    _law(sound, f"{codec.spec!r}: a relative variance of {spread:.3g} is at most the stated {variance:.3g}")
    left = float((tensor - decoded / (1 + variance)).square().sum(1).mean()) / energy
    _law(left < 1, f"{codec.spec!r}: shrunk by its variance it leaves less than there was, found {left:.6g}")
