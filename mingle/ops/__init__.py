"""The registered operators ``torch.ops.mingle.*``: the kernels as torch.compile and autograd see them.

low_rank               one low-rank term per expert
folded                 one weight for tokens that all share their gates
shared                 several layers that read the same input
small_factorizations   of small matrices, for `mingle.linalg`; small_kernels calls their CUDA kernels
operands               what the first three take, by name
common                 what the first three share
checks                 whether the arguments of `mingle.functional` fit together
grouping               which tokens share a row of gates
dispatch               which backend computes, and in which form
extension              whether the CUDA extension can serve

Operators take matrices: the N tokens of all samples in one dimension, and `group`, the number of consecutive
tokens that share a gate row (1 token, one sample, or all).  They are composed here, once for every backend,
from the six operations that a backend offers: `gates`, `active`, `shrink`, `expand`, `upstream` and `fold`.
`mingle.functional` is the public face.

Each operator is a plain function, registered for tracing and wrapped in an autograd function for eager calls,
which the dispatcher would burden with some thirty microseconds each; `common.Operator` takes the form that
fits.
"""

from mingle.ops.folded import FOLDED, gated_experts_folded, gated_experts_folded_backward
from mingle.ops.low_rank import LOW_RANK, gated_experts, gated_experts_backward
from mingle.ops.shared import SHARED, gated_experts_shared, gated_experts_shared_backward

__all__ = [
    "FOLDED",
    "LOW_RANK",
    "SHARED",
    "gated_experts",
    "gated_experts_backward",
    "gated_experts_folded",
    "gated_experts_folded_backward",
    "gated_experts_shared",
    "gated_experts_shared_backward",
]
