"""What one turn of a kernel's main loop issues, read from its assembly: NVIDIA's SASS or AMD's.

The assembly is cut into basic blocks.  Main loops are the innermost loops that hold matrix instructions; one
turn of such a loop is the way through it with the most of these and, among such ways, with the fewest other
instructions: what a pipeline runs while it is full, without epilogues and without waiting.  A loop with no
more than half of the products of another is no main loop: an epilogue with a product of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_MATRIX = re.compile(r"(HMMA|HGMMA|QGMMA|UTCHMMA|UTCQMMA|v_mfma)")
_BARRIER = re.compile(r"(BAR\.|s_barrier)")
#: operands that come from memory into registers, or from registers into an asynchronous product
_PAST_SHARED = re.compile(r"(LDG\.|global_load|buffer_load|HGMMA.*\.REGISTERS)")
_JUMP = re.compile(r"(BRA|s_branch|s_cbranch)")
_END = re.compile(r"(EXIT|s_endpgm)")


class Turn(NamedTuple):
    """Instructions of one turn."""

    matrix: int
    others: int
    barriers: int
    past_shared: int  # operands of products that do not come from shared memory

    @property
    def burden(self) -> float:
        """Other instructions per matrix instruction."""
        return self.others / self.matrix


class _Instruction(NamedTuple):
    name: str
    target: str | None  # of a jump
    conditional: bool


class _Block(NamedTuple):
    instructions: list[_Instruction]
    following: set[int]


def turns(assembly: str) -> list[Turn]:
    """One turn of each main loop, in the order of their headers."""
    blocks = _blocks(assembly)
    dominators = _dominators(blocks)
    loops: dict[int, tuple[set[int], set[int]]] = {}  # header: its blocks, and those that jump back to it
    for source, block in enumerate(blocks):
        for header in block.following & dominators[source]:
            inside, latches = loops.setdefault(header, ({header}, set()))
            inside |= _reaching(blocks, source, header)
            latches.add(source)
    busy = {header: loop for header, loop in loops.items() if any(_turn(blocks[b]).matrix for b in loop[0])}
    innermost = [
        header
        for header, (inside, _) in busy.items()
        if not any(other != header and other in inside for other in busy)
    ]
    found = [_shortest(blocks, dominators, header, *busy[header]) for header in sorted(innermost)]
    most = max((turn.matrix for turn in found), default=0)
    return [turn for turn in found if 2 * turn.matrix > most]


def _instructions(assembly: str) -> Iterator[_Instruction | str]:
    """Instructions, and labels as strings."""
    for line in assembly.splitlines():
        text = re.sub(r"/\*.*?\*/|;.*$|//.*$", "", line).strip()
        if label := re.fullmatch(r"([.\w$]+):", text):
            yield label[1]
            continue
        word = re.match(r"(@!?\w+\s+)?([A-Za-z][\w.]*)(.*)", text)
        if word is None or not line[:1].isspace():
            continue
        predicate, name, rest = word.groups()
        if name.startswith("HGMMA") and re.match(r"\s*R\d+,\s*R\d+,\s*gdesc", rest):
            name += ".REGISTERS"
        target = None
        if _JUMP.match(name):
            place = re.search(r"\.?L\w+", rest)
            target = place[0] if place else None
        # a jump may also name its condition among its operands
        named = re.match(r"\s*!?U?P\w+,", rest) is not None or "cbranch" in name or ".DIV" in name
        yield _Instruction(name, target, predicate is not None or named)


def _blocks(assembly: str) -> list[_Block]:
    """The basic blocks of the first function; nothing is jumped to but labels."""
    blocks = [_Block([], set())]
    places: dict[str, int] = {}
    for item in _instructions(assembly):
        if isinstance(item, str):
            if blocks[-1].instructions:
                blocks.append(_Block([], set()))
            places[item] = len(blocks) - 1
            continue
        blocks[-1].instructions.append(item)
        if item.target is not None or _END.match(item.name):
            blocks.append(_Block([], set()))
    for index, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        if last is not None and last.target in places:
            block.following.add(places[last.target])
        leaves = last is not None and (last.target is not None or _END.match(last.name) is not None)
        if index + 1 < len(blocks) and (not leaves or (last is not None and last.conditional)):
            block.following.add(index + 1)
    return blocks


def _dominators(blocks: list[_Block]) -> list[set[int]]:
    """For every block, those that every way to it passes; empty for one that nothing leads to."""
    before: list[set[int]] = [set() for _ in blocks]
    for index, block in enumerate(blocks):
        for after in block.following:
            before[after].add(index)
    everything = set(range(len(blocks)))
    found = [{0}] + [everything] * (len(blocks) - 1)
    changed = True
    while changed:
        changed = False
        for index in range(1, len(blocks)):
            known = [found[earlier] for earlier in before[index]]
            new = set.intersection(*known) | {index} if known else set()
            if new != found[index]:
                found[index], changed = new, True
    return found


def _reaching(blocks: list[_Block], source: int, header: int) -> set[int]:
    """The blocks from which `source` is reached without passing `header`."""
    found, waiting = {header, source}, [source]
    while waiting:
        one = waiting.pop()
        if one == header:
            continue
        for index, block in enumerate(blocks):
            if one in block.following and index not in found:
                found.add(index)
                waiting.append(index)
    return found


def _shortest(
    blocks: list[_Block], dominators: list[set[int]], header: int, inside: set[int], latches: set[int]
) -> Turn:
    known: dict[int, Turn] = {}

    def better(one: Turn | None, other: Turn) -> Turn:
        return other if one is None or (other.matrix, -other.others) > (one.matrix, -one.others) else one

    def arrive(index: int, turn: Turn) -> None:
        whole = Turn(*map(sum, zip(turn, _turn(blocks[index]), strict=True)))
        if index in known and better(known[index], whole) is known[index]:
            return
        known[index] = whole
        for after in blocks[index].following & inside:
            if after not in dominators[index]:  # not back
                arrive(after, whole)

    arrive(header, Turn(0, 0, 0, 0))
    best: Turn | None = None
    for latch in latches & known.keys():
        best = better(best, known[latch])
    assert best is not None
    return best


def _turn(block: _Block) -> Turn:
    names = [instruction.name for instruction in block.instructions]
    matrix, barriers, past = (
        sum(pattern.match(name) is not None for name in names)
        for pattern in (_MATRIX, _BARRIER, _PAST_SHARED)
    )
    return Turn(matrix, len(names) - matrix, barriers, past)
