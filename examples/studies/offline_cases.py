"""The launches that are compiled for GPUs that are not here: kernels, shapes, arithmetic and targets."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget

from mingle.kernels import tiles

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "tf32": torch.float32,
}


class CompileTarget(NamedTuple):
    """A GPU to build for, what `configs.rule` needs to know of it, and what its assembly calls matrix
    products.
    """

    gpu: GPUTarget
    chip: tiles.Chip
    fastest: str
    inexact: tuple[str, ...]  # not IEEE fp32 for fp32 operands


TARGETS = {
    name: CompileTarget(
        GPUTarget(kind, arch, 32 if kind == "cuda" else 64),
        tiles.Chip(kind, f"some {chip}", *numbers),
        fastest,
        inexact,
    )
    for name, kind, arch, chip, numbers, fastest, inexact in (
        ("sm_80", "cuda", 80, "A100", (80, 108, 166_912), "mma.sync", ("mma.sync",)),
        ("sm_86", "cuda", 86, "RTX 3090", (86, 82, 101_376), "mma.sync", ("mma.sync",)),
        ("sm_89", "cuda", 89, "RTX 4090", (89, 128, 101_376), "mma.sync", ("mma.sync",)),
        ("sm_90", "cuda", 90, "H100", (90, 132, 232_448), "wgmma.mma_async", ("wgmma", "mma.sync")),
        ("sm_100", "cuda", 100, "B200", (100, 148, 232_448), "tcgen05.mma", ("tcgen05.mma", "mma.sync")),
        ("sm_120", "cuda", 120, "RTX 5090", (120, 170, 101_376), "mma.sync", ("mma.sync",)),
        ("gfx942", "hip", "gfx942", "MI300X", (94, 304, 65_536), "v_mfma", ("xf32", "bf16")),
    )
}


class Layer(NamedTuple):
    """The shapes of one call."""

    samples: int
    tokens: int
    d_in: int
    d_out: int
    experts: int
    rank: int


# A layer of ViT-B/16 at batch 128, one of ViT-B/32 at batch 16, one image, and one token of a language model,
# whose inner products are computed in parts; then what Triton specialises differently: no row of H that is a
# multiple of 16 elements, nothing at all that is one, and sizes of 1, which become constants; then ranks that
# are no power of two: of whole pieces, of many numbers, and with few ragged rows.
LAYERS = {
    "large": Layer(128, 197, 768, 768, 20, 64),
    "middle": Layer(16, 50, 768, 3072, 8, 64),
    "small": Layer(1, 50, 768, 768, 20, 64),
    "decode": Layer(1, 1, 4096, 4096, 8, 64),
    "narrow": Layer(128, 197, 768, 768, 5, 8),
    "ragged": Layer(128, 197, 769, 771, 5, 17),
    "single": Layer(2, 1, 1, 1, 1, 1),
    "uneven": Layer(16, 512, 2456, 1504, 8, 160),
    "broad": Layer(64, 77, 2432, 256, 3, 200),
    "odd": Layer(2, 77, 604, 2159, 2, 33),
}
FOLDED_LAYERS = {
    "large": Layer(64, 197, 4096, 4096, 20, 64),
    "middle": Layer(16, 50, 768, 768, 8, 64),
    "small": Layer(4, 50, 128, 256, 20, 64),
    "narrow": Layer(128, 197, 768, 768, 5, 8),
    "ragged": LAYERS["ragged"],
    "single": Layer(1, 2, 1, 1, 1, 1),
    **{size: LAYERS[size] for size in ("uneven", "broad", "odd")},
}

# A variant of a kernel: the call that launches it, and which launch it is: one of the products (shrink,
# expand, upstream, expand for dx) by its place among them, or another kernel by its name.
VARIANTS: dict[str, tuple[dict[str, Any], int | str]] = {
    "gates-token": ({}, "token_gates_kernel"),
    "gates-few": ({}, "row_gates_kernel"),
    "gates-wide": ({"gate_dtype": torch.float32}, "token_gates_kernel"),
    "pool": ({"reduce": "sample"}, "pool_kernel"),
    "pool-masked": ({"reduce": "sample", "masked": True}, "pool_kernel"),
    "gates-pooled": ({"reduce": "sample"}, "row_gates_kernel"),
    "gates-masked": ({"reduce": "sample", "masked": True}, "row_gates_kernel"),
    "shrink": ({}, 0),
    "list": ({"gates": "constant"}, "list_kernel"),
    "shrink-skip": ({"gates": "constant"}, 0),
    "gate-parts": ({}, "gate_parts_kernel"),
    "expand": ({}, 1),
    "expand-skip": ({"gates": "constant"}, 1),
    "add-parts": ({}, "add_parts_kernel"),
    "keys": ({"gates": "constant", "sort": True}, "key_kernel"),
    "list-sorted": ({"gates": "constant", "sort": True}, "list_kernel"),
    "shrink-sorted": ({"gates": "constant", "sort": True}, 0),
    "expand-sorted": ({"gates": "constant", "sort": True}, 1),
    "upstream": ({}, 2),
    "upstream-skip": ({"gates": "constant"}, 2),
    "dx": ({}, 3),
    "dx-masked": ({"reduce": "sample", "masked": True}, 3),
    "dx-wide-gates": ({"gate_dtype": torch.float32}, 3),
    "dx-given": ({"gates": "given"}, 3),
    "dx-skip": ({"gates": "constant"}, 3),
    "dx-sorted": ({"gates": "constant", "sort": True}, 3),
    "fold": ({"reduce": "batch"}, 0),
}
PRODUCTS = ("shrink_kernel", "shrink_listed_kernel", "expand_kernel", "upstream_kernel", "fold_kernel")

# The launches of the relaxed projector: always in fp32, for a layer of width d_in and three directions of
# each expert's task.
PROJECTOR = {"measure": 0, "project": 1}


class CompileCase(NamedTuple):
    """One build: names out of `VARIANTS` or `PROJECTOR`, `DTYPES`, `TARGETS` and `LAYERS`."""

    variant: str
    arithmetic: str
    target: str
    size: str

    def __str__(self) -> str:
        return "-".join(self)
