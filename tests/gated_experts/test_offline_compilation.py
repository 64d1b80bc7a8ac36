"""Every Triton kernel for every kind of GPU, compiled without one: registers, shared memory, instructions,
pipelining.

Every kernel for an H100, the products for an MI300X and one kernel for each card are in every run, the other
builds in the slow tests; all together take four minutes of processor time.  MINGLE_TEST_EVERY_BUILD=1 builds
all variants, dtypes and sizes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

import offline
from offline import Build
from offline_cases import DTYPES, LAYERS, PROJECTOR, TARGETS, VARIANTS, CompileCase

from mingle.kernels import tiles

pytestmark = pytest.mark.compile

# Default selection, on every target: sizes and dtypes, and the variants built for them.  Registers run out
# with the largest tiles, so these meet every variant that needs many; each of the other variants and tiles is
# built at least once.
SELECTION = [
    ("large", ["bfloat16"], ["shrink", "expand", "upstream", "dx", "fold"]),
    (
        "large",
        ["bfloat16"],
        ["dx-wide-gates", "list", "shrink-skip", "expand-skip", "upstream-skip", "dx-skip"],
    ),
    (
        "large",
        ["bfloat16"],
        ["keys", "list-sorted", "shrink-sorted", "expand-sorted", "dx-sorted"],
    ),
    (
        "large",
        ["bfloat16"],
        ["gates-token", "gates-wide", "pool", "gates-pooled", "pool-masked", "gates-masked"],
    ),
    ("large", ["float16"], ["gates-wide"]),
    ("large", ["tf32"], ["shrink", "expand-skip", "upstream", "dx"]),
    ("large", ["float32"], ["shrink", "upstream", "dx", "fold", "gates-token"]),
    ("large", ["float16"], ["dx"]),
    ("middle", ["bfloat16"], ["shrink", "expand", "dx"]),
    ("middle", ["tf32"], ["dx"]),
    ("small", ["float16"], ["shrink", "dx-given", "dx-masked", "fold"]),
    ("small", ["bfloat16", "float32", "tf32"], ["dx"]),
    ("decode", ["bfloat16"], ["gates-few", "shrink", "gate-parts", "expand", "add-parts"]),
    ("narrow", ["bfloat16"], ["shrink", "expand"]),
    (
        "ragged",
        ["bfloat16"],
        ["shrink", "shrink-skip", "expand-skip", "upstream", "dx-masked", "fold", "pool"],
    ),
    ("uneven", ["bfloat16", "tf32"], ["shrink", "expand", "upstream", "dx"]),
    ("broad", ["bfloat16", "tf32"], ["shrink", "upstream"]),
    ("odd", ["bfloat16"], ["shrink", "expand", "upstream", "dx", "dx-skip"]),
    ("single", ["bfloat16"], ["shrink", "expand-skip", "upstream", "fold", "gates-few"]),
    ("large", ["float32"], list(PROJECTOR)),
    ("ragged", ["float32"], list(PROJECTOR)),
]


def default_cases() -> Iterator[CompileCase]:
    for target, (size, arithmetics, variants) in itertools.product(TARGETS, SELECTION):
        for variant, arithmetic in itertools.product(variants, arithmetics):
            yield CompileCase(variant, arithmetic, target, size)


def every_case() -> Iterator[CompileCase]:
    for variant, arithmetic, target, size in itertools.product(VARIANTS, DTYPES, TARGETS, LAYERS):
        if "wide" not in variant or DTYPES[arithmetic].itemsize == 2:
            yield CompileCase(variant, arithmetic, target, size)
    for variant, target, size in itertools.product(PROJECTOR, TARGETS, LAYERS):
        yield CompileCase(variant, "float32", target, size)


CASES = list(every_case() if os.environ.get("MINGLE_TEST_EVERY_BUILD") == "1" else default_cases())
PLAIN = ("shrink", "expand", "upstream", "dx", "fold")
IN_EVERY_RUN = {
    *{case.variant: case for case in reversed(CASES) if case.target == "sm_90"}.values(),  # its first build
    *(
        case
        for case in CASES
        if (case.target, case.size, case.arithmetic) == ("gfx942", "large", "bfloat16")
        and case.variant in PLAIN
    ),
    *(case for case in CASES if (case.variant, case.arithmetic, case.size) == ("shrink", "float32", "large")),
}
PRODUCTS = [case for case in CASES if isinstance(VARIANTS.get(case.variant, ("", ""))[1], int)]
MATRIX = [case for case in PRODUCTS if case.size == "large" and case.arithmetic != "float32"]
PIPELINED = [
    case
    for case in PRODUCTS
    if case.size in ("large", "middle", "small") and TARGETS[case.target].gpu.backend == "cuda"
]


def each(cases: list[CompileCase]) -> pytest.MarkDecorator:
    """The test runs for each of `cases`, slow ones on request."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, marks=() if case in IN_EVERY_RUN else pytest.mark.slow, id=str(case))
            for case in cases
        ],
    )


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    with offline.compilers(tmp_path_factory.mktemp("triton")) as executor:
        yield executor


@pytest.fixture(scope="module")
def builds(request: pytest.FixtureRequest, pool: ProcessPoolExecutor) -> Callable[[CompileCase], Build]:
    """The build of a case.  All cases of the selected tests are started at once, equal ones together."""
    missing = {target: offline.missing(target) for target in TARGETS}
    parameters = [
        getattr(item, "callspec", None) for item in request.session.items if item.path == request.path
    ]
    cases = list(
        dict.fromkeys(
            parameter.params["case"] for parameter in parameters if parameter and "case" in parameter.params
        )
    )
    cases = [case for case in cases if missing[case.target] is None]
    started: dict[str, Future[Build]] = {}
    keys = dict(zip(cases, pool.map(offline.key, cases, chunksize=16), strict=True))
    for case, key in keys.items():
        if key not in started:
            started[key] = pool.submit(offline.build, case)

    def result(case: CompileCase) -> Build:
        if missing[case.target] is not None:
            pytest.skip(missing[case.target])
        return started[keys[case]].result()

    return result


def test_every_variant_is_built_for_every_target() -> None:
    assert {(case.variant, case.target) for case in CASES} == set(
        itertools.product([*VARIANTS, *PROJECTOR], TARGETS)
    )
    assert {(case.arithmetic, case.target, case.size) for case in CASES} >= set(
        itertools.product(DTYPES, TARGETS, ["large"])
    )


@each(CASES)
def test_no_register_is_spilled_and_shared_memory_suffices(
    case: CompileCase, builds: Callable[[CompileCase], Build]
) -> None:
    built = builds(case)
    # On a B200 ptxas gives some kernels fewer registers than there are, and spills two of a thread's numbers.
    assert built.spills <= (8 if case.target == "sm_100" else 0), (
        f"{built.spills} spilled, {built.registers} registers"
    )
    assert built.shared <= TARGETS[case.target].chip.shared_memory


@each(MATRIX)
def test_large_products_use_the_fastest_matrix_instruction(
    case: CompileCase, builds: Callable[[CompileCase], Build]
) -> None:
    assert builds(case).instructions[TARGETS[case.target].fastest] > 0


@each([case for case in CASES if case.arithmetic == "float32"])
def test_ieee_products_use_no_instruction_of_lower_precision(
    case: CompileCase, builds: Callable[[CompileCase], Build]
) -> None:
    used = builds(case).instructions
    assert not any(used[name] for name in TARGETS[case.target].inexact)


@each(PIPELINED)
def test_the_next_operands_are_copied_while_a_product_runs(
    case: CompileCase, builds: Callable[[CompileCase], Build]
) -> None:
    loops = builds(case).loops
    assert loops and all(loops)


@pytest.mark.parametrize(
    ("target", "tile"),
    [("sm_80", tiles.Tile(128, 128, 64, 4, 3)), ("gfx942", tiles.Tile(128, 256, 32, 2, 2))],
    ids=["sm_80", "gfx942"],
)
def test_a_tile_that_is_too_large_is_seen(target: str, tile: tiles.Tile, pool: ProcessPoolExecutor) -> None:
    # Without this, a report that no longer says what it used to say would pass for a kernel without spills.
    if reason := offline.missing(target):
        pytest.skip(reason)
    built = pool.submit(offline.build, CompileCase("expand", "bfloat16", target, "large"), tile).result()
    assert built.spills > 0
