"""What the compiler makes of the kernels for cards that are not here: read from the assembly, not measured.

    python examples/studies/static_audit.py --out static-audit.json

compiles each large launch of the named cases for each card, as the launchers would launch it, and beside it a
plain product of the same tile.  It takes minutes of processor time; ``--card`` and ``--case`` restrict it.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import inner_loop
import offline
import plain_products
import torch
from inner_loop import Turn
from offline import Launch
from offline_cases import DTYPES, TARGETS, CompileCase, CompileTarget

from mingle.bench import table
from mingle.io.files import write_json
from mingle.io.provenance import describe
from mingle.kernels.tiles import cdiv

FORMAT = "mingle-static-audit"
#: the cases of the kernels' specification, by the sizes of `offline_cases`; all in bf16
CASES = {"a": "large", "b": "middle", "c": "small", "decode": "decode"}
LAUNCHES = ("shrink", "expand", "upstream", "dx")
#: of a large product's rounds, how full they are; of a main loop's other instructions, to a plain product's
FILL, BURDEN = 0.8, 1.5


class Processor(NamedTuple):
    """What the programs on one multiprocessor share."""

    registers: int  # of 32 bits
    shared: int  # bytes, and how much of it each program takes beyond its own
    reserved: int
    warps: int
    programs: int


# NVIDIA's compute capabilities; of a CDNA 3 unit, four vector units of 512 registers for each of 64 lanes.
PROCESSORS = {
    "sm_80": Processor(65_536, 167_936, 1024, 64, 32),
    "sm_86": Processor(65_536, 102_400, 1024, 48, 16),
    "sm_89": Processor(65_536, 102_400, 1024, 48, 24),
    "sm_90": Processor(65_536, 233_472, 1024, 64, 32),
    "sm_100": Processor(65_536, 233_472, 1024, 64, 32),
    "sm_120": Processor(65_536, 102_400, 1024, 48, 24),
    "gfx942": Processor(4 * 512 * 64, 65_536, 0, 32, 32),
}
_TENSOR_MEMORY = 512  # columns of a B200's multiprocessor


class Facts(NamedTuple):
    """What one launch is, as compiled."""

    case: str
    launch: str
    card: str
    tile: tuple[int, int, int]
    warps: int
    stages: int
    described: bool
    blocks: int  # of the output, times the parts of their inner products
    registers: int
    spills: int
    shared: int
    resident: int  # programs on a multiprocessor at once
    rounds: int
    fill: float
    from_shared: bool  # whether the matrix units' operands come through shared memory
    barriers: int  # of a turn of the main loop
    others: int  # instructions of a turn that are no products
    matrix: int
    burden: float  # others per matrix instruction, the worst main loop's, over a plain product's


def resident(processor: Processor, registers: int, warps: int, shared: int, lanes: int, columns: int) -> int:
    """How many programs of so many registers a thread, warps and bytes a multiprocessor holds."""
    of_a_warp = math.ceil(registers * lanes / 256) * 256
    limits = [
        processor.registers // of_a_warp // warps,
        processor.shared // max(1, shared + processor.reserved),
        processor.warps // warps,
        processor.programs,
    ]
    if columns:
        limits.append(_TENSOR_MEMORY // columns)
    return min(limits)


def rounds(blocks: int, places: int) -> tuple[int, float]:
    """In how many rounds `places` work off `blocks`, and which share of these rounds is used."""
    needed = cdiv(blocks, places)
    return needed, blocks / (needed * places)


def blocks_of(launch: Launch) -> int:
    """Blocks of the output, times the parts of their inner products; a program may work through several."""
    given = launch.arguments
    if "programs" not in given:
        return math.prod(launch.grid)
    columns = next(
        (given[size], given[block]) for size, block in (("R", "BLOCK_C"), ("O", "BLOCK_O")) if block in given
    )
    return cdiv(given["N"], given["BLOCK_N"]) * cdiv(*columns)


def audit(case: str, launch_name: str, card: str) -> Facts:
    """Compile one launch and a plain product of its tile; in a process of `offline.compilers`."""
    target, compiled_case = TARGETS[card], CompileCase(launch_name, "bfloat16", card, CASES[case])
    launch = offline.find(compiled_case)
    built, spills, registers = offline.compile_launch(launch, target)
    own = inner_loop.turns(assembly(built, target))
    assert own, "no main loop was found in the assembly"
    worst = max(own, key=lambda turn: turn.burden)
    given, options = launch.arguments, launch.options
    columns = next(given[name] for name in ("BLOCK_C", "BLOCK_O", "BLOCK_R") if name in given)
    block = given["BLOCK_N"], columns, given["BLOCK_K"]
    plain = _plain(card, block, tuple(options.items()), "x_desc" in given)
    cuda, tensor_columns = target.gpu.backend == "cuda", getattr(built.metadata, "tmem_size", 0) or 0
    together = resident(
        PROCESSORS[card],
        registers,
        options["num_warps"],
        built.metadata.shared,
        32 if cuda else 64,
        tensor_columns,
    )
    persistent, blocks = "programs" in given, blocks_of(launch)
    needed, fill = rounds(blocks, target.chip.multiprocessors * (1 if persistent else together))
    return Facts(
        case, launch_name, card,
        block, options["num_warps"], options["num_stages"],
        persistent, blocks, registers, spills, built.metadata.shared, together, needed, fill,
        not any(turn.past_shared for turn in own),
        worst.barriers, worst.others, worst.matrix, worst.burden / plain.burden,
    )  # fmt: skip


@cache
def _plain(
    card: str, block: tuple[int, int, int], options: tuple[tuple[str, int], ...], described: bool
) -> Turn:
    """A turn of the plain product."""
    launch = plain_products.beside(block, dict(options), described, DTYPES["bfloat16"])
    compiled, *_ = offline.compile_launch(launch, TARGETS[card])
    (turn,) = inner_loop.turns(assembly(compiled, TARGETS[card]))
    return turn


def assembly(compiled: Any, target: CompileTarget) -> str:
    if target.gpu.backend != "cuda":
        text = str(compiled.asm["amdgcn"])
        return text[text.index(f"\n{compiled.metadata.name}:") : text.index(".Lfunc_end0")]
    from triton.backends.nvidia.compiler import get_ptxas

    tool = Path(get_ptxas(target.gpu.arch).path).parent / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def faults(facts: Facts) -> list[str]:
    """Which limits a launch exceeds, in words."""
    found = []
    if facts.spills:
        found.append(f"{facts.spills} bytes spilled")
    if facts.shared > TARGETS[facts.card].chip.shared_memory:
        found.append(f"{facts.shared} bytes of shared memory")
    if facts.case == "a" and facts.fill < FILL:
        found.append(f"{facts.rounds} rounds are {facts.fill:.0%} full")
    if facts.case in ("b", "c") and facts.rounds > 1:
        found.append(f"{facts.rounds} rounds")
    if facts.burden > BURDEN:
        found.append(f"{facts.burden:.2f} times a plain product's other instructions")
    return found


def all_facts(executor: Executor, cards: Iterable[str], cases: Iterable[str]) -> list[Facts]:
    asked = [(case, launch, card) for card in cards for case in cases for launch in LAUNCHES]
    return list(executor.map(audit, *zip(*asked, strict=True), chunksize=len(LAUNCHES)))


def results(found: Iterable[Facts]) -> dict[str, Any]:
    rows = [facts._asdict() | {"faults": faults(facts)} for facts in found]
    return (
        {"format": FORMAT}
        | describe(torch.device("cpu"))
        | {"limits": {"fill": FILL, "burden": BURDEN}, "rows": rows}
    )


def rendered(rows: Iterable[Mapping[str, Any]]) -> str:
    """A card's table of the documentation, in Markdown."""
    lines = [
        "| case | launch | block | registers | shared | resident | rounds | full | others | beyond |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        block = "×".join(map(str, row["tile"])) + (", described" if row["described"] else "")
        of_memory = row["registers"], f"{row['shared'] / 1024:.0f} KB", row["resident"]
        of_time = row["rounds"], f"{row['fill']:.0%}", f"{row['burden']:.2f}×"
        beyond = "; ".join(row["faults"]) or "–"
        lines.append(_line((row["case"], row["launch"], block, *of_memory, *of_time, beyond)))
    return "\n".join(lines)


def exceeding(rows: Iterable[Mapping[str, Any]]) -> str:
    """What exceeds a limit, in Markdown."""
    lines = ["| card | case | launch | beyond |", "|---|---|---|---|"]
    for row in rows:
        if row["faults"]:
            lines.append(_line((row["card"], row["case"], row["launch"], "; ".join(row["faults"]))))
    return "\n".join(lines)


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What the compiler makes of the kernels, card by card.")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="every fact, as JSON")
    parser.add_argument("--card", action="append", choices=TARGETS, default=[], help="by default all")
    parser.add_argument("--case", action="append", choices=CASES, default=[], help="by default all")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(arguments)
    cards = args.card or [card for card in TARGETS if offline.missing(card) is None]
    with tempfile.TemporaryDirectory() as folder, offline.compilers(Path(folder), args.processes) as executor:
        found = results(all_facts(executor, cards, args.case or CASES))
    if args.out:
        write_json(args.out, found)
    for card in cards:
        table.write_lines(["", card, rendered(row for row in found["rows"] if row["card"] == card)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
