"""For pytest-benchmark: every backend on small cases, each checked against float64 before it is timed.

``pytest -m slow tests/bench/test_benchmarks.py``; with ``--benchmark-compare`` beside an earlier run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mingle.bench.gated_experts import check, inputs
from mingle.bench.gated_experts.cases import CASES
from mingle.bench.gated_experts.peers import EXPLICIT, PEERS
from mingle.bench.measure import Unavailable, timed

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = """square-sample-fp32 square-batch-fp32 square-token-bf16 image-sample-fp32 image-sample-fp32-bw
    routed-sample-fp32"""


@pytest.mark.parametrize("backend", EXPLICIT)
@pytest.mark.parametrize("name", NAMES.split())
def test_gated_experts(benchmark: Any, name: str, backend: str) -> None:
    case_inputs = inputs.make(CASES[name], DEVICE)
    try:
        run = PEERS[f"mingle {backend}"].build(case_inputs)
    except Unavailable as reason:
        pytest.skip(str(reason))
    errors = check.Oracle(case_inputs).errors(run)
    assert max(errors.values()) <= check.tolerance(case_inputs.x.dtype, DEVICE), errors

    benchmark.group = name
    benchmark(timed, run, DEVICE)  # waits for the device
