"""Truncated decompositions and orthonormal bases, the linear algebra under every method.

All functions are pure, run without autograd and autocast, never in TF32, and decide ranks in float64.
"""

from mingle.linalg.basis import extend_basis
from mingle.linalg.certificate import Certificate
from mingle.linalg.spectrum import effective_rank, effective_ranks, factored_svd, gram_svd, project_out
from mingle.linalg.subspace import InputDirections, top_subspace
from mingle.linalg.subspace_iteration import NULL_SPACE_TOLERANCE
from mingle.linalg.svd import svd_lowrank

__all__ = [
    "NULL_SPACE_TOLERANCE",
    "Certificate",
    "InputDirections",
    "effective_rank",
    "effective_ranks",
    "extend_basis",
    "factored_svd",
    "gram_svd",
    "project_out",
    "svd_lowrank",
    "top_subspace",
]
