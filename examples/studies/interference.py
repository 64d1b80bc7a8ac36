"""Which experts cost a merge its accuracy: the glyph suites, merged by MINGLE and tested again with some of
the experts only.

What newer experts take from a task is backward transfer.  What older ones take from it, whose frozen gates
answer to inputs that they have never seen, is in no common measure.  Both are found by leaving experts out of
the finished model: what a task's own expert and the older ones reach together is what was measured right
after its merge.

    python examples/studies/interference.py FILE.json --suites glyphs8,glyphs20 --orders 2
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mingle import suites
from mingle.io.files import write_json
from mingle.io.provenance import describe
from mingle.merging.evaluate import accuracy
from mingle.merging.merger import Merger
from mingle.methods.mingle import Mingle
from mingle.nn.linear import MingleLinear
from mingle.nn.observe import gates_made_of
from mingle.runs.orders import FIRST_ORDER_SEED, shuffled
from mingle.runs.settings import for_suite
from mingle.suites import Suite
from mingle.suites.protocol import PROTOCOLS
from mingle.tasks import TaskData


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--suites", default="glyphs8", help="names, separated by commas")
    parser.add_argument("--protocol", default="strict", choices=PROTOCOLS)
    parser.add_argument("--orders", type=int, default=1)
    parser.add_argument("--threads", type=int, help="CPU threads of this process")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)  # better now than after an hour
    if args.threads:
        torch.set_num_threads(args.threads)
    loaded = [
        suites.load(name, protocol=args.protocol) for name in args.suites.split(",")
    ]  # every mistake before the first merge
    found: dict[str, Any] = {}
    for suite in loaded:
        seeds = range(FIRST_ORDER_SEED, FIRST_ORDER_SEED + args.orders)
        orders = {str(seed): measure(merged(suite, seed), suite) for seed in seeds}
        found[suite.name] = {
            "mean": mean([row for rows in orders.values() for row in rows]),
            "orders": orders,
        }
        print(
            suite.name,
            *(f"{name} {value:.1f}" for name, value in found[suite.name]["mean"]["accuracy"].items()),
            sep="  ",
            flush=True,
        )
    write_json(args.out, {"protocol": args.protocol, "suites": found, **describe(torch.device("cpu"))})


def merged(suite: Suite, order_seed: int) -> Merger:
    """The suite's tasks merged by MINGLE with the suite's settings, in the order of that seed."""
    merger = Merger(suite.base, Mingle.name, suite.task_type, **for_suite(Mingle.name, suite, {}))
    for name in shuffled(suite, order_seed):
        merger.add(name, suite.expert(name), suite.seeds(name))
    return merger


def measure(merger: Merger, suite: Mapping[str, TaskData]) -> list[dict[str, Any]]:
    """Per task, in order of arrival: accuracies in per cent by what is left of the model, and what its
    samples meet there.

    ``gates`` are mean magnitudes over samples, layers and experts.  ``protected`` is the share of its layers'
    inputs, in energy, that lies in directions which were protected before it arrived: there its gate can
    hardly move.
    """
    return [_task(merger, suite[name], place) for place, name in enumerate(merger.task_names)]


def _task(merger: Merger, data: TaskData, place: int) -> dict[str, Any]:
    method, count = merger.method, len(merger.merged)
    assert isinstance(method, Mingle)

    def tested(experts: Iterable[int], *, constant: bool = False) -> float:
        kept = torch.zeros(count).index_fill_(0, torch.tensor(list(experts), dtype=torch.long), 1)
        with gates_made_of(method.layers, lambda gates: kept.expand_as(gates) if constant else gates * kept):
            return accuracy(merger.task, merger.model, data)

    own, older, newer = [place], range(place), range(place + 1, count)
    accuracies = {
        "base": tested(()),
        "its expert, gate 1": tested(own, constant=True),
        "its expert": tested(own),
        "it and older": tested([*older, *own]),
        "it and newer": tested([*own, *newer]),
        "all": tested(range(count)),
    }
    before = {layer: basis[:, : method.offsets[place][layer]] for layer, basis in method.bases.items()}
    magnitudes: list[Tensor] = []
    with gates_made_of(method.layers, partial(_note, magnitudes)), energies(method.layers, before) as shares:
        accuracy(merger.task, merger.model, data)
    mean_magnitude = torch.cat(magnitudes).mean(0)
    experts = {"own": own, "older": older, "newer": newer}
    return {
        "task": merger.task_names[place],
        "accuracy": accuracies,
        "gates": {
            key: mean_magnitude[list(places)].mean().item() for key, places in experts.items() if places
        },
        "protected": statistics.fmean(within / total for within, total in shares.values()),
    }


def _note(magnitudes: list[Tensor], gates: Tensor) -> Tensor:
    magnitudes.append(gates.abs().flatten(0, -2))
    return gates


@contextmanager
def energies(
    layers: Mapping[str, MingleLinear], bases: Mapping[str, Tensor]
) -> Iterator[dict[str, list[float]]]:
    """While the block runs, sum ‖Uᵀx‖² and ‖x‖² over every token x that a layer sees, U [d_in, K] its
    orthonormal basis.

    Yields:
        name → [‖Uᵀx‖², ‖x‖²].
    """
    sums = {name: [0.0, 0.0] for name in layers}

    def hook(name: str, layer: MingleLinear, args: tuple[Tensor, ...]) -> None:
        for i, x in enumerate((args[0] @ bases[name], args[0])):
            sums[name][i] += x.double().square().sum().item()

    handles = [layer.register_forward_pre_hook(partial(hook, name)) for name, layer in layers.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over all tasks and orders; older and newer gates over the tasks that have any."""
    means: dict[str, Any] = {"protected": statistics.fmean(row["protected"] for row in rows)}
    for part in ("accuracy", "gates"):
        keys = dict.fromkeys(key for row in rows for key in row[part])
        means[part] = {
            key: statistics.fmean(row[part][key] for row in rows if key in row[part]) for key in keys
        }
    return means


if __name__ == "__main__":
    main()
