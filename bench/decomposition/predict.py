"""What a task's experts take on a GPU by counting: launches, bytes and operations of every step, and the time
below which nothing can run.

The steps are those of `mingle.linalg` and `mingle.methods.experts` for a batch of `b` equal layers [m, n], m
≥ n (others are transposed), with r directions kept, ℓ iterating and q power iterations, after R directions of
earlier experts.  A multiply-add counts two operations.  Bytes are what a launch reads and writes at least,
each tensor once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from mingle.bench.decomposition.cases import Case, Shape
from mingle.linalg.spectrum import _DENSE_SHARE as DENSE_SHARE
from mingle.linalg.svd import MODES, on_gram_side

_F32, _F64 = 4, 8


@dataclass(frozen=True)
class Hardware:
    """Rates that a floor is computed from.  `eigh_per_column`: an estimate, of solvers that decompose one
    matrix after the other.
    """

    name: str = "H100 SXM"
    fp32: float = 60e12  # operations per second, IEEE single precision without tensor cores
    fp64: float = 60e12  # with tensor cores, which products use
    bytes: float = 3.0e12  # per second
    launch: float = 4e-6  # seconds of the host per launch
    multiprocessors: int = 132
    fp64_block: float = (
        33.5e12 / 132
    )  # of one multiprocessor without tensor cores, for kernels of one block per matrix
    # 18 to 36 µs reported for torch 2.10's batched eigh above n = 32 (pytorch issues 174674, 175585)
    eigh_per_column: float = 25e-6


@dataclass(frozen=True)
class Step:
    """Counts of one step for the whole batch.

    `block`: operations that one block does for one matrix, one after the other; `matrices` of them.
        `library`: columns of matrices that a
    library decomposes one after the other, whose time is an estimate and in no floor.
    """

    name: str
    launches: int
    bytes: float = 0.0
    fp32: float = 0.0
    fp64: float = 0.0
    block: float = 0.0
    matrices: int = 0
    library: int = 0

    def floor(self, hardware: Hardware) -> float:
        """Seconds: of launches, of memory, or of arithmetic, whichever takes longest."""
        waves = -(-self.matrices // hardware.multiprocessors)
        arithmetic = (
            self.fp32 / hardware.fp32 + self.fp64 / hardware.fp64 + waves * self.block / hardware.fp64_block
        )
        return max(self.launches * hardware.launch, self.bytes / hardware.bytes, arithmetic)

    def __add__(self, other: Step) -> Step:
        """Both under the first one's name; only steps without blocks, or with as many matrices each, add up."""
        matrices = self.matrices or other.matrices
        counts = {
            f.name: getattr(self, f.name) + getattr(other, f.name)
            for f in fields(self)
            if f.name not in ("name", "matrices")
        }
        return Step(self.name, matrices=matrices, **counts)

    def times(self, count: int) -> Step:
        counts = {
            f.name: getattr(self, f.name) * count for f in fields(self) if f.name not in ("name", "matrices")
        }
        return Step(self.name, matrices=self.matrices, **counts)


def decompose(shape: Shape, rank: int, mode: str = "accurate") -> list[Step]:
    """The steps of `svd_lowrank` for all layers of a shape in one batch."""
    oversample, q = MODES[mode]
    b, m, n = shape.count, max(shape.m, shape.n), shape.shorter
    r, l = min(rank, n), min(rank + oversample, n)  # noqa: E741
    if 2 * l >= n:
        raise ValueError(f"{shape.name}: so small a matrix is decomposed exactly, which is not counted")
    if on_gram_side(m, n, l, q):
        square = _product("Gram matrix of the shorter side, fp32", b, n, m, n, _F32)
        applied = _product("", b, l, n, n, _F32)
    else:
        square = None
        applied = _product("", b, l, n, m, _F32) + _product("", b, l, m, n, _F32)
    iteration = Step(f"{q} power iterations", 0) + (applied + _orthonormalized(b, l, n, _F32)).times(q)
    steps = [
        Step("stack, scale, widen", 4, b * m * n * (2 * _F32 + 3 * _F32 + _F32 + _F64)),
        _gaussian("random start", b, l, n),
        square,
        iteration,
        Step("P M in fp64", 1, b * l * n * (_F32 + _F64)) + _product("", b, l, n, m, _F64),
        _orthonormal("orthonormal basis in fp64", b, l, m),
        _product("Q M in fp64", b, l, m, n, _F64),
        _gram("its Gram matrix", b, l, n),
        Step("eigenvectors (K2)", 1, 2 * b * l * l * _F64, block=_jacobi(l), matrices=b),
        _product("leading triplets", b, r, l, m, _F64)
        + _product("", b, r, l, n, _F64)
        + Step("", 12, b * r * (m + 5 * n) * _F64),
        _orthonormal("unit images", b, r, n),
        Step("verify", 11, 4 * b * r * r * _F64) + _gram("", b, r, m) + _gram("", b, r, n),
        Step("scale back, narrow, signs", 9, b * r * (m + n) * (_F64 + 5 * _F32)),
        Step("A = Σ Vᵀ, a launch per layer", b, 2 * b * r * n * _F32),
    ]
    return [step for step in steps if step is not None]


def project(shape: Shape, rank: int, earlier: int) -> list[Step]:
    """The steps of `project_out_experts` for all layers of a shape in one batch, after so many earlier
    experts.
    """
    b, m, n, R = shape.count, shape.m, shape.n, rank * earlier
    if DENSE_SHARE * shape.shorter <= R:
        raise ValueError(
            f"{shape.name}: after {earlier} experts the dense sum is decomposed, which is not counted"
        )
    cubes = Step(
        "Cholesky and inverse of BᵀB, by a library",
        2 * b + 8,
        4 * b * R * R * _F64,
        fp64=b * (R**3 / 3 + R**3),
    )
    return [
        Step("concatenate and stack, two launches per layer", 2 * b + 3, (4 * R * (m + n) + 2 * m * n) * b * _F32),
        _gram("BᵀB", b, R, m) + Step("", 2, b * R * (m + n) * (_F32 + _F64)),
        cubes,
        _product("H = Fᵀ A", b, R, R, n, _F64),
        _gram("H Hᵀ", b, R, n),
        Step(f"eigh({R}), by a library: see the estimate", 12, 2 * b * R * R * _F64, library=b * R),
        _product("U and V", b, R, R, R, _F64) + _product("", b, m, R, R, _F64) + _product("", b, R, R, n, _F64)
        + Step("", 3, 3 * b * R * n * _F64),
        Step("effective rank (K3)", 2, b * R * _F64),
        _product("UᵀΔ V", b, R, m, n, _F32) + _product("", b, R, n, R, _F32) + Step("", 2, b * R * (m + n) * (_F32 + _F64)),
        Step("leading block", 6, 3 * b * R * R * _F32),
        _product("Δ − U (·) Vᵀ", b, m, R, R, _F32) + _product("", b, m, R, n, _F32) + Step("", 1, 3 * b * m * n * _F32),
    ]  # fmt: skip


def predict(case: Case, hardware: Hardware | None = None) -> dict[str, Any]:
    """Steps, sums and floors for all layers of a task, as plain data."""
    hardware = hardware or Hardware()
    parts: dict[str, dict[str, list[Step]]] = {
        "decompose": {shape.name: decompose(shape, case.rank) for shape in case.shapes},
        "project": {shape.name: project(shape, case.rank, case.earlier) for shape in case.shapes},
    }
    found: dict[str, Any] = {"hardware": asdict(hardware)}
    for part, shapes in parts.items():
        found[part] = {
            "steps": {
                name: [asdict(step) | {"floor": step.floor(hardware)} for step in steps]
                for name, steps in shapes.items()
            },
            **_sum((step for steps in shapes.values() for step in steps), hardware),
        }
    return found


def _sum(steps: Iterable[Step], hardware: Hardware) -> dict[str, float]:
    steps = list(steps)
    total = {
        name: sum(getattr(step, name) for step in steps) for name in ("launches", "bytes", "fp32", "fp64")
    }
    estimate = sum(step.library for step in steps) * hardware.eigh_per_column
    return total | {
        "floor_seconds": sum(step.floor(hardware) for step in steps),
        "library_estimate_seconds": estimate,
    }


def _product(name: str, b: int, rows: int, inner: int, columns: int, item: int) -> Step:
    """[rows, inner] @ [inner, columns]."""
    flop, moved = (
        2.0 * b * rows * inner * columns,
        float(item * b * (rows * inner + inner * columns + rows * columns)),
    )
    return Step(name, 1, moved, **{"fp32" if item == _F32 else "fp64": flop})


def _gram(name: str, b: int, rows: int, columns: int) -> Step:
    """Y Yᵀ of Y [rows, columns] in fp64."""
    return Step(
        name, 1, float(_F64 * b * (rows * columns + rows * rows)), fp64=2.0 * b * rows * rows * columns
    )


def _orthonormalized(b: int, rows: int, columns: int, item: int) -> Step:
    """One round of Cholesky QR."""
    widened = Step("", 1, b * rows * columns * (_F32 + _F64)) if item == _F32 else Step("", 0)
    inverse = Step("", 1, b * rows * rows * (_F64 + item), block=_cholesky(rows), matrices=b)
    return widened + _gram("", b, rows, columns) + inverse + _product("", b, rows, rows, columns, item)


def _orthonormal(name: str, b: int, rows: int, columns: int) -> Step:
    """`orthonormal` on a GPU, which does not look whether one round was enough: six, and rows to replace lost
    ones.
    """
    spare = _gaussian("", b, rows, columns) + Step("", 5, b * rows * columns * 7 * _F64)
    return Step(name, 0) + _orthonormalized(b, rows, columns, _F64).times(6) + spare


def _gaussian(name: str, b: int, rows: int, columns: int) -> Step:
    """21 element-wise launches over 64-bit numbers, three of them with two operands, and three small ones."""
    return Step(name, 24, float(b * rows * columns * (21 * 2 + 3) * _F64))


def _cholesky(n: int) -> float:
    """Operations of K1: the factor and its inverse."""
    return 2 / 3 * n**3


def _jacobi(n: int) -> float:
    """Operations of K2: ten sweeps over all pairs of columns, three inner products and a rotation each."""
    return n**3 / 3 + 10 * n * (n - 1) / 2 * 14 * n
