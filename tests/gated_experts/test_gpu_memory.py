"""The kernels on a GPU: equal bits every time, every element written, tensors of more than two to the
thirty-one elements.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_cases import BACKENDS, DEVICE, GATES, RAGGED, SHAPES, Shape, distance, make

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("gates", "zeros"), [*((gates, False) for gates in GATES), ("given sample", True)])
@pytest.mark.parametrize("shape", ["ViT-B/16, four images", "ragged"])
def test_fifty_repetitions_give_equal_bits(shape, gates, zeros, dtype, backend):
    problem = make(SHAPES[shape], dtype, gates, zeros=zeros, needs={"x"} if zeros else None)
    first = problem.solve(backend)
    for _ in range(50):
        again = problem.solve(backend)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.fixture
def _poisoned() -> Iterator[None]:
    """Fresh memory holds NaN."""
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # a warning only, as cuBLAS asks for an environment variable: nothing but the filling is wanted here
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_deterministic_debug_mode(mode)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(("zeros", "needs"), [(False, None), (False, set()), (True, {"x"}), (True, set())])
def test_every_element_of_every_result_is_written(gates, masked, zeros, needs, backend):
    assert torch.empty(1, device=DEVICE).isnan().all()
    for shape in (RAGGED, RAGGED._replace(experts=64, rank=3)):
        problem = make(shape, torch.float32, gates, zeros=zeros, masked=masked, needs=needs)
        for name, value in problem.solve(backend).items():
            assert value.isfinite().all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wide", ["x", "y", "H"])
def test_tensors_of_more_than_two_to_the_thirty_one_elements(wide, backend):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip("needs 48 GB of free memory")
    tokens = (1 << 20) + 300
    d_in, d_out, experts, rank = {"x": (2056, 64, 2, 16), "y": (64, 2056, 2, 16), "H": (64, 64, 8, 257)}[wide]
    assert tokens * {"x": d_in, "y": d_out, "H": experts * rank}[wide] > 1 << 31
    small = make(Shape((300,), d_in, d_out, experts, rank), torch.bfloat16, "token", needs={"x"})
    x = torch.randn(tokens, d_in, device=DEVICE, dtype=torch.bfloat16)
    upstream = torch.randn(tokens, d_out, device=DEVICE, dtype=torch.bfloat16)
    got = small._replace(tensors=small.tensors | dict(x=x), upstream=upstream).solve(backend)
    for rows in (slice(0, 300), slice(-300, None)):
        part = small._replace(tensors=small.tensors | dict(x=x[rows]), upstream=upstream[rows])
        for name, value in part.exact().items():
            assert distance(got[name][rows], value) <= 1e-2 * value.norm(), name
    del x, upstream, got
    torch.cuda.empty_cache()
