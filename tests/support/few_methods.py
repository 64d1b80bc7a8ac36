"""Tests of every method, of which the plain run has one of each way to merge."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

#: a model per task; one formula per tensor, and one that decomposes matrices; learnt coefficients; gated
#: experts, and experts behind a router
UNLIKE = ("individual", "average", "opcm", "adamerging", "mingle", "routed")


def each_method(names: Iterable[str]) -> pytest.MarkDecorator:
    """The test runs for each of the methods, slow where another in the plain run merges in the same way.

    With `test_architectures`, which has all of them, every method is in the plain run.
    """
    return pytest.mark.parametrize(
        "method", [pytest.param(name, marks=[] if name in UNLIKE else pytest.mark.slow) for name in names]
    )
