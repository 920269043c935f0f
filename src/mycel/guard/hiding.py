"""Which guard hides answers: the two halves that a recipe's ``guard.sums`` names."""

from __future__ import annotations

from collections.abc import Mapping

from mycel.guard.contract import Guard, PartyGuard, Shapes
from mycel.guard.enclosed import EnclaveGuard, EnclaveParty
from mycel.guard.encrypted import CkksGuard, CkksParty
from mycel.guard.secagg.guard import MaskGuard, MaskParty
from mycel.wire.codec import Codec
from mycel.wire.codecs.fixed import Fixed


def coordinator_half(
    sums: str, codec: Codec, shapes: Shapes, weights: Mapping[int, int], staying: float
) -> Guard | None:
    """Return the coordinator's half for one attempt at one round; None where sums are made in the open.

    Parameters
    ----------
    sums : str
        As the recipe writes it.
    codec : Codec
        The recipe's ``wire.codec``; masks need levels of fixed point.
    shapes, weights : mapping
        Of an update; what each node counts for.
    staying : float
        Share of the asked parties that is enough to open a masked sum.
    """
    if sums == "homomorphic":
        return CkksGuard(shapes, weights)
    if sums == "enclave":
        return EnclaveGuard(shapes, weights)
    if sums == "plain":
        return None
    assert isinstance(codec, Fixed)
    return MaskGuard(codec, shapes, weights, staying, thin=sums == "sparsely-masked")


def party_half(sums: str, codec: Codec) -> PartyGuard | None:
    """Return the party's half; None where sums are made in the open."""
    if sums == "homomorphic":
        return CkksParty()
    if sums == "enclave":
        return EnclaveParty()
    return MaskParty(codec) if sums != "plain" and isinstance(codec, Fixed) else None
