"""What one call of a small layer costs on a CPU beyond `torch.nn.Linear`, and what of that could be saved.

    python examples/studies/call_overhead.py --out call-overhead.json

Held against it are the operators that the formula takes, one after the other by hand: alone, and as an
autograd function, which is the least that Python can do where gates learn.  And `mingle.functional`, which
takes any tensors and looks at all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import layer_study
import torch
from torch import Tensor, nn

from mingle import MingleLinear, functional
from mingle.bench.measure import OURS, Contestant, Rounds, Row, Run, compare, verdict
from mingle.bench.record import CaseResult, case_result

#: of a layer
WIDTH, RANK = 64, 8
#: in a run that is timed: so few that most runs end before another process interrupts them
CALLS = 5
#: of timing, per case
SECONDS = 4.0
#: rounds, evenly chosen, whose times a result file has
KEPT = 50
#: relative, in fp32
TOLERANCE = 2e-6
BASE, ALONE, BY_HAND, GENERAL = "nn.Linear", "operators alone", "operators by hand", "mingle.functional"


@dataclass(frozen=True)
class CallCase:
    """4×10 tokens; `learns`: the newest gate needs a gradient, and a backward could follow."""

    experts: int
    reduce: str
    learns: bool

    @property
    def name(self) -> str:
        return f"{self.reduce}-t{self.experts}{'-learning' * self.learns}"


CASES = tuple(
    CallCase(experts, reduce, learns)
    for learns in (True, False)
    for reduce in ("token", "sample", "batch")
    for experts in (1, 2, 8)
)


def operators(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    down: Tensor,
    up: Tensor,
    gates: tuple[Tensor, Tensor],
    reduce: str,
) -> tuple[Tensor, ...]:
    """y [N, d_out], and what a backward needs, of x [S, n, d_in]: weight [d_in, d_out] and down [d_in, R] are
    transposed, up is [R, d_out], and gate weights are [d_in, T].
    """  # fmt: skip
    rows, (gate_weight, gate_bias) = x.view(-1, WIDTH), gates
    if reduce == "batch":  # so few outputs for that many tokens that the experts are folded
        pooled = rows.view(1, -1, WIDTH).mean(1)
        z = torch.addmm(gate_bias, pooled, gate_weight)
        gated = (up.view(-1, RANK, WIDTH) * z.view(-1, 1, 1)).view(up.shape)
        folded = torch.mm(gated.t(), down.t()).add_(weight.t())
        return torch.addmm(bias, rows, folded.t()), folded, z, pooled
    pooled = rows if reduce == "token" else x.mean(1)
    z = (
        torch.mm(rows, gate_weight) + gate_bias
        if reduce == "token"
        else torch.addmm(gate_bias, pooled, gate_weight)
    )
    hidden = torch.mm(rows, down)
    parts = hidden.view(len(z), -1, len(gate_bias), RANK) * z.view(len(z), 1, -1, 1)
    y = torch.addmm(bias, rows, weight).addmm_(parts.view(hidden.shape), up)
    return y, hidden, z, pooled


class ByHand(torch.autograd.Function):
    """`operators` with what every forward does before a backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_weight: Tensor, gate_bias: Tensor, rest: tuple[Any, ...]) -> Tensor:
        y, *kept = operators(x, *rest)
        ctx.save_for_backward(*kept)
        return y


def contestants(case: CallCase, seed: int) -> list[Contestant]:
    """`nn.Linear`, ours, and what stands between them."""
    torch.manual_seed(seed)
    base, x = nn.Linear(WIDTH, WIDTH), torch.randn(4, 10, WIDTH)
    layer = MingleLinear.from_linear(base, case.reduce)
    for _ in range(case.experts):
        layer.add_expert(torch.randn(RANK, WIDTH) / 8, torch.randn(WIDTH, RANK) / 8)
    if not case.learns:
        base.requires_grad_(False)
        layer.set_trainable_gates(0)
    tensors = layer.tensors()
    exact = functional.gated_experts(
        x.double(), *(None if tensor is None else tensor.detach().double() for tensor in tensors),
        reduce=case.reduce, backend="eager",
    )  # fmt: skip
    weights, biases = (gate.detach() for gate in layer.all_gates())
    rest = (
        base.weight.detach().t(), base.bias.detach(), layer.A.detach().flatten(0, 1).t(),
        layer.B_transposed.detach().flatten(0, 1), (weights.t(), biases), case.reduce,
    )  # fmt: skip

    def general() -> Tensor:
        return functional.gated_experts(
            x, *layer.tensors(), reduce=case.reduce, frozen_gates=layer.frozen_gates
        )

    def by_hand() -> Tensor:
        if not case.learns:
            return operators(x, *rest)[0].view(x.shape)
        y: Tensor = ByHand.apply(x, layer.gate_weight, layer.gate_bias, rest)
        return y.view(x.shape)

    def prepared(call: Callable[[], Tensor], expected: Tensor) -> tuple[Run, Row]:
        def run() -> None:
            for _ in range(CALLS):
                call()

        error = ((call().view(x.shape) - expected).norm() / expected.norm()).item()
        return run, verdict({"y": error}, TOLERANCE)

    linear = nn.functional.linear(x.double(), base.weight.double(), base.bias.double())
    calls: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        BASE: (lambda: base(x), linear),
        OURS: (lambda: layer(x), exact),
        ALONE: (lambda: operators(x, *rest)[0], exact),
        BY_HAND: (by_hand, exact),
        GENERAL: (general, exact),
    }
    return [Contestant(name, partial(prepared, *of), parts=CALLS) for name, of in calls.items()]


def measure(case: CallCase, seconds: float, seed: int = 0) -> CaseResult:
    """Seconds per call of each, in turns, and ours over `nn.Linear` and over the least there is."""
    device = torch.device("cpu")
    rows, others = compare(contestants(case, seed), device, Rounds(seconds, most=2000, warm_ups=40), seed)
    for row in rows:  # the percentiles are of all rounds, of which the file need not have each
        if "seconds" in row:
            row["seconds"] = row["seconds"][:: max(1, len(row["seconds"]) // KEPT)]
    taken = {row["name"]: row["median"] for row in rows if "median" in row}
    facts = asdict(case) | {"width": WIDTH, "rank": RANK, "samples": 4, "tokens": 10, "dtype": "float32"}
    more: dict[str, Any] = {"cpus_used_by_others": others}
    if {BASE, OURS, BY_HAND} <= taken.keys():
        more |= {"overhead": taken[OURS] - taken[BASE], "over_by_hand": taken[OURS] / taken[BY_HAND]}
        more["remarks"] = [
            f"{1e6 * more['overhead']:.1f} µs over {BASE}, {more['over_by_hand']:.2f}× the {BY_HAND}"
        ]
    title = f"4×10 tokens, {WIDTH}→{WIDTH}, T {case.experts}, r {RANK}, {case.reduce} gates"
    return case_result(case.name, title + ", differentiated" * case.learns, facts, rows, **more)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure `CASES`, show what was found and write it."""
    return layer_study.run(
        arguments,
        "What a call of a small layer costs beyond its base.",
        "overhead",
        CASES,
        partial(measure, seconds=SECONDS),
    )


if __name__ == "__main__":
    raise SystemExit(main())
