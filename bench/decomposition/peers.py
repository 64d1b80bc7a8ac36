"""Ways to the leading singular triplets of a matrix or a batch, each with the parameter that trades time for
accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mingle import linalg
from mingle.bench.decomposition.cases import Shape

Triplets = tuple[Tensor, Tensor, Tensor]

OURS = "mingle"
ACCURATE = f"{OURS} accurate"
#: the excess residual that a result may have; a sketch's is a matter of degree, and shown
EXACT, FAST, SKETCH = 1e-5, 1e-4, 0.5
#: a shorter side from which on a full decomposition takes seconds on a CPU, so that curves get fewer points
LARGE = 4096


@dataclass(frozen=True)
class Peer:
    """One method with one setting.

    `run` takes M [b, m, n] and the rank r, and returns U [b, m, r], S [b, r], Vh [b, r, n].  A method that is
    not `batched` works matrix by matrix, so that one tells the time of all.  `telling` settings are run on
    large matrices too.
    """

    method: str
    setting: str
    run: Callable[[Tensor, int], Triplets]
    limit: float
    batched: bool = True
    telling: bool = True
    full: bool = False
    curve: str = ""  # what the points are joined by, the method where empty
    label: str = ""  # of a point on the curve, the setting where empty

    @property
    def name(self) -> str:
        return f"{self.method} {self.setting}"

    def left_out(self, shape: Shape) -> str | None:
        """Why it is not run on this shape; None where it is."""
        large = shape.shorter >= LARGE
        if large and not self.telling:
            return "one point of the curve among others; the telling ones are run"
        if self.full and max(shape.m, shape.n) > LARGE:
            return "square orthogonal factors of this size take minutes and gigabytes"
        if self.full and large and shape.m == shape.n:
            return "of a large square matrix the thin decomposition is the full one"
        if large and "gesvd" in self.setting.split():
            return "takes minutes at this size"
        return None


def peers(device: torch.device) -> tuple[Peer, ...]:
    """All that can run there, ours first, the slow ones last."""
    return (*_ours(), *_sketches(), *_grams(device), *_full(device))


def _ours() -> tuple[Peer, ...]:
    """Named by the vectors that iterate for rank 64, and by the power iterations."""
    curves = {
        oversample: f"{OURS}, {64 + oversample} vectors, by power iterations" for oversample in (64, 32)
    }

    def setting(oversample: int, power_iters: int, telling: bool) -> Peer:
        def run(M: Tensor, r: int) -> Triplets:
            return linalg.svd_lowrank(M, r, oversample=oversample, power_iters=power_iters)

        name, curve = f"{64 + oversample}/{power_iters}", curves[oversample]
        return Peer(OURS, name, run, SKETCH, telling=telling, curve=curve, label=str(power_iters))

    return (
        Peer(OURS, "accurate", lambda M, r: linalg.svd_lowrank(M, r), EXACT, curve=curves[64]),
        Peer(OURS, "fast", lambda M, r: linalg.svd_lowrank(M, r, mode="fast"), FAST, curve=curves[32]),
        *(setting(64, q, q in (2, 4)) for q in (0, 1, 2, 4, 12)),
        *(setting(32, q, False) for q in (1, 3, 12)),
    )


def _sketches() -> tuple[Peer, ...]:
    def setting(q: int, niter: int, telling: bool = True) -> Peer:
        def run(M: Tensor, r: int) -> Triplets:
            U, S, V = torch.svd_lowrank(M, min(q, *M.shape[-2:]), niter)
            return U[..., :r], S[..., :r], V[..., :r].mT

        curve = f"torch.svd_lowrank, q = {q}, by niter"
        return Peer(
            "torch.svd_lowrank", f"{q}/{niter}", run, SKETCH, telling=telling, curve=curve, label=str(niter)
        )

    return (
        *(setting(64, niter, niter == 2) for niter in (2, 8, 16)),
        *(setting(128, niter, niter in (2, 4, 8)) for niter in (0, 1, 2, 4, 8, 12)),
    )


def _grams(device: torch.device) -> tuple[Peer, ...]:
    found = [Peer("Gram matrix, fp64", "eigh", gram_eigh, EXACT, batched=False)]
    if device.type == "cuda" and (cupy_eigh := _cupy_eigh()):
        found.append(Peer("Gram matrix, fp64", "CuPy eigh", lambda M, r: gram_eigh(M, r, cupy_eigh), EXACT))
    return tuple(found)


def gram_eigh(
    M: Tensor, r: int, eigh: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.linalg.eigh
) -> Triplets:
    """From the eigenvectors of the smaller Gram matrix in float64, as one would write it with a library's
    solver.
    """
    if M.shape[-2] < M.shape[-1]:
        V, S, Uh = gram_eigh(M.mT, r, eigh)
        return Uh.mT, S, V.mT
    wide = M.double()
    _, vectors = eigh(wide.mT @ wide)
    V = vectors.flip(-1)[..., :r]
    images = wide @ V
    S = images.norm(dim=-2)
    return (images / S.unsqueeze(-2)).to(M.dtype), S.to(M.dtype), V.mT.to(M.dtype)


def _cupy_eigh() -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    try:
        import cupy
    except ImportError:
        return None

    def eigh(squared: Tensor) -> tuple[Tensor, Tensor]:
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            values, vectors = cupy.linalg.eigh(cupy.from_dlpack(squared.contiguous()))
        return torch.from_dlpack(values), torch.from_dlpack(vectors)

    return eigh


def _full(device: torch.device) -> tuple[Peer, ...]:
    if device.type == "cuda":
        thin = [
            Peer(
                "torch.linalg.svd",
                f"thin {driver}",
                full_svd(False, driver),
                EXACT,
                batched=driver == "gesvda",
            )
            for driver in ("gesvda", "gesvdj", "gesvd")
        ]
        return (
            *thin,
            Peer("torch.linalg.svd", "full gesvd", full_svd(True, "gesvd"), EXACT, batched=False, full=True),
        )
    return (
        Peer("torch.linalg.svd", "thin", full_svd(False), EXACT, batched=False),
        Peer("torch.linalg.svd", "full", full_svd(True), EXACT, batched=False, full=True),
    )


def full_svd(full_matrices: bool, driver: str | None = None) -> Callable[[Tensor, int], Triplets]:
    """LAPACK's divide and conquer on a CPU, cuSOLVER's `driver` on a GPU."""

    def run(M: Tensor, r: int) -> Triplets:
        U, S, Vh = torch.linalg.svd(M, full_matrices=full_matrices, driver=driver)
        return U[..., :r], S[..., :r], Vh[..., :r, :]

    return run
