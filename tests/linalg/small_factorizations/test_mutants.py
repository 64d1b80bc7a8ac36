"""Faults planted in csrc that the checks must see."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import factorization_checks as checks
import pytest
import torch
from host_build import CSRC, MISSING, Host

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

CHOLESKY, JACOBI, RESCALE, SIGNS, RANK = (
    "cholesky_qr.cuh",
    "small_eigh.cuh",
    "rescale.cuh",
    "signs.cuh",
    "effective_rank.cuh",
)


class Fault(NamedTuple):
    """`old`, which stands once in `file`, becomes `new`."""

    file: str
    old: str
    new: str


FAULTS = {
    "no shift": Fault(CHOLESKY, "shared.at(i, i) = 1.0 + tau;", "shared.at(i, i) = 1.0;"),
    "a shift that does not grow": Fault(CHOLESKY, "10.0 * tau", "tau"),
    "the wrong triangle": Fault(CHOLESKY, "gram[k] * shared.scale[i]", "gram[j * n + i] * shared.scale[i]"),
    "no scaling": Fault(CHOLESKY, "1.0 / sqrt(length)", "1.0"),
    "zero columns scaled": Fault(CHOLESKY, "length > Negligible<Out>::value", "length >= 0.0"),
    "pivots of noise": Fault(CHOLESKY, "(n + kSlack) * DBL_EPSILON", "0.0"),
    "a panel's last column forgotten": Fault(
        CHOLESKY, "for (int t = from; t < to; ++t) {", "for (int t = from; t < to - 1; ++t) {"
    ),
    "a ragged tile stored": Fault(CHOLESKY, "if (row + r < n && column + c <= row + r)", "if (row + r < n)"),
    "the diagonal of X₁ counted twice": Fault(
        CHOLESKY, "for (int t = j + 1; t < from; ++t) {", "for (int t = j; t < from; ++t) {"
    ),
    "c and s swapped": Fault(
        JACOBI, "c = 1.0 / sqrt(1.0 + t * t), s = t * c;", "s = 1.0 / sqrt(1.0 + t * t), c = t * s;"
    ),
    "a rotation of one column only": Fault(JACOBI, "q[i] += s * (old - tau * q[i]);", ""),
    "a turn the wrong way": Fault(JACOBI, "copysign(1.0, zeta)", "-copysign(1.0, zeta)"),
    "a player who never plays": Fault(JACOBI, "players / 2, [&]", "players / 2 - 1, [&]"),
    "convergence declared too early": Fault(JACOBI, "<= DBL_EPSILON * sqrt", "<= 1e6 * DBL_EPSILON * sqrt"),
    "no completion": Fault(JACOBI, "complete(block, shared, rank);", ""),
    "completed once, not twice": Fault(JACOBI, "w[i] -= shared.column(c)[i] * shared.lengths[c];", ";"),
    "rising order": Fault(
        JACOBI, "shared.lengths[other] > shared.lengths[j] ||", "shared.lengths[other] < shared.lengths[j] ||"
    ),
    "rows for columns": Fault(
        JACOBI, "shared.column(shared.order[k % n])[k / n]", "shared.column(shared.order[k / n])[k % n]"
    ),
    "not scaled back": Fault(
        JACOBI, "ldexp(shared.lengths[shared.order[place]], exponent)", "shared.lengths[shared.order[place]]"
    ),
    "infinity among the finite": Fault(RESCALE, "finite(magnitude) ?", "magnitude == magnitude ?"),
    "the last one that is not finite": Fault(
        RESCALE, "a.first < b.first ? a.first : b.first", "a.first < b.first ? b.first : a.first"
    ),
    "one factor for subnormal numbers": Fault(RESCALE, "* factor * rest)", "* ldexp(1.0, -*e))"),
    "rows taken for contiguous": Fault(RESCALE, "M.row_stride == M.n", "true"),
    "the last of equal peaks": Fault("block.cuh", "b.index < a.index", "b.index > a.index"),
    "signs of U only": Fault(SIGNS, "Vh.at(first + c, j) = -Vh.at(first + c, j)", "(void)j"),
    "a lane forgotten": Fault(SIGNS, "lane < kLanes;", "lane < kLanes - 1;"),
    "an integer missed by a rounding": Fault(RANK, "1.0 + 0x1p-40", "1.0"),
}
SEEN_BY = {
    CHOLESKY: [
        checks.lower_triangle,
        checks.cholesky,
        checks.growing_shift,
        checks.two_rounds,
        checks.not_finite,
    ],
    JACOBI: [checks.eigh],
    RESCALE: [checks.rescaling],
    SIGNS: [checks.signs],
    "block.cuh": [checks.signs],
    RANK: [checks.ranks],
}


def mutant(folder: Path, fault: Fault) -> Host:
    for source in CSRC.iterdir():
        shutil.copy(source, folder)
    text = (folder / fault.file).read_text()
    assert text.count(fault.old) == 1, f"{fault.old!r} stands {text.count(fault.old)} times in {fault.file}"
    (folder / fault.file).write_text(text.replace(fault.old, fault.new))
    return Host(folder / "host.cpp", folder / "mutant.so", "-O1", "-Wno-unused", "-Wno-error")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    built = mutant(tmp_path, FAULTS[name])
    with pytest.raises(AssertionError):
        _run(SEEN_BY[FAULTS[name].file], built)


def _run(seen_by: Sequence[Callable[[Host], None]], host: Host) -> None:
    for check in seen_by:
        check(host)
