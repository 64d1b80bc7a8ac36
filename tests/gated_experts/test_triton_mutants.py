"""The checks of the kernels fail where they should: one fault at a time is put into the source, and a check
must see it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

import torch
import triton
import triton.language as tl
from kernel_checks import COMPACT
from mutants import Mutation, applied

# now, not at the first call, which would put a mutant into it for good
import mingle.kernels.gated_experts.triton  # noqa: F401

pytestmark = pytest.mark.interpret

SHRINK, EXPAND, UPSTREAM, LISTED, GATES, COMMON, DESCRIPTORS, FOLD = (
    f"mingle.kernels.gated_experts.{name}"
    for name in ("shrink", "expand", "upstream", "listed", "gates", "common", "descriptors", "fold")
)
OPS = "mingle.ops.common"

MUTATIONS = {
    "the last ranks dropped": Mutation(
        EXPAND, "first, last = 0, R\n", "first, last = 0, R - r\n", "linear gates of tokens"
    ),
    "the last ranks dropped in half precision": Mutation(
        EXPAND, "first, last = 0, R\n", "first, last = 0, R - r\n", "experts alone in fp16"
    ),
    "the last expert not folded": Mutation(
        FOLD, "for step in range(T * CHUNKS):", "for step in range((T - 1) * CHUNKS):", "fold"
    ),
    "a rank of the neighbour going up": Mutation(
        EXPAND, "(j % r) * stride_ur", "tl.minimum(j % r, r - 2) * stride_ur", "guard bands of expand"
    ),
    "the first ranks again and again": Mutation(
        EXPAND, "joined_rows += tl.cast", "joined_rows += 0 * tl.cast", "linear gates of tokens"
    ),
    "the first part of a row again and again": Mutation(
        COMMON, "right += tl.cast", "right += 0 * tl.cast", "linear gates of tokens"
    ),
    "a rank lost going down": Mutation(
        SHRINK,
        "(columns % r) * stride_ar",
        "tl.minimum(columns % r, r - 2) * stride_ar",
        "linear gates of tokens",
    ),
    "a rank lost in the fold": Mutation(
        FOLD, "mask=(j < r)[:, None] & column_ok", "mask=(j < r - 1)[:, None] & column_ok", "fold"
    ),
    "a part of an inner product lost going down": Mutation(
        SHRINK,
        "first, last = split * part, min((split + 1) * part, K)",
        "first, last = split * part, min((split + 1) * part, K - 1)",
        "parts of inner products",
    ),
    "a part of an inner product lost going up": Mutation(
        EXPAND,
        "max(split * part - K, 0), min((split + 1) * part - K, R)",
        "max(split * part - K, 0), min((split + 1) * part - K, R - 1)",
        "parts of inner products",
    ),
    "a part of H not added up": Mutation(
        SHRINK,
        "acc += tl.load(parts_ptr + tl.cast(split, tl.int64) * N * R",
        "acc = tl.load(parts_ptr + tl.cast(split, tl.int64) * N * R",
        "parts of inner products",
    ),
    "a part of y not added up": Mutation(
        EXPAND,
        "acc += tl.load(parts_ptr + tl.cast(split, tl.int64) * N * O",
        "acc = tl.load(parts_ptr + tl.cast(split, tl.int64) * N * O",
        "parts of inner products",
    ),
    "H of another group gated": Mutation(
        SHRINK,
        "    groups = (rows // group).to(tl.int64)\n    z = tl.load(",
        "    groups = (rows // (group + 1)).to(tl.int64)\n    z = tl.load(",
        "parts of inner products",
    ),
    "only the last ranks in the gradient of a gate": Mutation(
        UPSTREAM, "dz += tl.sum(acc", "dz = tl.sum(acc", "linear gates of samples"
    ),
    "1 % too much gate bias for many tokens": Mutation(
        GATES,
        "acc += tl.load(beta_ptr + experts, mask=experts < T, other=0.0)",
        "acc += 1.01 * tl.load(beta_ptr + experts, mask=experts < T, other=0.0)",
        "gates of many tokens",
    ),
    "a piece of a gate's weight lost": Mutation(
        GATES, "for _ in tl.static_range(3):", "for _ in tl.static_range(1):", "gates of many tokens"
    ),
    "1 % too much gate bias": Mutation(
        GATES,
        "z += tl.load(beta_ptr + experts, mask=experts < T, other=0.0)",
        "z += 1.01 * tl.load(beta_ptr + experts, mask=experts < T, other=0.0)",
        "linear gates of samples",
    ),
    "a part of a group not pooled": Mutation(
        GATES,
        "ok = (several < parts)[:, None]",
        "ok = (several < parts - 1)[:, None]",
        "large groups",
    ),
    "no gradient of x through the gates": Mutation(
        COMMON, "    if HAS_SHARE:", "    if False:", "linear gates of tokens"
    ),
    "the gradient of a gate not divided among its tokens": Mutation(
        OPS, "return dz / group", "return dz", "linear gates of samples"
    ),
    "the gradient of a gate divided among padding too": Mutation(
        OPS,
        "return dz / mask.view(-1, group).sum(1, keepdim=True).clamp_min(1)",
        "return dz / group",
        "masked samples",
    ),
    "the gradient of a gate given to padding": Mutation(
        COMMON,
        "counted = counted & (tl.load(mask_ptr + rows, mask=rows < N, other=0) != 0)[:, None]",
        "pass",
        "masked samples",
    ),
    "gates of the neighbouring group": Mutation(
        SHRINK,
        "    groups = (rows // group).to(tl.int64)\n    first, last",
        "    groups = tl.maximum(rows // group - 1, 0).to(tl.int64)\n    first, last",
        "linear gates of samples",
    ),
    "gates of the neighbouring group going back": Mutation(
        UPSTREAM,
        "z_ptr + (rows // group).to(tl.int64) * stride_zg + expert",
        "z_ptr + tl.maximum(rows // group - 1, 0).to(tl.int64) * stride_zg + expert",
        "linear gates of samples",
    ),
    "gates of the neighbouring expert in the fold": Mutation(
        FOLD, "tl.load(g_ptr + expert)", "tl.load(g_ptr + (expert ^ 1) % T)", "fold"
    ),
    "padding in the mean": Mutation(
        GATES,
        "valid = valid & (tl.load(mask_ptr + start + tokens, mask=valid, other=0) != 0)",
        "pass",
        "masked samples",
    ),
    "padding counted in the mean": Mutation(
        GATES,
        "size += tl.sum(valid.to(tl.float32), 0)",
        "size += tl.sum((tokens < group).to(tl.float32), 0)",
        "masked samples",
    ),
    "a mask read past its group": Mutation(
        GATES,
        "tl.load(mask_ptr + place * group + tokens, mask=tokens < group, other=0)",
        "tl.load(mask_ptr + place * group + tokens)",
        "guard bands of gates-masked",
    ),
    "columns of x unmasked": Mutation(
        COMMON,
        "mask=row_ok & (k < last)[None, :], other=0.0",
        "mask=row_ok, other=0.0",
        "guard bands of shrink",
    ),
    "columns of x unmasked in the base": Mutation(
        COMMON,
        "mask=row_ok & (k < last)[None, :], other=0.0",
        "mask=row_ok, other=0.0",
        "guard bands of expand",
    ),
    "rows of the output unmasked": Mutation(
        EXPAND,
        "acc.to(y_ptr.dtype.element_ty), mask=row_ok & column_ok",
        "acc.to(y_ptr.dtype.element_ty), mask=column_ok",
        "guard bands of expand",
    ),
    "columns of the folded weight unmasked": Mutation(
        FOLD,
        "(acc + w.to(tl.float32)).to(y_ptr.dtype.element_ty),\n        mask=row_ok & column_ok",
        "(acc + w.to(tl.float32)).to(y_ptr.dtype.element_ty),\n        mask=row_ok",
        "guard bands of fold",
    ),
    "tiles never computed": Mutation(
        COMMON, "rows = min(row_tiles - first, BAND)", "rows = BAND", "guard bands of expand"
    ),
    "the base accumulated in half precision": Mutation(
        COMMON,
        "acc = tl.dot(a, b, acc, input_precision=PRECISION)",
        "acc = tl.dot(a, b, acc, input_precision=PRECISION).to(a.dtype).to(tl.float32)",
        "a cancelling sum in fp16",
    ),
    "an expert too many skipped": Mutation(
        EXPAND,
        "for step in range(tl.load(experts_ptr + T) * CHUNKS):",
        "for step in range((tl.load(experts_ptr + T) - 1) * CHUNKS):",
        "one expert per sample",
    ),
    "experts of the first hundred not counted": Mutation(
        LISTED,
        "        count += tl.sum(used, 0)\n",
        "        count = tl.sum(used, 0)\n",
        "one expert per sample",
    ),
    "a listed expert not computed": Mutation(
        LISTED,
        "for step in range(first, tl.load(experts_ptr + T) * chunks, programs):",
        "for step in range(first + 1, tl.load(experts_ptr + T) * chunks, programs):",
        "one expert per sample",
    ),
    "groups of a tile left out": Mutation(
        LISTED,
        "end_group = (min((row_tile + 1) * BLOCK_N, N) - 1) // group + 1",
        "end_group = (min((row_tile + 1) * BLOCK_N, N) - 1) // group",
        "one expert per sample",
    ),
    "the first ranks of an active expert alone": Mutation(
        EXPAND,
        "j = (step % CHUNKS) * BLOCK_R",
        "j = (step % 1) * BLOCK_R",
        "one expert of many ranks",
    ),
    "the first token of a sorted group alone": Mutation(
        COMMON, "groups * group + positions % group", "groups * group + 0 * positions", "sorted samples"
    ),
    "listed in another order than computed": Mutation(
        LISTED,
        "groups = tl.load(order_ptr + groups",
        "groups += 0 * tl.load(order_ptr + groups",
        "sorted tokens",
    ),
    "H of sorted tokens read in their own order": Mutation(
        EXPAND, "h_ptr + positions.to(tl.int64)[:, None]", "h_ptr + long_rows", "sorted tokens"
    ),
    "H of sorted tokens written in their own order": Mutation(
        LISTED, "place = long_positions * (T * r)", "place = long_rows * (T * r)", "sorted tokens"
    ),
    "gates of the tokens' positions": Mutation(
        LISTED,
        "z_rows = z_ptr + (rows // group)",
        "z_rows = z_ptr + (tl.minimum(positions, N - 1) // group)",
        "sorted tokens",
    ),
    "u not gated": Mutation(
        UPSTREAM,
        "(acc * z).to(u_ptr.dtype.element_ty)",
        "acc.to(u_ptr.dtype.element_ty)",
        "linear gates of samples",
    ),
    "H gated by the neighbouring expert under descriptors": Mutation(
        DESCRIPTORS, "experts = (column + tl.", "experts = (0 * column + tl.", "descriptors"
    ),
    "parts of experts gated by the neighbour": Mutation(
        DESCRIPTORS,
        "tl.arange(0, PIECES) * UNIT) // RANK",
        "tl.arange(1, PIECES + 1) * UNIT) // RANK",
        "descriptors with parts of experts",
    ),
    "a gate's gradient without its tile's other experts": Mutation(
        DESCRIPTORS,
        "tl.sum(each * h, 2)",
        "tl.sum(tl.sum(each * h, 2), 1, keep_dims=True) + 0 * z",
        "descriptors",
    ),
    "tiles of the next round never computed": Mutation(
        DESCRIPTORS,
        "for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, programs):",
        "for tile in tl.range(tl.program_id(0), programs, programs):",
        "descriptors",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_is_seen(name: str, tmp_path: Path) -> None:
    with applied(MUTATIONS[name], tmp_path), pytest.raises(AssertionError):
        COMPACT[MUTATIONS[name].seen_by]()


def test_without_a_fault_the_same_machinery_passes(tmp_path: Path) -> None:
    # Otherwise a mutant could be seen only because it was loaded in this way.
    harmless = [
        Mutation(module, "from __future__ import annotations", "from __future__ import annotations  #", "")
        for module in (EXPAND, OPS)
    ]
    for mutation in harmless:
        with applied(mutation, tmp_path):
            COMPACT["linear gates of samples"]()
    COMPACT["linear gates of samples"]()


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, out_ptr, OPERATION: tl.constexpr):
    a, b = tl.load(a_ptr), tl.load(b_ptr)
    if OPERATION == "add":
        out = a + b
    elif OPERATION == "sub":
        out = a - b
    else:
        out = a * b
    tl.store(out_ptr, out)


@pytest.mark.parametrize(
    ("operation", "a", "b", "result"),
    [
        ("add", 2**30, 2**30 - 1, 2**31 - 1),
        ("sub", -(2**30), 2**30, -(2**31)),
        ("mul", 2**15, 2**16 - 1, 2**31 - 2**15),
    ],
)
def test_integers_that_overflow_are_seen(operation: str, a: int, b: int, result: int) -> None:
    def computed(b: int) -> int:
        values = [torch.tensor([value], dtype=torch.int32) for value in (a, b, 0)]
        _arithmetic_kernel[(1,)](*values, operation)
        return int(values[2])

    assert computed(b) == result
    with pytest.raises(Exception, match=f"int32 overflow detected for operation {operation}"):
        computed(b + 1)
