"""What the gated sum of low-rank experts costs: operations and bytes, whatever computes it.

With N tokens, T experts of rank r, R = T·r and G gate vectors (one per token, sample or batch), operations,
of which a multiply-add counts two:

    low-rank forward   2N (d_in d_out + R (d_in + d_out)) + 2GT d_in
    folded forward     2 d_in d_out (GR + N) + 2GT d_in
    low-rank backward  the same products with u = dy B_catᵀ for H, 2NR for dz and 2G d_in for the newest gate
    folded backward    2N d_in d_out for x, and for dz the cheaper of dyᵀx or the low-rank u and H

Bytes: two launches, shrink and expand, and again two for the backward pass; each reads each of its inputs
once and writes each of its outputs once, gate values in fp32.
"""

from __future__ import annotations

_GATE_BYTES = 4


class Work:
    """Operations and bytes of one call, by form and direction.

    Args:
        tokens: N.
        groups: G.
        d_in, d_out: of the layer.
        experts: T.
        active: how many experts a token uses.
        stored: how many experts are read at all.
        rank: r.
        itemsize: bytes of a number of x, the weights and y.
        linear_gates: whether the gates are computed from x; a router's are given.
    """

    def __init__(
        self,
        *,
        tokens: int,
        groups: int,
        d_in: int,
        d_out: int,
        experts: int,
        active: int,
        stored: int,
        rank: int,
        itemsize: int,
        linear_gates: bool,
    ) -> None:
        N, G, R, item, linear = tokens, groups, active * rank, itemsize, linear_gates
        base, x, y, hidden, weights = d_in * d_out, N * d_in, N * d_out, N * R, G * d_in * d_out
        A, B = stored * rank * d_in, stored * rank * d_out
        # in fp32 and in the case's dtype; where a router gives the gates, there are none to compute
        values, linear = G * experts * _GATE_BYTES, linear_gates
        gate, newest, item = linear * experts * d_in, linear * G * d_in, itemsize

        products, folding = 2.0 * N * (base + R * (d_in + d_out)), 2.0 * base * (G * R + N)
        self.base_flop, self.forward_flop = 2.0 * N * base, products + 2.0 * G * gate
        self.folded_forward_flop = folding + 2.0 * G * gate
        gate_backward = 2.0 * G * gate + 2 * newest
        self.backward_flop = products + linear * 2 * hidden + gate_backward
        dz = linear * min(folding, 2.0 * hidden * (d_in + d_out))
        self.folded_backward_flop = 2.0 * N * base + dz + gate_backward

        # x and A in, H and z out; x, H, z, base and B in, y out
        self.forward_bytes = (x + A + gate + hidden + x + hidden + base + B + y) * item + 2 * values
        # the three GEMMs gate H in place, and read y again for the last product
        self.chain_bytes = self.forward_bytes + 2 * (hidden + y) * item
        # dy, B, saved H in, u and dz out; dy, u, base, A, gates, z and dz in, dx out; x for the newest gate
        moved = y + B + 2 * hidden + y + hidden + base + A + x + gate + newest
        self.backward_bytes = moved * item + (2 + linear) * values
        # W₀, A and B in, W_eff out once per gate vector; x and W_eff in, y out; the gates read x before
        self.folded_forward_bytes = (base + A + B + 2 * weights + x + y + linear * (x + gate)) * item
        self.folded_backward_bytes = (weights + x + y + x + linear * (gate + y)) * item
