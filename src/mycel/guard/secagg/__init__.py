"""Secure aggregation: the coordinator learns a sum and nothing else of what went into it.

Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning"; over a sparse graph: Bell
et al. 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead" (SecAgg+).

    y_u = x_u + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv)   (mod 2^w, over u's neighbours v)

The pairwise masks cancel in the sum. What parties that left did not cancel, and the masks b of those that stayed, is
rebuilt from shares that each party's neighbours hold: of a party's two secrets never both.

The coordinator is trusted to follow the protocol, not to look away; it relays keys, so a coordinator that puts keys of
its own in their place is outside the promise unless parties know each other's keys beforehand.
"""
