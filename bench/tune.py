"""Search tile sizes for cases of the benchmark on this GPU: ``python bench/tune.py --case
vit-b16-sample-bf16``.

What is found is kept for this user and GPU, and used from then on (`mingle.kernels.tiles`).  Nothing is ever
searched unasked.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from mingle.bench import inputs, registry, table
from mingle.bench.registry import SELECTIONS, Case
from mingle.kernels.tiles import Tile
from mingle.ops import dispatch

Launch = tuple[str, torch.Tensor, int, int, int, Callable[[], object]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Search every kernel of the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split(":", 1)[0] + ".")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="NAME",
        help="one case; may be repeated; default: all of --gpu",
    )
    parser.add_argument(
        "--device", default="cuda", help="cuda, cuda:1; cpu runs Triton's interpreter, to try this out"
    )
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    try:
        cases = [registry.case(name) for name in args.case] or list(SELECTIONS["gpu"].cases)
        for case in cases:
            if reason := dispatch.without_triton(device, case.torch_dtype):
                raise ValueError(f"{case.name}: {reason}")
    except ValueError as error:
        parser.error(str(error))
    table.write_tiles((case.name, kernel, tile) for case in cases for kernel, tile in tune(case, device))
    return 0


def tune(
    case: Case, device: torch.device, candidates: Sequence[Tile] | None = None
) -> Iterator[tuple[str, Tile]]:
    """Search every kernel that the case runs; yields its name and the best tile."""
    from mingle.kernels import tiles

    strain = "special" if case.routed else "plain"  # zeros are skipped
    for kernel, x, rows, columns, depth, launch in launches(case, device):
        yield (
            kernel,
            tiles.search(
                kernel, x, rows, columns, depth, launch, lambda run: seconds(run, device), candidates, strain
            ),
        )


def launches(case: Case, device: torch.device) -> Iterator[Launch]:
    """Each kernel of the case as (name, operand, rows, columns, depth of its products, one launch)."""
    from mingle.kernels.gated_experts import fold
    from mingle.kernels.gated_experts import triton as gated_experts

    t = inputs.make(case, device)
    x, dy = t.x.detach().flatten(0, 1), t.dy.flatten(0, 1)
    weight, gate_bias = (joined.detach() for joined in t.all_gates())
    ranks, group = case.experts * case.rank, case.rows // case.groups
    given = None if t.gates is None else t.gates.float()
    hidden, z, _ = gated_experts.shrink(x, t.A, weight, gate_bias, given, None, group, False)
    skip = given is not None
    yield (
        "shrink",
        x,
        case.rows,
        ranks,
        case.d_in,
        lambda: gated_experts.shrink(x, t.A, weight, gate_bias, given, None, group, skip),
    )
    yield (
        "expand", x, case.rows, case.d_out, case.d_in + ranks,
        lambda: gated_experts.expand(x, t.weight, t.bias, hidden, t.B.mT, z, group, skip),
    )  # fmt: skip
    if case.reduce == "batch":
        yield "fold", t.weight, case.d_out, case.d_in, ranks, lambda: fold.fold(t.weight, t.A, t.B, z[0])
    if case.backward:
        yield (
            "upstream",
            dy,
            case.rows,
            ranks,
            case.d_out,
            lambda: gated_experts.upstream(dy, t.B, hidden, z, group, skip),
        )
        yield (
            "expand", dy, case.rows, case.d_in, case.d_out + ranks,
            lambda: gated_experts.expand(dy, t.weight.mT, None, hidden, t.A, z, group, skip),
        )  # fmt: skip


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of one launch."""
    if device.type == "cuda":
        import triton

        return float(triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
