"""A merging method of your own: a pure function of weights, and everything else comes with it."""

from dataclasses import dataclass

import mingle
from mingle import suites
from mingle.methods import METHODS, Arrival
from mingle.methods.base import Tensors, WeightMethod


@dataclass(frozen=True)
class FadingOptions:
    """keep: the share of what was merged before that survives each arrival."""

    keep: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep={self.keep}: expected a value in [0, 1]")


class Fading(WeightMethod):
    """θ_t = κ θ_{t−1} + (1 − κ) θ_t: the newest model counts most."""

    name = "fading"
    Options = FadingOptions

    def update(self, arrival: Arrival) -> tuple[Tensors, Tensors]:
        keep = self.options.keep if arrival.index else 0.0  # the base takes no part
        merged = {
            name: keep * tensor + (1 - keep) * arrival.tuned[name] for name, tensor in self.merged.items()
        }
        return merged, {}  # nothing else is kept between arrivals


METHODS[Fading.name] = Fading

suite = suites.load("glyphs4")
for method, options in (("average", {}), ("fading", {"keep": 0.5}), ("fading", {"keep": 0.8})):
    merger = mingle.Merger(suite.base, method=method, **options)
    for task in list(suite)[:3]:
        merger.add(task, suite.expert(task))
        merger.evaluate(suite)
    result = merger.result()
    print(f"{method} {options}: ACC {result.acc:.1f} %, BWT {result.bwt:+.1f} points")
