"""A small layer, and its formula written out by hand."""

from __future__ import annotations

import torch


def problem(shape=(3, 5), d_in=7, d_out=6, experts=4, rank=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    return dict(
        x=normal(*shape, d_in),
        weight=normal(d_out, d_in),
        bias=normal(d_out),
        A=normal(experts, rank, d_in),
        B=normal(experts, d_out, rank),
        gate_weight=normal(experts, d_in),
        gate_bias=normal(experts),
    )


def by_hand(p, reduce, mask=None):
    """Loops over samples, tokens and experts; nothing shared with the library."""
    x, y = p["x"], torch.empty(*p["x"].shape[:-1], len(p["weight"]), dtype=p["x"].dtype)
    keep = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask
    for s in range(x.shape[0]):
        for n in range(x.shape[1]):
            if reduce == "token":
                seen = x[s, n]
            else:
                chosen = x[s][keep[s]] if reduce == "sample" else x[keep]
                seen = chosen.mean(0) if len(chosen) else torch.zeros_like(x[s, n])
            out = p["weight"] @ x[s, n] + p["bias"]
            for i in range(len(p["A"])):
                out = out + (p["gate_weight"][i] @ seen + p["gate_bias"][i]) * (
                    p["B"][i] @ (p["A"][i] @ x[s, n])
                )
            y[s, n] = out
    return y


BACKENDS = ("auto", "eager", "grouped")
