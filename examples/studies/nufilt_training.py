"""What NUFILT's training costs at the sizes of a ViT-B/32, beside the published training.

``python examples/studies/nufilt_training.py --out FOLDER`` takes some minutes on a CPU; ``--quick``, with one
layer of each shape and two rounds, shows whether it works.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mingle.bench import command, record
from mingle.bench.decomposition import cases
from mingle.bench.decomposition.cases import ExpertCase, LayerShape
from mingle.bench.judge import Target
from mingle.bench.measure import OURS, Contestant, Rounds, Row, Run, compare, log, timed, verdict
from mingle.bench.record import Results, case_result
from mingle.linalg.arithmetic import buckets, stacked
from mingle.linalg.sketch import gaussian
from mingle.methods import nufilt
from mingle.methods.nufilt import NufiltOptions

PUBLISHED = "published training"
#: the published training should take that many times as long as ours, per step
TARGET = 10.0
#: relative error of a layer's trained update, against the published training in float64
TOLERANCE = 1e-4
_SHAPES = LayerShape(768, 768, 48), LayerShape(3072, 768, 12)
CASE = ExpertCase("vit-b-32", "attention and fc1 of a ViT-B/32", _SHAPES, earlier=0)
_METHOD = (
    "seconds per step, of all layers: ours from whole trainings, what is made once per layer included; "
    "the published training from a few steps in a row, as all its steps are alike.  Medians over rounds, "
    "in which both take turns.  Singular vectors are given to both."
)


class FilterLayer(NamedTuple):
    """Δ and M [m, d], V_old [d, r_p], V_new [d, r_v] and the initial A [r_l, d] of one layer."""

    delta: Tensor
    merged: Tensor
    old: Tensor
    new: Tensor
    start: Tensor


Factors = tuple[Tensor, Tensor]
#: A [r_l, d] and B [d, r_l] of every layer after that many steps of a learning rate
Train = Callable[[Sequence[FilterLayer], int, float], list[Factors]]


@dataclass(frozen=True)
class NufiltPlan:
    """Settings of the method, rounds, steps of the published training in one, and seconds for all."""

    options: NufiltOptions = field(default_factory=NufiltOptions)
    rounds: int = 7
    peer_steps: int = 4
    seconds: float = 100.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it.  Returns 0, or 1 where a result of ours was wrong."""
    parser = command.parser("Time NUFILT's training steps at the sizes of a ViT-B/32, results checked first.")
    parser.add_argument("--rounds", type=int, default=7, help="how often each contender is timed")
    args = command.begin(parser, arguments)
    once = tuple(replace(shape, count=1) for shape in CASE.shapes)
    case, rounds = (replace(CASE, shapes=once), 2) if args.quick else (CASE, args.rounds)
    found = run(case, NufiltPlan(rounds=rounds), args.device, args.seed)
    return command.finish(found, args.out, CASE.name)


def run(case: ExpertCase, plan: NufiltPlan, device: torch.device, seed: int = 0) -> Results:
    began = time.monotonic()
    layers, vectors_seconds = make(case, plan.options, device, seed)
    log.info("%d layers; their singular vectors took %.1f s", len(layers), vectors_seconds)
    rows, others = measure(layers, plan, device, seed)
    facts: Row = {"layers": len(layers), "spectrum": cases.SPECTRUM, "options": asdict(plan.options)}
    facts["shapes"] = [asdict(shape) for shape in case.shapes]
    found = [case_result(case.name, case.title, facts, rows, cpus_used_by_others=others)]
    more = {"method": _METHOD, "singular_vectors_seconds": vectors_seconds}
    asked = [Target(case.name, PUBLISHED, TARGET)]
    return record.envelope("nufilt", device, seed, found, asked, began, **more)


def make(
    case: ExpertCase, options: NufiltOptions, device: torch.device, seed: int
) -> tuple[list[FilterLayer], float]:
    """The layers of a second task, with the singular vectors both are given, and the seconds those took."""

    def matrices(seed: int) -> list[Tensor]:
        problems = (cases.make(case, shape, shape.count, device, seed) for shape in case.shapes)
        return [delta for problem in problems for delta in problem.deltas]

    deltas, merged = matrices(2 * seed), matrices(2 * seed + 1)
    names = [f"layer {i}" for i in range(len(deltas))]
    wanted = (merged, options.r_p, names), (deltas, options.r_v, names)
    seconds, (old, new) = timed(lambda: [nufilt.right_vectors(*one) for one in wanted], device)
    starts = []
    for name, delta in zip(names, deltas, strict=True):
        rank, width = min(options.r_l, *delta.shape), delta.shape[1]
        starts.append(nufilt.INIT_STD * gaussian(seed, [name], rank, width, device, delta.dtype)[0])
    return [FilterLayer(*parts) for parts in zip(deltas, merged, old, new, starts, strict=True)], seconds


def ours(layers: Sequence[FilterLayer], steps: int, lr: float) -> list[Factors]:
    """As `mingle.methods.nufilt.updates` trains: on a GPU the layers of a shape together."""
    found: dict[int, Factors] = {}
    for places in buckets([layer.delta for layer in layers]):
        parts = zip(*(layers[i] for i in places), strict=True)
        delta, merged, old, new, start = (stacked(list(part)) for part in parts)
        A, B = nufilt.trained(delta, merged, old, new, start, steps, lr)
        A, B = (factor.view(len(places), *factor.shape[-2:]) for factor in (A, B))
        found |= dict(zip(places, zip(A, B, strict=True), strict=True))
    return [found[i] for i in range(len(layers))]


def train(layers: Sequence[FilterLayer], steps: int, lr: float) -> list[Factors]:
    """As published: every product anew at each step, autograd and Adam over the sum of all losses."""
    factors = [(layer.start.clone(), torch.zeros_like(layer.start.mT).contiguous()) for layer in layers]
    optimizer = torch.optim.Adam([factor.requires_grad_() for pair in factors for factor in pair], lr=lr)
    for _ in range(steps):
        losses = [_loss(layer, A, B) for layer, (A, B) in zip(layers, factors, strict=True)]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [(A.detach(), B.detach()) for A, B in factors]


def _loss(layer: FilterLayer, A: Tensor, B: Tensor) -> Tensor:
    """‖ΔV_new − (M + Δ(P + BA))V_new‖² + ‖MV_old − (M + Δ(P + BA))V_old‖², P = I − V_old V_oldᵀ."""
    delta, merged, old, new, _ = layer
    loss = delta.new_zeros(())
    for target, V in ((delta, new), (merged, old)):
        filtered = delta @ (V - old @ (old.mT @ V)) + delta @ (B @ (A @ V))
        loss = loss + (target @ V - merged @ V - filtered).square().sum()
    return loss


def measure(
    layers: Sequence[FilterLayer], plan: NufiltPlan, device: torch.device, seed: int
) -> tuple[list[Row], float | None]:
    """Each one's errors on one layer of every shape, and where it is right the seconds per step of all."""
    firsts = list({layer.delta.shape: layer for layer in reversed(layers)}.values())
    steps, lr = plan.options.steps, plan.options.lr
    exact = train([FilterLayer(*(part.double() for part in layer)) for layer in firsts], steps, lr)

    def prepare(contender: Train, count: int) -> tuple[Run, Row]:
        found = zip(firsts, contender(firsts, steps, lr), exact, strict=True)
        errors = {"×".join(map(str, layer.delta.shape)): _error(layer, *pairs) for layer, *pairs in found}
        return partial(contender, layers, count, lr), verdict(errors, TOLERANCE)

    contestants = [
        Contestant(name, partial(prepare, contender, count), {"steps_in_a_row": count}, count)
        for name, contender, count in ((OURS, ours, steps), (PUBLISHED, train, plan.peer_steps))
    ]
    return compare(contestants, device, Rounds(plan.seconds, fewest=2, most=plan.rounds), seed)


def _error(layer: FilterLayer, found: Factors, exact: Factors) -> float:
    update, truth = (layer.delta.double() @ B.double() @ A.double() for A, B in (found, exact))
    error = ((update - truth).norm() / truth.norm()).item()
    return error if error == error else math.inf


if __name__ == "__main__":
    raise SystemExit(main())
