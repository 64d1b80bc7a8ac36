"""The checks of the kernels fail where they should: one fault at a time is put into the source, and a check
must see it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

from kernel_checks import COMPACT
from mutants import Mutation, applied

pytestmark = pytest.mark.interpret

KERNELS, FOLD, OPS = (
    "mingle.kernels.gated_experts.triton",
    "mingle.kernels.gated_experts.fold",
    "mingle.ops.common",
)

MUTATIONS = {
    "the last expert dropped": Mutation(
        KERNELS,
        "for step in range(T * CHUNKS):",
        "for step in range((T - 1) * CHUNKS):",
        "linear gates of tokens",
    ),
    "the last expert dropped in half precision": Mutation(
        KERNELS,
        "for step in range(T * CHUNKS):",
        "for step in range((T - 1) * CHUNKS):",
        "experts alone in fp16",
    ),
    "the last expert not folded": Mutation(
        FOLD, "for step in range(T * CHUNKS):", "for step in range((T - 1) * CHUNKS):", "fold"
    ),
    "a rank lost going up": Mutation(
        KERNELS,
        "mask=row_in[:, None] & (j < r)[None, :]",
        "mask=row_in[:, None] & (j < r - 1)[None, :]",
        "linear gates of tokens",
    ),
    "a rank lost going down": Mutation(
        KERNELS,
        "(columns % r) * stride_ar",
        "tl.minimum(columns % r, r - 2) * stride_ar",
        "linear gates of tokens",
    ),
    "a rank lost in the fold": Mutation(
        FOLD, "mask=(j < r)[:, None] & column_ok", "mask=(j < r - 1)[:, None] & column_ok", "fold"
    ),
    "only the last ranks in the gradient of a gate": Mutation(
        KERNELS, "dz += tl.sum(acc", "dz = tl.sum(acc", "linear gates of samples"
    ),
    "1 % too much gate bias for tokens": Mutation(
        KERNELS,
        "acc += tl.load(beta_ptr + experts, mask=experts < T, other=0.0)",
        "acc += 1.01 * tl.load(beta_ptr + experts, mask=experts < T, other=0.0)",
        "linear gates of tokens",
    ),
    "1 % too much gate bias for samples": Mutation(
        KERNELS,
        "z += tl.load(beta_ptr + experts, mask=experts < T, other=0.0)",
        "z += 1.01 * tl.load(beta_ptr + experts, mask=experts < T, other=0.0)",
        "linear gates of samples",
    ),
    "no gradient of x through the gates": Mutation(
        KERNELS, "    if HAS_SHARE:", "    if False:", "linear gates of tokens"
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
        KERNELS,
        "counted = counted & (tl.load(mask_ptr + rows, mask=rows < N, other=0) != 0)[:, None]",
        "pass",
        "masked samples",
    ),
    "gates of the neighbouring group": Mutation(
        KERNELS,
        "groups = (rows // group).to(tl.int64)",
        "groups = tl.maximum(rows // group - 1, 0).to(tl.int64)",
        "linear gates of samples",
    ),
    "gates of the neighbouring expert in the fold": Mutation(
        FOLD, "tl.load(g_ptr + expert)", "tl.load(g_ptr + (expert ^ 1) % T)", "fold"
    ),
    "padding in the mean": Mutation(
        KERNELS,
        "valid = valid & (tl.load(mask_ptr + start + tokens, mask=valid, other=0) != 0)",
        "pass",
        "masked samples",
    ),
    "padding counted in the mean": Mutation(
        KERNELS,
        "(tl.load(mask_ptr + start + tokens, mask=tokens < group, other=0) != 0).to(tl.float32), 0",
        "(tokens < group).to(tl.float32), 0",
        "masked samples",
    ),
    "a mask read past its group": Mutation(
        KERNELS,
        "(tl.load(mask_ptr + start + tokens, mask=tokens < group, other=0) != 0).to(tl.float32), 0",
        "(tl.load(mask_ptr + start + tokens) != 0).to(tl.float32), 0",
        "guard bands of shrink-masked",
    ),
    "columns of x unmasked going down": Mutation(
        KERNELS,
        "mask=(rows < N)[:, None] & (k < K)[None, :], other=0.0)\n            a =",
        "mask=(rows < N)[:, None], other=0.0)\n            a =",
        "guard bands of shrink-given",
    ),
    "columns of x unmasked in the base": Mutation(
        KERNELS,
        "x = tl.load(x_rows + k[None, :] * stride_xk, mask=row_ok & (k < K)[None, :], other=0.0)",
        "x = tl.load(x_rows + k[None, :] * stride_xk, mask=row_ok, other=0.0)",
        "guard bands of expand",
    ),
    "rows of the output unmasked": Mutation(
        KERNELS,
        "acc.to(y_ptr.dtype.element_ty),\n        mask=row_ok & column_ok",
        "acc.to(y_ptr.dtype.element_ty),\n        mask=column_ok",
        "guard bands of expand",
    ),
    "columns of the folded weight unmasked": Mutation(
        FOLD,
        "(acc + w.to(tl.float32)).to(y_ptr.dtype.element_ty),\n        mask=row_ok & column_ok",
        "(acc + w.to(tl.float32)).to(y_ptr.dtype.element_ty),\n        mask=row_ok",
        "guard bands of fold",
    ),
    "tiles never computed": Mutation(
        KERNELS, "rows = min(row_tiles - first, BAND)", "rows = BAND", "guard bands of expand"
    ),
    "the base accumulated in half precision": Mutation(
        KERNELS,
        "acc = tl.dot(x, w, acc, input_precision=PRECISION)",
        "acc = tl.dot(x, w, acc, input_precision=PRECISION).to(x.dtype).to(tl.float32)",
        "a cancelling sum in fp16",
    ),
    "an expert too many skipped": Mutation(
        KERNELS,
        "for _ in range(tl.sum(used, 0).to(tl.int32)):",
        "for _ in range(tl.maximum(tl.sum(used, 0) - 1, 0).to(tl.int32)):",
        "one expert per sample",
    ),
    "a word of gates too many skipped": Mutation(
        KERNELS,
        "for first in range(0, T, 32):",
        "for first in range(0, T // 32 * 32, 32):",
        "one expert per sample",
    ),
    "tiles of H skipped that have an active expert": Mutation(
        KERNELS,
        "column_tile * BLOCK_C // r, last // r, 16",
        "column_tile * BLOCK_C // r, last // r - 1, 16",
        "one expert per sample",
    ),
    "u gated twice": Mutation(
        KERNELS,
        "acc.to(u_ptr.dtype.element_ty)",
        "(acc * tl.load(z_ptr + (rows // group) * T + expert, mask=rows < N, other=0.0)[:, None])"
        ".to(u_ptr.dtype.element_ty)",
        "linear gates of samples",
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
        for module in (KERNELS, OPS)
    ]
    for mutation in harmless:
        with applied(mutation, tmp_path):
            COMPACT["linear gates of samples"]()
    COMPACT["linear gates of samples"]()
