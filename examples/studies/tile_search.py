"""Search tile sizes for cases on this GPU.

``python examples/studies/tile_search.py --case vit-b16-sample-bf16`` searches for one case.

What is found is kept for this user and GPU, and used from then on (`mingle.kernels.tiles`).  Nothing is ever
searched unasked.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mingle.bench import command, table
from mingle.bench.gated_experts import inputs
from mingle.bench.gated_experts.cases import CASES, SELECTIONS, KernelCase
from mingle.bench.measure import timed
from mingle.kernels import tiles
from mingle.kernels.tiles import Tile
from mingle.ops import dispatch

#: name of the kernel, operand, one launch
Launch = tuple[str, Tensor, Callable[[], object]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Search every kernel of the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    which, devices = "one case; may be repeated; default: all of --gpu", "cuda, cuda:1; cpu: interpreted"
    a_case = command.known(CASES, "case")
    parser.add_argument("--case", type=a_case, action="append", default=[], metavar="NAME", help=which)
    parser.add_argument("--device", default="cuda", help=devices)
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    chosen = [CASES[name] for name in args.case] or SELECTIONS["gpu"].cases
    for case in chosen:
        if reason := dispatch.without_triton(device, case.torch_dtype):
            parser.error(f"{case.name}: {reason}")
    table.write_lines(
        f"{case.name:32}{kernel:10}{tile.rows} × {tile.columns} × {tile.depth}, {tile.warps} warps, "
        f"{tile.stages} stages, {tile.splits} parts{', descriptors' * tile.described}"
        for case in chosen
        for kernel, tile in tune(case, device)
    )
    return 0


def tune(
    case: KernelCase, device: torch.device, candidates: Sequence[Tile] | None = None
) -> Iterator[tuple[str, Tile]]:
    """Search every kernel that the case runs; yields its name and the best tile."""
    for launch in launches(case, device):
        yield launch[0], tiles.search(*launch, lambda run: seconds(run, device), candidates)


def launches(case: KernelCase, device: torch.device) -> Iterator[Launch]:
    """Each kernel of the case."""
    from mingle.kernels.gated_experts import fold
    from mingle.kernels.gated_experts import triton as kernels

    t = inputs.make(case, device)
    x, dy = t.x.detach().flatten(0, 1), t.dy.flatten(0, 1)
    weight, bias = (joined.detach() for joined in t.all_gates())
    given, group = None if t.gates is None else t.gates.float(), case.rows // case.groups
    z = kernels.gates(x, weight, bias, None, group)[0] if given is None else given
    active = (
        None if given is None else kernels.active(x, t.A.shape[0] * t.A.shape[1], len(t.weight), z, group)
    )
    hidden, gated = kernels.shrink(x, t.A, z, group, None)

    def expand(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor) -> Callable[[], object]:
        return lambda: kernels.expand(x, weight, bias, hidden, gated, up, z, group, active)

    yield "shrink", x, lambda: kernels.shrink(x, t.A, z, group, active)
    yield "expand", x, expand(x, t.weight, t.bias, t.B.mT)
    if case.reduce == "batch":
        yield "fold", t.weight, lambda: fold.fold(t.weight, t.A, t.B, z[0])
    if case.backward:
        yield "upstream", dy, lambda: kernels.upstream(dy, t.B, hidden, z, group, active)
        yield "expand", dy, expand(dy, t.weight.mT, None, t.A)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of one launch."""
    if device.type != "cuda":
        return timed(run, device)[0]
    import triton

    return float(triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")) / 1e3


if __name__ == "__main__":
    raise SystemExit(main())
