"""How far a router of `routed` can get: what more seed samples than a merge is given would buy it.

The tasks of a suite are told to the router one after another, without any expert, and then the task of every
test sample is asked for.  More seed samples leave fewer for the test.

    python examples/studies/routing_limit.py FILE.json --suites texts8,glyphs8-shared
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mingle import suites
from mingle.io.files import write_json
from mingle.io.provenance import describe
from mingle.merging.merger import Merger
from mingle.methods.routed import Routed
from mingle.runs.orders import FIRST_ORDER_SEED, shuffled
from mingle.runs.settings import for_suite
from mingle.suites import Suite

#: seed samples per class; a merge is given five
_COUNTS = (1, 2, 5, 10)


def main() -> None:
    out, names = asked(__doc__)
    found: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        rows = found[name] = []
        for count in _COUNTS:
            suite = suites.load(name, samples_per_class=count)
            rows.append({"samples per class": count, **measure(suite, shuffled(suite, FIRST_ORDER_SEED))})
            print(name, count, f"{rows[-1]['right']:.1f} % right", flush=True)
    written(out, found)


def asked(about: str) -> tuple[Path, list[str]]:
    """The file to write, in a folder that is there now, and the suites, by the arguments of a study."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--suites", default="texts8", help="names, separated by commas")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return args.out, args.suites.split(",")


def written(out: Path, found: Mapping[str, Any]) -> None:
    """Write what was found of every suite."""
    write_json(out, {"protocol": "strict", "suites": found, **describe(torch.device("cpu"))})


def measure(suite: Suite, names: Sequence[str]) -> dict[str, Any]:
    """The share of test samples whose task is found, by task and in the mean over tasks, in per cent.

    Args:
        suite: the suite.
        names: of its tasks, in the order in which the router learns of them.
    """
    method, seeds, told = told_router(suite, names)
    router = method.router.router
    assert router is not None
    right = {}
    for place, name in enumerate(names):
        seen = method.moments(suite[name], method.router.read)
        likeliest = torch.cat([router.likeliest(moments) for moments in seen])
        right[name] = 100 * float((likeliest == place).double().mean())
    return {"seeds": seeds, "tasks": right, "right": sum(right.values()) / len(right), "told": told}


def told_router(suite: Suite, names: Sequence[str]) -> tuple[Routed, dict[str, int], list[str]]:
    """`routed` without experts, whose router knows tasks, with how many seed samples each, and its choice."""
    merger = Merger(suite.base, Routed.name, suite.task_type, **for_suite(Routed.name, suite, {}))
    method = merger.method
    assert isinstance(method, Routed)
    known, told, seeds = method.known, list[str](), dict[str, int]()
    for name in names:
        samples = suite.seeds(name)
        seeds[name] = len(samples)
        new = known.measured(method.moments_of_all(samples, known.depths))
        told = known.set([*known.features, new])
    return method, seeds, told


if __name__ == "__main__":
    main()
