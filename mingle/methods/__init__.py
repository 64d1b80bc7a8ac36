"""The merging methods, by the names under which they are published and reported.

A method takes in one fine-tuned model after another through `MergeMethod.add` and leaves the merged weights
in the model.  Methods that only compute new weights from old ones are pure functions behind `WeightMethod`;
those that add gated experts are `GatedMethod`s.
"""

from __future__ import annotations

from mingle.methods.adamerging import AdaMerging
from mingle.methods.average import Average
from mingle.methods.base import Arrival, MergeMethod, StepReport
from mingle.methods.consensus_ta import ConsensusTa
from mingle.methods.iso_c import IsoC
from mingle.methods.made_it import MadeIt
from mingle.methods.magmax import MagMax
from mingle.methods.mass import Mass
from mingle.methods.mingle import Mingle, MingleLight
from mingle.methods.mingle_routed import MingleRouted
from mingle.methods.mingle_seq import MingleSeq
from mingle.methods.nufilt import Nufilt
from mingle.methods.opcm import Opcm
from mingle.methods.published import published
from mingle.methods.references import Individual, PreTrained
from mingle.methods.routed import Routed
from mingle.methods.task_arithmetic import TaskArithmetic
from mingle.methods.ties import Ties
from mingle.methods.tsv_m import TsvM
from mingle.methods.wemoe import Wemoe
from mingle.methods.wudi import Wudi
from mingle.options import nearest, shown

METHODS: dict[str, type[MergeMethod]] = {
    method.name: method
    for method in (
        PreTrained,
        Individual,
        Average,
        TaskArithmetic,
        Ties,
        MagMax,
        ConsensusTa,
        Opcm,
        TsvM,
        IsoC,
        Wudi,
        AdaMerging,
        Wemoe,
        Nufilt,
        Mingle,
        MingleLight,
        MingleRouted,
        MingleSeq,
        MadeIt,
        Mass,
        Routed,
    )
}

#: the method of a merge whose file names none: the first on the suites of both kinds of model
DEFAULT = Routed.name


def get(name: str) -> type[MergeMethod]:
    """The method of that name.

    Raises:
        ValueError: an unknown name; the message names the nearest known one.
    """
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise ValueError(f"unknown method {shown(name)}{nearest(name, METHODS)}; known are {known}")
    return METHODS[name]


def without_samples() -> list[str]:
    """The names of the methods that merge without any samples."""
    return [
        name
        for name, method in METHODS.items()
        if not method.needs_seeds and method not in (PreTrained, Individual)
    ]


__all__ = [
    "DEFAULT",
    "METHODS",
    "Arrival",
    "MergeMethod",
    "StepReport",
    "get",
    "published",
    "without_samples",
]
