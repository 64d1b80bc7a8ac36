"""Builds the Triton kernels for GPUs that are not here, exactly as the launchers would launch them.

A layer is called on meta tensors while `JITFunction.run` only records its arguments; what the launcher passed
is then specialised by Triton's rules and compiled for the target.  So tiles, constexprs and strides are the
product's own, never a copy in the tests.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import re
import subprocess
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from offline_cases import (
    DTYPES,
    FOLDED_LAYERS,
    LAYERS,
    PRODUCTS,
    PROJECTOR,
    TARGETS,
    VARIANTS,
    CompileCase,
    CompileTarget,
    Layer,
)
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from mingle.adaptation.projector import RelaxedProjector
from mingle.functional import gated_experts
from mingle.kernels import tiles
from mingle.ops import dispatch

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Launch(NamedTuple):
    """One kernel launch: `arguments` by the kernel's parameter names, compiler options, and the grid."""

    kernel: JITFunction[..., None]
    arguments: dict[str, Any]
    options: dict[str, int]
    grid: tuple[int, ...]


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


@contextlib.contextmanager
def compilers(folder: Path, count: int = 2) -> Iterator[ProcessPoolExecutor]:
    """New processes that compile, with a cache in `folder`; Triton reads its environment when imported."""
    environment = ENVIRONMENT | {"TRITON_CACHE_DIR": str(folder)}
    with mock.patch.dict(os.environ, environment):
        os.environ.pop("TRITON_INTERPRET", None)
        with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as executor:
            yield executor
            executor.shutdown(cancel_futures=True)


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
                self,
                arguments,
                {name: arguments.pop(name) for name in named if name not in self.arg_names},
                grid,
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
    sort: bool = False,
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
        sort: sort tokens by their experts where zeros are skipped.
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
    from mingle.kernels.gated_experts import listed

    with mock.patch.object(listed, "sorting_pays", return_value=sort):
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
        return [launch for launch in launches if launch.kernel.__name__ in PRODUCTS][which]
    return next(launch for launch in launches if launch.kernel.__name__ == which)


def key(case: CompileCase) -> str:
    """Equal for cases that are the same build."""
    launch = find(case)
    code = source(launch, TARGETS[case.target])
    return f"{case.target} {code.name} {code.signature} {code.constants} {code.attrs} {launch.options}"


def build(case: CompileCase, tile: tiles.Tile | None = None) -> Build:
    """Compile one case in an environment with `ENVIRONMENT`."""
    target = TARGETS[case.target]
    compiled, spilled, registers = compile_launch(find(case, tile), target)
    text = compiled.asm["ptx" if target.gpu.backend == "cuda" else "amdgcn"]
    instructions = Counter({name: text.count(name) for name in (target.fastest, *target.inexact)})
    return Build(
        spilled, registers, compiled.metadata.shared, instructions, _pipelined(compiled.asm["ttgir"])
    )


def compile_launch(launch: Launch, target: CompileTarget) -> tuple[Any, int, int]:
    """What Triton makes of a launch, what it spills, and the registers of a thread (see `Build`)."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log), warnings.catch_warnings():  # Triton prints what ptxas reports
        # nobody who merges models could do anything about a warning of the compiler
        warnings.simplefilter("error")
        compiled = triton.compile(source(launch, target), target=target.gpu, options=launch.options)
    if target.gpu.backend == "cuda":
        spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
        registers = re.findall(r"Used (\d+) registers", log.getvalue())
        assert len(spilled) == 2, log.getvalue()
    else:
        text = compiled.asm["amdgcn"]
        spilled = re.findall(r"\.vgpr_spill_count: +(\d+)", text)
        registers = re.findall(r"\.vgpr_count: +(\d+)", text)
    (used,), spills = registers, [int(number) for number in spilled]
    assert spills  # a report that cannot be read does not say that nothing spills
    return compiled, sum(spills), int(used)


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
