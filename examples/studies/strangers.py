"""How well `routed` tells samples of none of its tasks, which go to the base model.

The router is told of one half of a suite's tasks, without any expert; those of the other half are strangers
to it.  Then the halves change places.  Every sample has a score: how much stranger it is to its likeliest
task than the seed samples of that task are to it, in their standard deviations.

    python examples/studies/strangers.py FILE.json --suites glyphs8,texts8
"""

from __future__ import annotations

from typing import Any

import torch
from routing_limit import asked, told_router, written
from torch import Tensor

from mingle import suites
from mingle.methods.routed import Routed
from mingle.methods.router import strangeness
from mingle.methods.router_choice import joined
from mingle.runs.orders import FIRST_ORDER_SEED, shuffled
from mingle.suites import Suite


def main() -> None:
    out, names = asked(__doc__)
    found = {}
    for name in names:
        found[name] = measure(suites.load(name))
        print(name, found[name], flush=True)
    written(out, found)


def measure(suite: Suite) -> dict[str, Any]:
    """How well strangers are told from samples of known tasks, and what share of each goes to the base.

    The area under the ROC curve and the shares, in per cent, are means over the halves.
    """
    order = shuffled(suite, FIRST_ORDER_SEED)
    halves = order[::2], order[1::2]
    found: dict[str, list[float]] = {"auroc": [], "strangers to the base": [], "known to the base": []}
    for known, strange in (halves, halves[::-1]):
        method, _, _ = told_router(suite, known)
        scores = [torch.cat([scored(method, suite, name) for name in names]) for names in (strange, known)]
        found["auroc"].append(100 * auroc(*scores))
        limit = method.known.options.abstain
        assert limit is not None
        for key, each in zip(("strangers to the base", "known to the base"), scores, strict=True):
            found[key].append(100 * float((each > limit).double().mean()))
    return {key: sum(values) / len(values) for key, values in found.items()}


def scored(method: Routed, suite: Suite, name: str) -> Tensor:
    """The scores of a task's test samples, [n]."""
    known, router = method.known, method.router.router
    assert router is not None
    candidate = known.candidates.index(method.router.read)
    tasks = [task[candidate] for task in known.features]
    scores = []
    for moments in method.moments(suite[name], method.router.read):
        features, likeliest = joined(moments), router.likeliest(moments)
        means, variances = (
            torch.stack([getattr(task.statistics, key) for task in tasks])[likeliest]
            for key in ("mean", "variances")
        )
        usual, deviations = torch.stack([task.strange for task in tasks])[likeliest].unbind(1)
        scores.append((strangeness(features, means, variances).log() - usual) / deviations)
    return torch.cat(scores).double()


def auroc(high: Tensor, low: Tensor) -> float:
    """How often a score of the first kind is above one of the second; equal ones count half."""
    ordered = low.sort().values
    below, up_to = (torch.searchsorted(ordered, high, right=right) for right in (False, True))
    return float((below + up_to).double().mean() / (2 * len(low)))


if __name__ == "__main__":
    main()
