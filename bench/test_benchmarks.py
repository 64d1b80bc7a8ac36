"""Entry points for pytest-benchmark: ``pytest bench/test_benchmarks.py``; compare two runs with its
``--benchmark-compare``.

Small cases of every backend, each checked against float64 before it is timed.
"""

from __future__ import annotations

import pytest
import torch

from mingle.bench import check, inputs, registry
from mingle.bench.peers import PEERS, Unavailable
from mingle.bench.peers.ours import EXPLICIT

pytest.importorskip("pytest_benchmark")

CASES = (
    "square-sample-fp32",
    "square-batch-fp32",
    "square-token-bf16",
    "image-sample-fp32",
    "image-sample-fp32-bw",
    "routed-sample-fp32",
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("backend", EXPLICIT)
@pytest.mark.parametrize("name", CASES)
def test_gated_experts(benchmark, name, backend):
    case_inputs = inputs.make(registry.case(name), DEVICE)
    try:
        run = PEERS[f"mingle {backend}"].build(case_inputs)
    except Unavailable as reason:
        pytest.skip(str(reason))
    errors = check.Oracle(case_inputs).errors(run)
    assert max(errors.values()) <= check.tolerance(case_inputs.x.dtype, DEVICE), errors

    def finished() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = name
    benchmark(finished)
