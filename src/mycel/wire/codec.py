"""One interface for everything that shrinks a tensor before it travels.

A codec turns a float tensor into named parts and back. Codecs chain with ``+``: each later codec encodes the
float part of the one before it, and an entropy coder encodes every part. ``parse_codec`` reads the text form.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import Tensor

Parts = dict[str, Tensor]


class Codec(ABC):
    """Encode one float tensor into named parts and back; stateless, hence shared freely.

    Attributes
    ----------
    spec : str
        The text that ``parse_codec`` turns back into this codec, e.g. ``"int8(64)"``.
    lossless : bool
        Whether ``decode(encode(x))`` equals ``x`` to the bit.
    linear : bool
        Whether a sum of decoded tensors equals the decoding of a sum of parts (what secret sums need).
    reach : float
        Largest magnitude that is told apart; larger numbers are cut off.
    """

    spec: str
    lossless: bool = False
    linear: bool = False
    reach: float = math.inf

    @abstractmethod
    def encode(self, tensor: Tensor) -> Parts:
        """Return the parts that stand for ``tensor`` (float32, any shape)."""

    @abstractmethod
    def decode(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        """Return a float32 tensor of ``shape``; raise ``ParcelError`` when the parts cannot make one."""

    @abstractmethod
    def error_bound(self, tensor: Tensor) -> float:
        """Largest absolute error of any element of ``decode(encode(tensor))``."""

    def variance(self, shape: tuple[int, ...]) -> float:
        """Largest relative variance w of a codec that draws at random, E|C(x) - E C(x)|^2 <= w |x|^2; else 0.

        Error feedback shrinks what it sends by ``1 + w``, without which a codec with w > 1 would make the
        residual grow from round to round.
        """
        return 0.0
