"""mingle: merge fine-tuned models one after another, fast and without forgetting.

A whole continual merge, and a single frozen layer that takes on gated low-rank experts:

    merger = mingle.Merger(base_model, method="mingle")
    layer = mingle.MingleLinear.from_linear(linear)
"""

from mingle import functional, linalg
from mingle.adaptation.projector import RelaxedProjector
from mingle.merging.loading import load
from mingle.merging.merger import Merger
from mingle.nn.inject import inject, restore
from mingle.nn.linear import MingleLinear, count_parameters
from mingle.nn.low_rank_expert import LowRankExpert
from mingle.nn.peft import add_adapter, read_adapter
from mingle.nn.sharing import share_inputs
from mingle.version import __version__

__all__ = [
    "LowRankExpert",
    "Merger",
    "MingleLinear",
    "RelaxedProjector",
    "__version__",
    "add_adapter",
    "count_parameters",
    "functional",
    "inject",
    "linalg",
    "load",
    "read_adapter",
    "restore",
    "share_inputs",
]
