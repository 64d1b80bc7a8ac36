"""Results as text for a terminal or a log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mingle.bench import machine
from mingle.bench.peers import OURS, Peer
from mingle.bench.registry import Case

_WIDTH = 120  # of output that no terminal limits
_COLUMNS = ("median", "p20 … p80", "× ours", "of floor", "peak MB", "error")


def write(results: Mapping[str, Any], regressions: Sequence[str] | None = None) -> None:
    """All cases in one table, then who could not run, how well we chose, the targets, and what became slower."""
    console = _console()
    _notes(console, results)
    console.print(_table(results, plain=not console.is_terminal))
    for target in results["targets"]:
        mark = "[green]met[/]" if target["met"] else "[red]missed[/]"
        asked, found = target["ratio"], target["found"]
        text = (
            f"≥ {asked:.4g}×, found {found:.2f}×"
            if asked >= 1
            else f"ours ≤ {1 / asked:.4g}× its time, found {1 / found:.2f}×"
        )
        console.print(
            f"target {target['case']}, {target['peer']} against {target['ours']}: {text}: {mark}",
            highlight=False,
        )
    if regressions is not None:
        for line in regressions or ["no regression beyond 10 %"]:
            console.print(escape(line), style="red" if regressions else "green", highlight=False)


def write_names(
    selections: Mapping[str, Iterable[str]], cases: Mapping[str, Case], peers: Mapping[str, Peer]
) -> None:
    console = _console()
    for name, chosen in selections.items():
        console.print(f"--{name}: {' '.join(chosen)}\n", highlight=False, soft_wrap=True)
    for case in cases.values():
        console.print(f"--case {case.name:32}{shape(case)}", highlight=False)
    for peer in peers.values():
        console.print(f'--peer "{peer.name}": {escape(peer.note)}', highlight=False, soft_wrap=True)


def write_tiles(found: Iterable[tuple[str, str, Sequence[int]]]) -> None:
    """Each line as it is found: case, kernel, tile."""
    console = _console()
    for case, kernel, (rows, columns, depth, warps, stages) in found:
        console.print(
            f"{case:32}{kernel:10}{rows} × {columns} × {depth}, {warps} warps, {stages} stages",
            highlight=False,
        )


def write_breakdown(results: Mapping[str, Any]) -> None:
    """Per case its parts by form, the whole layers, and the limits."""
    console = _console()
    out = Table(
        title=_machine(results),
        title_justify="left",
        box=box.SIMPLE_HEAD if console.is_terminal else None,
        pad_edge=False,
    )
    for column, justify in (
        ("case and part", "left"),
        ("median", "right"),
        ("p20 … p80", "right"),
        ("GFLOP", "right"),
        ("of best", "right"),
    ):
        out.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for found in results["cases"]:
        out.add_row(
            f"[bold]{found['case']['name']}[/]",
            f"best: {found['best_flop_per_second'] / 1e9:.0f} GFLOP/s",
            style="cyan",
        )
        for part in found["parts"]:
            flop = part["flop"]
            rate = f"{flop / part['median'] / found['best_flop_per_second']:.0%}" if flop else ""
            out.add_row(
                f"  {part['form']}: {escape(part['name'])}",
                *_spread(part),
                f"{flop / 1e9:.3f}" if flop else "",
                rate,
            )
        for name, whole in found["wholes"].items():
            out.add_row(f"  {name}", *_spread(whole), "", "", style="bold" if name == OURS else None)
        out.add_section()
    console.print(out)
    for found in results["cases"]:
        for limit in found["limits"]:
            for merge, ratios in limit["ratios"].items():
                text = ", ".join(f"{what} {ratio:.2f}×" for what, ratio in ratios.items())
                console.print(
                    f"{found['case']['name']}, {limit['form']}: {merge} over {text}", highlight=False
                )


def _spread(timed: Mapping[str, Any]) -> tuple[str, str]:
    return duration(timed["median"]), f"{duration(timed['p20'])} … {duration(timed['p80'])}"


def _machine(results: Mapping[str, Any]) -> str:
    device = results["device"]
    return f"{device['name']}, {device['threads']} threads, torch {results['versions']['torch']}"


def shape(case: Case) -> str:
    return f"{case.samples}×{case.tokens} tokens, {case.d_in}→{case.d_out}, T {case.experts}, r {case.rank}"


def duration(seconds: float) -> str:
    """With three digits and a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            digits = max(0, 2 - len(str(int(seconds * factor))) + 1)
            return f"{seconds * factor:.{digits}f} {unit}"
    raise AssertionError


def _console() -> Console:
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    return console


def _table(results: Mapping[str, Any], plain: bool) -> Table:
    out = Table(
        title=_machine(results), title_justify="left", box=None if plain else box.SIMPLE_HEAD, pad_edge=False
    )
    out.add_column("case and peer", no_wrap=True)
    for column in _COLUMNS:
        out.add_column(column, justify="right", no_wrap=True)
    for measured in results["cases"]:
        case, floor = Case(**measured["case"]), measured["floor"]
        out.add_row(
            f"[bold]{case.name}[/]",
            duration(floor["seconds"]),
            f"floor: {floor['bound']}",
            "",
            "",
            "",
            "",
            style="cyan",
        )
        timed = {name: peer for name, peer in measured["peers"].items() if "median" in peer}
        for name, peer in sorted(timed.items(), key=lambda item: item[1]["median"]):
            out.add_row(f"  {name}", *_cells(peer), style=_style(name, peer))
        for name, peer in measured["peers"].items():
            if peer["status"] in ("wrong", "failed"):
                out.add_row(
                    f"  {name}", peer["status"].upper(), "", "", "", "", _error(peer), style="bold red"
                )
        out.add_section()
    return out


def _cells(peer: Mapping[str, Any]) -> tuple[str, ...]:
    ratio, size, fraction = peer.get("round_ratio"), peer["peak_bytes"], peer["floor_fraction"]
    return (
        *_spread(peer),
        "–" if ratio is None else f"{ratio:.2f}",
        "–" if fraction is None else f"{fraction:.0%}",
        "–" if size is None else f"{size / 1e6:.1f}",
        _error(peer),
    )


def _error(peer: Mapping[str, Any]) -> str:
    if peer["status"] == "bound":
        return "bound"
    known = [error for error in (peer.get("errors") or {}).values() if error is not None]
    return f"{max(known):.0e}" if known else "–"


def _style(name: str, peer: Mapping[str, Any]) -> str | None:
    return "bold" if name == OURS else "dim" if peer["status"] == "bound" else None


def _notes(console: Console, results: Mapping[str, Any]) -> None:
    """Peers that ran nowhere with their reasons, failures, disturbed cases, and whether `auto` chose well."""
    cases = results["cases"]
    ran = {
        name for case in cases for name, peer in case["peers"].items() if peer["status"] in ("ok", "bound")
    }
    absent = {
        name: peer["reason"]
        for case in cases
        for name, peer in case["peers"].items()
        if peer["status"] == "unavailable"
    }
    for name, reason in absent.items():
        if name not in ran:
            console.print(f"not run: {name}: {escape(reason)}", style="dim", highlight=False)
    for case in cases:
        for name, peer in case["peers"].items():
            if peer["status"] in ("wrong", "failed"):
                console.print(
                    f"{case['case']['name']}: {name}: {escape(peer['reason'])}", style="red", highlight=False
                )
        if (others := case["cpus_used_by_others"] or 0) > machine.MUCH:
            text = f"{case['case']['name']}: other processes kept {others:.1f} CPUs busy; take its times with care"
            console.print(text, style="yellow", highlight=False)
    judged = [(case["case"]["name"], case["dispatch"]) for case in cases if case["dispatch"]]
    good = sum(choice["within_limit"] for _, choice in judged)
    console.print(
        f'backend="auto" is within 10 % of the best strategy in {good} of {len(judged)} cases',
        highlight=False,
    )
    for name, choice in judged:
        if not choice["within_limit"]:
            console.print(
                f"  {name}: {choice['auto_over_best']:.2f}× the time of {choice['best']}", highlight=False
            )
