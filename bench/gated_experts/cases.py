"""The problems, the selections of them, and the targets that a selection shows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from mingle.bench.judge import Target
from mingle.kernels.gated_experts.reference import REDUCTIONS

#: short names, as in the names of cases
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

Sizes = tuple[int, int, int, int, int]
# fmt: off
#: samples, tokens per sample, d_in, d_out, experts; rank 64
SHAPES: dict[str, Sizes] = {
    "vit-b16":     (128, 197, 768, 768, 20),   # ViT-B/16, 224 pixels, batch 128: arithmetic decides
    "vit-b32":     (16, 50, 768, 3072, 8),     # fc1 of ViT-B/32, batch 16: launches and waves decide
    **{f"vit-b32-t{experts}": (16, 50, 768, 3072, experts) for experts in (1, 20, 64)},
    "square":      (16, 50, 768, 768, 8),      # an attention projection of ViT-B/32
    "image":       (1, 50, 768, 768, 20),      # one image: launches decide
    "vit-l-fc1":     (16, 257, 1024, 4096, 8),
    "vit-l-fc1-t20": (16, 257, 1024, 4096, 20),
    "vit-l-fc2":     (16, 257, 4096, 1024, 8),
    "vit-l-fc2-t20": (16, 257, 4096, 1024, 20),
    "llm":         (2, 1024, 4096, 4096, 8),   # a projection of a 7B language model
}
#: single tokens of as many sequences through the same projection, as a language model generates
DECODING = {f"llm-n{n}": (n, 1, 4096, 4096, 8) for n in (1, 16, 64)} | {"llm-n1-t64": (1, 1, 4096, 4096, 64)}
#: one-hot gates from a router, samples sorted by expert
ROUTED: dict[str, Sizes] = {
    "routed":       (16, 50, 768, 768, 64),
    "routed-large": (128, 197, 768, 768, 64),
    "routed-many":  (128, 197, 768, 768, 1024),
}
#: batch gates around the number of tokens from which folding is cheaper: 384 at 768 → 768, 614 at 768 → 3072
FOLDING = {f"fold-n{48 * samples}": (samples, 48, 768, 768, 8) for samples in (2, 6, 10, 32)}
FOLDING |= {f"fold-wide-n{48 * samples}": (samples, 48, 768, 3072, 8) for samples in (8, 32)}
# fmt: on


@dataclass(frozen=True)
class KernelCase:
    """The shape of a layer, how its gates are reduced, and what is computed.

    `routed`: the gates are given, one-hot per sample and sorted by expert, instead of linear in x.
    `compiled`: peers that take long to build are part of this case.
    """

    name: str
    samples: int
    tokens: int
    d_in: int
    d_out: int
    experts: int
    rank: int = 64
    reduce: str = "sample"
    dtype: str = "float32"
    backward: bool = False
    routed: bool = False
    compiled: bool = False

    @property
    def rows(self) -> int:
        """N, the tokens of all samples."""
        return self.samples * self.tokens

    @property
    def groups(self) -> int:
        """How many gate vectors there are."""
        return {"token": self.rows, "sample": self.samples, "batch": 1}[self.reduce]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def title(self) -> str:
        sizes = f"{self.d_in}→{self.d_out}, T {self.experts}, r {self.rank}"
        gates = "routed one-hot" if self.routed else self.reduce
        passes = f"forward{' and backward' * self.backward}"
        return f"{self.samples}×{self.tokens} tokens, {sizes}, {gates} gates, {self.dtype}, {passes}"


@dataclass(frozen=True)
class Selection:
    """Cases to run, seconds of timing for each, those after which nothing slow is built, and the help."""

    cases: tuple[KernelCase, ...]
    seconds: float
    build_until: float = float("inf")
    about: str = ""


def _cases(
    shapes: Mapping[str, Sizes], reductions: Iterable[str], routed: bool = False, rank: int = 64
) -> dict[str, KernelCase]:
    """Every shape with every reduction and dtype, forward and forward+backward."""
    found = {}
    for shape, reduce, dtype, backward in itertools.product(shapes, reductions, DTYPES, (False, True)):
        name = f"{shape}{f'-r{rank}' * (rank != 64)}-{reduce}-{dtype}{'-bw' * backward}"
        found[name] = KernelCase(name, *shapes[shape], rank, reduce, DTYPES[dtype], backward, routed)
    return found


CASES = _cases(SHAPES, REDUCTIONS) | _cases(ROUTED, ("sample",), routed=True) | _cases(FOLDING, ("batch",))
CASES |= _cases(DECODING, ("token",)) | _cases(DECODING, ("token",), rank=16)


def _select(names: str, compiled: str = "", **settings: Any) -> Selection:
    chosen = (replace(CASES[name], compiled=name in compiled.split()) for name in names.split())
    return Selection(tuple(chosen), **settings)


_QUICK = """square-sample-fp32 square-sample-bf16 square-batch-fp32 square-token-fp32 vit-b32-batch-fp32
    vit-b32-sample-fp32 square-sample-fp32-bw image-sample-fp32 routed-sample-fp32 fold-n96-batch-fp32
    fold-n1536-batch-fp32"""
_GPU_COMPILED = """vit-b16-sample-bf16 vit-b32-sample-bf16 image-sample-bf16 vit-b16-sample-bf16-bw
    llm-token-bf16"""
_GPU = f"""{_GPU_COMPILED} llm-n1-token-bf16 llm-n16-token-bf16 llm-n64-token-bf16 llm-n1-r16-token-bf16
    llm-n1-t64-token-bf16 routed-large-sample-bf16 routed-many-sample-bf16 vit-b16-token-bf16
    vit-b16-token-bf16-bw vit-b16-batch-bf16 vit-b16-sample-fp16 vit-b16-sample-fp32 vit-b32-sample-bf16-bw
    vit-b32-batch-bf16 vit-b32-t1-sample-bf16 vit-b32-t20-sample-bf16 vit-b32-t64-sample-bf16
    vit-l-fc1-sample-bf16 vit-l-fc2-sample-bf16 vit-l-fc1-t20-sample-bf16 vit-l-fc2-t20-sample-bf16
    vit-l-fc1-sample-bf16-bw llm-token-bf16-bw llm-sample-bf16 routed-sample-bf16"""
_FOLDED = " ".join(name for name in CASES if name.startswith("fold-") and "fp16" not in name)
_OTHERS = "square-token-fp32 square-sample-fp32 vit-b32-sample-fp32 image-sample-fp32 routed-sample-fp32"
SELECTIONS = {
    "quick": _select(_QUICK, "square-sample-fp32", seconds=6, build_until=60, about="two minutes on a CPU"),
    "gpu": _select(_GPU, _GPU_COMPILED, seconds=3, build_until=30, about="five minutes on a large GPU"),
    "dispatch": _select(f"{_FOLDED} {_OTHERS}", seconds=4, about='does backend="auto" choose well?'),
}

#: what the measurements of this library have shown; a run prints those of its cases
TARGETS = (
    Target("square-sample-fp32", "per-sample merge", 13),
    Target("square-sample-fp32", "eager loop", 2),
    Target("square-sample-fp32", "gemms alone (best library)", 1 / 1.15),
    Target("square-sample-bf16", "eager loop fp32", 4),
    Target("square-sample-fp32", "per-sample merge", 13, "mingle prepacked"),
    Target("square-sample-fp32", "eager loop", 2, "mingle prepacked"),
    Target("square-sample-bf16", "eager loop fp32", 4, "mingle prepacked"),
    Target("square-batch-fp32", "dense merge", 3),
    Target("vit-b32-batch-fp32", "dense merge", 4),
    Target("routed-sample-fp32", "mingle one expert", 1 / 1.3),
    Target("routed-sample-bf16", "mingle one expert", 1 / 1.3),
    Target("routed-large-sample-bf16", "mingle one expert", 1 / 1.3),
)
