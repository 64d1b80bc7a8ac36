"""The leading directions of a stream of vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mingle import ranks
from mingle.linalg.arithmetic import NOISE, falling_eigh, gram, ieee, product
from mingle.linalg.basis import orthonormalized
from mingle.linalg.sketch import gaussian

#: From this width on a covariance is too large to keep, and a sketch of a few hundred rows takes its place.
WIDE = 8192
_SKETCH_ROWS = 256
# Of the block Krylov method: the residual, relative to the largest eigenvalue, at which it ends; the vectors
# in a block, where that is not less than twice as many as are wanted; and the width below which a full
# decomposition takes no longer.
_RESIDUAL, _BLOCK, _SMALL = 1e-13, 8, 256
#: Parts of the rows of a covariance, each computed up to its diagonal.
_PANELS = 4


@dataclass(frozen=True, eq=False)
class InputDirections:
    """What is kept of a stream of vectors to find their leading directions, the top eigenvectors of Σ xᵀx.

    The vectors are not centred.  Up to 8192 dimensions the sum itself [d, d] is kept; beyond, a sketch
    [256, d] by Frequent Directions (Ghashami et al., SIAM J. Comput. 45, 2016), whose directional energies
    err by less than Σ‖x‖² / 256.  Both are in float64.  Never changed: `including` makes a new one, so that
    layers which have seen the same inputs can share one.

    Attributes:
        width: d.
        statistic: the sum or the sketch; None before the first vector.
        count: how many vectors were seen.
    """

    width: int
    statistic: Tensor | None = None
    count: int = 0

    @staticmethod
    def most_bytes(width: int) -> int:
        """How many bytes the statistic of vectors of a width takes at most."""
        return 8 * width * (width if width < WIDE else _SKETCH_ROWS)

    @ieee
    def including(self, x: Tensor) -> InputDirections:
        """With the vectors x [..., d] counted in.

        Raises:
            ValueError: vectors of another width.
        """
        if x.shape[-1] != self.width:
            raise ValueError(f"x has width {x.shape[-1]}, expected {self.width}")
        vectors = x.reshape(-1, self.width)
        count = self.count + len(vectors)
        if self.width < WIDE:
            return InputDirections(self.width, _with_products(self.statistic, vectors), count)
        vectors = vectors.double()
        sketch = vectors[:0] if self.statistic is None else self.statistic
        for chunk in vectors.split(_SKETCH_ROWS):
            sketch = _shrunk(torch.cat([sketch, chunk]))
        return InputDirections(self.width, sketch, count)

    @ieee
    def of_all(self, count: int, device: torch.device) -> InputDirections:
        """With the vectors that all other processes have seen, the same in each; see `mingle.ranks`.

        All have to call it together.  Sums are added up by one all-reduce; sketches, which are small, are
        joined in the order of the processes.

        Args:
            count: how many vectors all have seen.
            device: where the statistic is, if there is any.
        """
        if ranks.size() == 1:
            return self
        empty = torch.zeros(self.width if self.width < WIDE else 0, self.width, dtype=torch.float64)
        known = empty.to(device) if self.statistic is None else self.statistic.clone()
        if self.width < WIDE:
            ranks.sum_(known)
        else:
            for rows in ranks.gather(known.cpu()):
                empty = _shrunk(torch.cat([empty, rows]))
            known = empty.to(device)
        return InputDirections(self.width, known, count)

    @ieee
    def top(self, k: int) -> Tensor:
        """The k leading directions as orthonormal columns [d, ≤ k] in float64, without those of no energy.

        There are no more of them than vectors were seen: the next ones would be rounding errors.
        """
        if self.statistic is None:
            return torch.empty(self.width, 0, dtype=torch.float64)
        k = min(k, self.count)
        if self.width < WIDE:
            return top_subspace(self.statistic, k)
        rows = _energetic(*falling_eigh(gram(self.statistic)), k).mT @ self.statistic
        return orthonormalized(orthonormalized(rows)).mT


def _with_products(known: Tensor | None, x: Tensor) -> Tensor:
    """`known` + Σ xᵀx [d, d] in float64, for x [N, d].

    fp32 vectors are multiplied in fp32, after their mean m is taken off, which is mostly the leading
    direction and would bury the others in its rounding errors:  Σ xᵀx = Σ (x−m)ᵀ(x−m) + sᵀm + mᵀ(s − N m)
    with s = Σ x, exact for any m.
    """
    if known is None:
        known = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    if x.dtype == torch.float64 or len(x) == 0:
        return torch.addmm(known, x.mT.double(), x.double())
    x = x.float()
    total = x.sum(0, dtype=torch.float64)
    mean = (total / len(x)).float()
    centred = x - mean
    m = mean.double()
    means = torch.addmm(known, torch.stack([total, m]).mT, torch.stack([m, total - len(x) * m]))
    return means.add_(_gram_of_columns(centred))


def _gram_of_columns(x: Tensor) -> Tensor:
    """xᵀx [d, d] of x [N, d]; little more than the half below the diagonal is multiplied."""
    if x.device.type != "cpu":
        return product(x.mT, x)
    rows = x.mT.contiguous()
    result = rows.new_empty(len(rows), len(rows))
    start = 0
    for part in rows.chunk(_PANELS):
        end = start + len(part)
        result[start:end, :end] = product(part, rows[:end].mT)
        result[:start, start:end] = result[start:end, :start].mT
        start = end
    return result


def _shrunk(rows: Tensor) -> Tensor:
    """At most `_SKETCH_ROWS` rows in place of `rows`.

    Their Gram matrix is that of `rows`, less the energy of the first direction that does not fit.
    """
    if len(rows) <= _SKETCH_ROWS:
        return rows
    values, vectors = falling_eigh(gram(rows))
    values = values.clamp_min(0)  # rounding errors, where the rows have fewer directions than that
    lost, kept, vectors = values[_SKETCH_ROWS], values[:_SKETCH_ROWS], vectors[:, :_SKETCH_ROWS]
    share = torch.where(kept > lost, (kept - lost) / kept, 0.0).sqrt()
    return share.unsqueeze(1) * (vectors.mT @ rows)


@ieee
def top_subspace(covariance: Tensor, k: int) -> Tensor:
    """The leading `k` eigenvectors of a positive semidefinite matrix [d, d], as columns [d, ≤ k] in float64.

    A block Krylov method until the residuals are rounding errors, or a full decomposition.  Directions
    without any energy (eigenvalue ≤ 1e-14 of the largest) are left out.  Signs are such that the entry of
    largest magnitude in a column is positive.

    Raises:
        ValueError: a matrix that is not square, or has non-finite entries.
    """
    if covariance.dim() != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"covariance has shape {list(covariance.shape)}, expected [d, d]")
    if not covariance.isfinite().all():
        raise ValueError(f"the covariance {list(covariance.shape)} has non-finite entries")
    covariance = covariance.double()
    vectors = _energetic(*(_iterated(covariance, k) or falling_eigh(covariance)), k)
    peak = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) if vectors.numel() else vectors[:1]
    return vectors * torch.where(peak < 0, -1.0, 1.0)


def _energetic(values: Tensor, vectors: Tensor, k: int) -> Tensor:
    """The first k eigenvectors [d, ≤ k], less those whose eigenvalue is a rounding error."""
    return vectors[:, :k][:, values[:k] > NOISE * values[:1].clamp_min(0)]


def _iterated(covariance: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """(eigenvalues [k], eigenvectors [d, k]) by a block Krylov method; None where a full one is cheaper.

    The block, multiplied and made orthogonal to all before it, twice, joins the basis, from which the
    eigenvectors are taken: where eigenvalues lie close together this needs far fewer products than iterating
    a block by itself, as their number grows with the root of the inverse gap (Saad, Numerical Methods for
    Large Eigenvalue Problems, 6.6).
    """
    d, block = len(covariance), max(_BLOCK, 2 * k)
    if d < _SMALL:
        return None
    basis, images = (covariance.new_empty(d // 3, d) for _ in range(2))
    rows = orthonormalized(orthonormalized(gaussian(0, [""], block, d, covariance.device, torch.float64)[0]))
    held, look = 0, 2 * block
    while held + block <= len(basis):
        basis[held : held + block], images[held : held + block] = rows, rows @ covariance
        held += block
        Q, QC = basis[:held], images[:held]
        if held >= look:
            values, W = falling_eigh(QC @ Q.mT)
            values, W = values[:k], W[:, :k].mT
            vectors = W @ Q
            residual = (W @ QC - values.unsqueeze(1) * vectors).norm(dim=1).max()
            if residual <= _RESIDUAL * values[0].clamp_min(torch.finfo(torch.float64).tiny):
                return values, vectors.mT
            look = held + max(2 * block, held // 4)
        rows = QC[-block:]
        for _ in range(2):
            rows = orthonormalized(rows - (rows @ Q.mT) @ Q)
    return None
