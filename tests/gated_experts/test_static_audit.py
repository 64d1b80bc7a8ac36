"""The audit of the compiled kernels: what it counts, its limits, and that the committed one keeps them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

import inner_loop
import offline
import static_audit
from inner_loop import Turn
from offline_cases import TARGETS
from static_audit import Facts

pytestmark = pytest.mark.compile

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "bench/results/static-audit.json"
PAGE = ROOT / "docs/explanations/performance.md"

# Of NVIDIA: a loop with a block that some turns skip, a wait that stands behind the end and spins, and an
# epilogue with a product of its own.
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0020*/              @!P0 BRA `(.L_x_5) ;
.L_x_2:
        /*0030*/                   LDSM.16.M88.4 R12, [R44] ;
        /*0040*/              @!P1 BRA `(.L_x_3) ;
        /*0050*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0060*/                   IADD3 R1, R1, 0x2, RZ ;
.L_x_3:
        /*0070*/                   HMMA.16816.F32.BF16 R24, R12.reuse, R20, R24 ;
        /*0080*/                   HMMA.16816.F32.BF16 R28, R12, R8, R28 ;
        /*0090*/                   HMMA.16816.F32.BF16 R28, R12, R8, R28 ;
        /*00a0*/               @P2 BRA `(.L_x_1) ;
.L_x_4:
        /*00b0*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*00c0*/                   HMMA.16816.F32.BF16 R24, R12, R20, R24 ;
        /*00d0*/                   BRA.U UP0, `(.L_x_4) ;
        /*00e0*/                   EXIT ;
.L_x_5:
        /*00f0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0100*/              @!P0 BRA `(.L_x_5) ;
        /*0110*/                   BRA `(.L_x_2) ;
"""
AMD = """
kernel:                                 ; @kernel
; %bb.0:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\ts_barrier
\tglobal_load_dwordx4 v[0:3], v4, s[2:3]
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
\ts_add_i32 s4, s4, 1
\ts_cbranch_scc1 .LBB0_1
; %bb.2:
\ts_endpgm
"""
REGISTERS = """
.L_x_0:
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("assembly", "turn"),
    [
        (SASS, Turn(matrix=3, others=5, barriers=1, past_shared=0)),
        (AMD, Turn(matrix=1, others=4, barriers=1, past_shared=1)),
        (REGISTERS, Turn(matrix=2, others=1, barriers=0, past_shared=1)),
    ],
    ids=["NVIDIA", "AMD", "operands in registers"],
)
def test_a_turn_of_the_main_loop_is_counted_by_its_shortest_way(assembly: str, turn: Turn) -> None:
    assert inner_loop.turns(assembly) == [turn]


def test_a_loop_without_products_is_no_main_loop() -> None:
    assert inner_loop.turns(SASS.replace("HMMA", "FFMA")) == []


@pytest.mark.parametrize(
    ("card", "registers", "warps", "shared", "lanes", "columns", "programs"),
    [
        ("sm_90", 168, 8, 214_000, 32, 0, 1),  # shared memory
        ("sm_90", 96, 4, 65_536, 32, 0, 3),
        ("sm_90", 255, 8, 1_000, 32, 0, 1),  # registers
        ("sm_90", 16, 4, 0, 32, 0, 16),  # warps
        ("sm_86", 16, 4, 0, 32, 0, 12),
        ("sm_100", 64, 4, 1_000, 32, 256, 2),  # tensor memory
        ("gfx942", 256, 4, 32_768, 64, 0, 2),
    ],
)
def test_programs_on_a_processor(
    card: str, registers: int, warps: int, shared: int, lanes: int, columns: int, programs: int
) -> None:
    processor = static_audit.PROCESSORS[card]
    assert static_audit.resident(processor, registers, warps, shared, lanes, columns) == programs


def test_rounds_and_how_full_they_are() -> None:
    assert static_audit.rounds(168, 132) == (2, pytest.approx(168 / 264))
    assert static_audit.rounds(132, 132) == (1, 1.0)


FINE = Facts(
    "a", "expand", "sm_90", (128, 256, 64), 8, 3, True, 591, 168, 0, 214_000, 1, 5, 0.9, True, 3, 90, 4, 1.0
)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, []),
        ({"spills": 8}, ["8 bytes spilled"]),
        ({"shared": 300_000}, ["300000 bytes of shared memory"]),
        ({"fill": 0.79}, ["5 rounds are 79% full"]),
        ({"case": "b", "rounds": 2}, ["2 rounds"]),
        ({"case": "c", "rounds": 2, "fill": 0.5}, ["2 rounds"]),
        ({"case": "decode", "rounds": 2, "fill": 0.5}, []),
        ({"burden": 1.6}, ["1.60 times a plain product's other instructions"]),
    ],
    ids=str,
)
def test_what_exceeds_a_limit_is_said(changed: dict[str, Any], said: list[str]) -> None:
    assert static_audit.faults(FINE._replace(**changed)) == said


def committed() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(COMMITTED.read_text())["rows"]
    return found


def test_the_committed_audit_is_whole_and_judged_by_the_limits_of_today() -> None:
    rows = committed()
    assert [(row["card"], row["case"], row["launch"]) for row in rows] == [
        (card, case, launch)
        for card in TARGETS
        for case in static_audit.CASES
        for launch in static_audit.LAUNCHES
    ]
    for row in rows:
        assert row["faults"] == static_audit.faults(Facts(**{name: row[name] for name in Facts._fields}))


def test_the_tables_of_the_documentation_are_those_of_the_committed_audit() -> None:
    rows, page = committed(), PAGE.read_text()
    assert static_audit.rendered(row for row in rows if row["card"] == "sm_90") in page
    assert static_audit.exceeding(rows) in page


def test_an_h100_keeps_every_limit() -> None:
    assert [row["faults"] for row in committed() if row["card"] == "sm_90"] == [[]] * 16


@pytest.fixture(scope="module")
def compilers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    with offline.compilers(tmp_path_factory.mktemp("triton")) as executor:
        yield executor


def audited(executor: ProcessPoolExecutor, *asked: tuple[str, str, str]) -> list[Facts]:
    for _, _, card in asked:
        if reason := offline.missing(card):
            pytest.skip(reason)
    return list(executor.map(static_audit.audit, *zip(*asked, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("case", static_audit.CASES)
def test_every_launch_of_an_h100_keeps_the_limits(case: str, compilers: ProcessPoolExecutor) -> None:
    for facts in audited(compilers, *((case, launch, "sm_90") for launch in static_audit.LAUNCHES)):
        assert static_audit.faults(facts) == [], facts
        assert facts.from_shared
