"""Builds the Triton kernels for GPUs that are not here, exactly as the launchers would launch them.

A layer is called on meta tensors while `JITFunction.run` only records its arguments; what the launcher passed
is then specialised by Triton's rules and compiled for the target.  So tiles, constexprs and strides are the
product's own, never a copy in the tests.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from mingle.adaptation.projector import RelaxedProjector
from mingle.functional import gated_experts
from mingle.kernels import tiles
from mingle.ops import dispatch

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "tf32": torch.float32,
}
_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
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
# whose inner products are computed in parts; then what Triton specialises
# differently: no row of H that is a multiple of 16 elements, nothing at all that is one, and sizes of 1,
# which become constants.
LAYERS = {
    "large": Layer(128, 197, 768, 768, 20, 64),
    "middle": Layer(16, 50, 768, 3072, 8, 64),
    "small": Layer(1, 50, 768, 768, 20, 64),
    "decode": Layer(1, 1, 4096, 4096, 8, 64),
    "narrow": Layer(128, 197, 768, 768, 5, 8),
    "ragged": Layer(128, 197, 769, 771, 5, 17),
    "single": Layer(2, 1, 1, 1, 1, 1),
}
FOLDED_LAYERS = {
    "large": Layer(64, 197, 4096, 4096, 20, 64),
    "middle": Layer(16, 50, 768, 768, 8, 64),
    "small": Layer(4, 50, 128, 256, 20, 64),
    "narrow": Layer(128, 197, 768, 768, 5, 8),
    "ragged": LAYERS["ragged"],
    "single": Layer(1, 2, 1, 1, 1, 1),
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
    "upstream": ({}, 2),
    "upstream-skip": ({"gates": "constant"}, 2),
    "dx": ({}, 3),
    "dx-masked": ({"reduce": "sample", "masked": True}, 3),
    "dx-wide-gates": ({"gate_dtype": torch.float32}, 3),
    "dx-given": ({"gates": "given"}, 3),
    "dx-skip": ({"gates": "constant"}, 3),
    "fold": ({"reduce": "batch"}, 0),
}
_PRODUCTS = ("shrink_kernel", "shrink_listed_kernel", "expand_kernel", "upstream_kernel", "fold_kernel")

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


class Launch(NamedTuple):
    """One kernel launch: `arguments` by the kernel's parameter names, and the compiler's options."""

    kernel: JITFunction[..., None]
    arguments: dict[str, Any]
    options: dict[str, int]


class Build(NamedTuple):
    """What a compiled kernel says of itself."""

    # bytes stored and loaded on CUDA; vector registers on AMD, whose scalar registers spill into vector ones
    spills: int
    registers: int
    shared: int  # bytes
    instructions: Counter[str]  # matrix instructions
    # for every innermost loop with a matrix product: whether it copies operands asynchronously
    loops: list[bool]


# What `build` needs before Triton is imported, besides a cache of its own: a real compilation, and the log of
# ptxas.
ENVIRONMENT = {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1", "OMP_NUM_THREADS": "1"}


def missing(name: str) -> str | None:
    """Why nothing can be built for a target; None where it can."""
    gpu = TARGETS[name].gpu
    backend = {"cuda": "nvidia", "hip": "amd"}[gpu.backend]
    if backend not in triton.backends.backends:
        return f"this Triton has no {backend} backend"
    if gpu.backend == "cuda":
        from triton.backends.nvidia.compiler import get_ptxas

        try:
            subprocess.run([get_ptxas(gpu.arch).path, "--version"], check=True, capture_output=True)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            return f"no ptxas: {error}"
    return None


def record(call: Callable[[], object], target: CompileTarget, arithmetic: str) -> list[Launch]:
    """The kernels that `call` launches when its tensors are on `target`."""
    launches: list[Launch] = []

    def run(self: JITFunction[..., None], *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        arguments = dict(zip(self.arg_names, values, strict=False)) | named
        launches.append(
            Launch(
                self, arguments, {name: arguments.pop(name) for name in named if name not in self.arg_names}
            )
        )

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(tiles, "chip", return_value=target.chip),
        mock.patch.object(tiles, "precision", return_value="tf32" if arithmetic == "tf32" else "ieee"),
        mock.patch.object(dispatch, "without_triton", return_value=None),
        # autocast does not know the meta device
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),
    ):
        call()
    return launches


def step(
    layer: Layer,
    arithmetic: str,
    *,
    reduce: str = "token",
    masked: bool = False,
    gates: str = "linear",
    gate_dtype: torch.dtype | None = None,
) -> None:
    """Forward and backward of one layer on meta tensors.

    Args:
        layer: the shapes.
        arithmetic: a dtype's name or ``"tf32"``.
        reduce: as for `gated_experts`.
        masked: pass a mask.
        gates: ``"linear"``; ``"given"`` per sample with a gradient; ``"constant"`` per sample without one, so
            that zeros are skipped.
        gate_dtype: of the linear gates, if other than the layer's.
    """
    dtype = DTYPES[arithmetic]

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    samples, tokens, d_in, d_out, experts, rank = layer
    x = tensor(samples, tokens, d_in).requires_grad_()
    given = (
        None
        if gates == "linear"
        else torch.empty(samples, experts, device="meta", requires_grad=gates == "given")
    )
    gate_weight = tensor(experts, d_in, dtype=gate_dtype or dtype).requires_grad_() if given is None else None
    y = gated_experts(
        x,
        tensor(d_out, d_in),
        tensor(d_out),
        tensor(experts, rank, d_in),
        tensor(experts, rank, d_out).mT,  # [T, d_out, r], stored as the layers store it
        gate_weight,
        None if given is not None else tensor(experts, dtype=gate_dtype or dtype),
        reduce=reduce,
        mask=torch.empty(samples, tokens, dtype=torch.bool, device="meta") if masked else None,
        gates=given,
        backend="triton",
    )
    y.backward(tensor(samples, tokens, d_out))


def projection(layer: Layer) -> None:
    """The relaxed projector on meta tensors: three layers, one of them with fewer directions."""
    widths = (layer.d_in, layer.d_in, 1)
    projector = RelaxedProjector(
        [torch.empty(width, min(width, 3 * layer.experts), device="meta") for width in widths],
        backend="triton",
    )
    layout = projector.layout(dict.fromkeys(projector.names, 1))
    projector.project_(torch.empty(layout.size, device="meta"), layout)


def source(launch: Launch, target: CompileTarget) -> ASTSource:
    """The kernel as Triton's launcher specialises it: 1 is a constant, multiples of 16 are marked."""
    signature, constants, hints = {}, {}, {}
    aligned: list[list[Any]] = [["tt.divisibility", 16]]
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        if (
            parameter.is_constexpr
            or value is None
            or (special and value is not True and isinstance(value, int) and value == 1)
        ):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            element = _POINTERS[value.base.dtype].removeprefix("*")
            signature[name] = f"tensordesc<{element}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            small = value.untyped_storage().size() < 1 << 31
            hints[(index,)] = aligned + [["tt.pointer_range", 32]] * (target.gpu.backend == "hip" and small)
        else:
            signature[name] = "i32" if abs(value) < 1 << 31 else "i64"
            if special and value % 16 == 0:
                hints[(index,)] = aligned
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=hints)


def find(case: CompileCase, tile: tiles.Tile | None = None) -> Launch:
    """The launch that a case names; with `tile` instead of the rule's."""
    target = TARGETS[case.target]
    if case.variant in PROJECTOR:
        return record(lambda: projection(LAYERS[case.size]), target, case.arithmetic)[PROJECTOR[case.variant]]
    options, which = VARIANTS[case.variant]
    layer = (FOLDED_LAYERS if case.variant == "fold" else LAYERS)[case.size]
    with contextlib.nullcontext() if tile is None else tiles._forced(tile):
        launches = record(lambda: step(layer, case.arithmetic, **options), target, case.arithmetic)
    if isinstance(which, int):
        return [launch for launch in launches if launch.kernel.__name__ in _PRODUCTS][which]
    return next(launch for launch in launches if launch.kernel.__name__ == which)


def key(case: CompileCase) -> str:
    """Equal for cases that are the same build."""
    launch = find(case)
    code = source(launch, TARGETS[case.target])
    return f"{case.target} {code.name} {code.signature} {code.constants} {code.attrs} {launch.options}"


def build(case: CompileCase, tile: tiles.Tile | None = None) -> Build:
    """Compile one case in an environment with `ENVIRONMENT`."""
    target, launch = TARGETS[case.target], find(case, tile)
    log = io.StringIO()
    with contextlib.redirect_stdout(log), warnings.catch_warnings():  # Triton prints what ptxas reports
        # nobody who merges models could do anything about a warning of the compiler
        warnings.simplefilter("error")
        compiled = triton.compile(source(launch, target), target=target.gpu, options=launch.options)
    if target.gpu.backend == "cuda":
        text = compiled.asm["ptx"]
        spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
        registers = re.findall(r"Used (\d+) registers", log.getvalue())
        assert len(spilled) == 2, log.getvalue()
    else:
        text = compiled.asm["amdgcn"]
        spilled = re.findall(r"\.vgpr_spill_count: +(\d+)", text)
        registers = re.findall(r"\.vgpr_count: +(\d+)", text)
    (used,), spills = registers, [int(number) for number in spilled]
    assert spills  # a report that cannot be read does not say that nothing spills
    instructions = Counter({name: text.count(name) for name in (target.fastest, *target.inexact)})
    return Build(
        sum(spills), int(used), compiled.metadata.shared, instructions, _pipelined(compiled.asm["ttgir"])
    )


_PRODUCT = re.compile(
    r"= (tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) |^ *ttng\.tc_gen5_mma ", re.MULTILINE
)


def _pipelined(ttgir: str) -> list[bool]:
    """For every innermost loop that holds a matrix product, whether its body copies to shared memory
    asynchronously.
    """
    lines, found = ttgir.splitlines(), []
    for start, line in enumerate(lines):
        opening = re.match(r"( *)(?:%\S+ = )?scf\.for ", line)
        if opening is None:
            continue
        end = next(i for i in range(start + 1, len(lines)) if lines[i].startswith(opening[1] + "}"))
        body = "\n".join(lines[start + 1 : end])
        if _PRODUCT.search(body) and "scf.for" not in body:
            found.append(re.search(r"async_(tma_)?copy_global_to_local", body) is not None)
    return found
