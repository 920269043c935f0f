"""Error feedback: what a codec lost is kept at home and added to what is sent next.

Without it a codec's error enters the model in every round; with it the sum of everything decoded stays within
one residual of the sum of everything meant (Karimireddy et al., arXiv:1901.09847).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mycel.wire.codec import Codec

Tensors = dict[str, Tensor]


def compensate(tensors: Tensors, residual: Tensors, codec: Codec) -> tuple[Tensors, Tensors]:
    """Return what to send in place of ``tensors``, and the residual to keep.

    For every float tensor, ``decode(encode(to_send)) + new_residual == tensor + residual`` up to one float32
    rounding; tensors of other types are sent as they are. A random codec with relative variance w is given
    ``(tensor + residual) / (1 + w)``: its unbiased reconstruction may be far longer than what went in, and
    only shrunk does it leave a residual that stays bounded.

    Parameters
    ----------
    tensors : dict of str to Tensor
        What this round is meant to say.
    residual : dict of str to Tensor
        What earlier rounds left unsaid; empty at first. A name missing here counts as zeros, and a name that
        ``tensors`` lacks is kept for a later round.
    codec : Codec
        The codec that ``to_send`` will be encoded with.

    Returns
    -------
    to_send, new_residual : tuple of dict
        float32 where the tensor is a float.
    """
    to_send, kept = dict(tensors), dict(residual)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        shape = tuple(tensor.shape)
        wanted = tensor.detach().to("cpu", torch.float32)
        if name in residual:
            wanted = wanted + residual[name]
        to_send[name] = wanted / (1 + codec.variance(shape))
        kept[name] = wanted - codec.decode(codec.encode(to_send[name]), shape)
    return to_send, kept
