"""One codec after another: the second encodes the float part that the first leaves."""

from __future__ import annotations

from torch import Tensor

from mycel.errors import RecipeError
from mycel.wire.codec import Parts
from mycel.wire.codecs.layout import VALUES, LaidOut, Layout


class Chain(LaidOut):
    """Encode with ``first``, then its ``values`` with ``second``, whose parts are named ``values.part``.

    An error of e in ``values`` moves no decoded element by more than e, so error bounds add up.
    """

    def __init__(self, first: LaidOut, second: LaidOut) -> None:
        if VALUES not in first.layout((1,)):
            raise RecipeError(
                f"wire.codec {first.spec}+{second.spec}: {first.spec!r} leaves no float values for "
                f"{second.spec!r} to encode; only raw, topk and seeds may stand before it"
            )
        self.first, self.second = first, second
        self.spec = f"{first.spec}+{second.spec}"
        self.lossless = first.lossless and second.lossless
        self.linear = first.linear and second.linear

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Layout of the first, its values replaced by the layout of the second."""
        layout = self.first.layout(shape)
        _, inner = layout.pop(VALUES)
        return layout | {f"{VALUES}.{name}": part for name, part in self.second.layout(inner).items()}

    def encode(self, tensor: Tensor) -> Parts:
        """Encode twice."""
        parts = self.first.encode(tensor)
        inner = self.second.encode(parts.pop(VALUES))
        return parts | {f"{VALUES}.{name}": part for name, part in inner.items()}

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        """Decode twice, the second codec first."""
        layout = self.first.layout(shape)
        _, inner = layout.pop(VALUES)
        prefix = f"{VALUES}."
        encoded = {name.removeprefix(prefix): part for name, part in parts.items() if name.startswith(prefix)}
        outer = {name: parts[name] for name in layout}
        return self.first.decode(outer | {VALUES: self.second.decode(encoded, inner)}, shape)

    def error_bound(self, tensor: Tensor) -> float:
        """Sum of what either loses."""
        return self.first.error_bound(tensor) + self.second.error_bound(self.first.encode(tensor)[VALUES])

    def variance(self, shape: tuple[int, ...]) -> float:
        """Variance of the two in turn."""
        _, inner = self.first.layout(shape)[VALUES]
        return (1 + self.first.variance(shape)) * (1 + self.second.variance(inner)) - 1
