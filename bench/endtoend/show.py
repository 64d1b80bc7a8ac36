"""Results as text for a terminal or a log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mingle.bench import machine
from mingle.bench.endtoend.clock import STAGES
from mingle.bench.endtoend.contenders import OURS
from mingle.bench.table import duration

_WIDTH = 130


def write(results: Mapping[str, Any]) -> None:
    """Seconds of every stage, ratios, agreement and targets."""
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    case, device = results["case"], results["device"]
    threads = f", {device['threads']} threads" if device["type"] == "cpu" else ""
    title = f"{case['title']}, {case['tasks']} tasks, gates of a {case['options']['reduce']}; {device['name']}{threads}"
    out = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD if console.is_terminal else None,
        pad_edge=False,
    )
    out.add_column("", no_wrap=True)
    for column in (*STAGES, "whole", "× ours", "step, last task", "peak MB", "accuracy"):
        out.add_column(column, justify="right", no_wrap=True)
    for name, result in results["contenders"].items():
        if "stages" in result:
            out.add_row(name, *_cells(results, name, result), style="bold" if name == OURS else None)
        else:
            out.add_row(name, result["status"].upper(), style="bold red")
    console.print(out)
    if results["mode"] == "staged":
        console.print(f"a sum, not a measured whole: {results['method']}", style="dim", highlight=False)
    for name, result in results["contenders"].items():
        if "reason" in result:
            console.print(f"{name}: {escape(result['reason'])}", style="red", highlight=False)
        errors = [
            f"{what} {one['error']:.0e}"
            for what, one in result["agreement"].items()
            if one["error"] is not None
        ]
        if errors and name != OURS:
            console.print(f"{name}: relative to ours: {', '.join(errors)}", style="dim", highlight=False)
        if (others := result.get("cpus_used_by_others") or 0) > machine.MUCH:
            console.print(
                f"{name}: other processes kept {others:.1f} CPUs busy; take its times with care",
                style="yellow",
                highlight=False,
            )
    for target in results["targets"]:
        mark = (
            "[green]met[/]"
            if target["met"]
            else "[yellow]disturbed[/]"
            if target["disturbed"]
            else "[red]missed[/]"
        )
        text = f"target: {target['peer']} ≥ {target['ratio']:g}× {target['ours']}, {target['part']}: found {target['found']:.2f}×"
        console.print(f"{text}: {mark}", highlight=False)


def _cells(results: Mapping[str, Any], name: str, result: Mapping[str, Any]) -> tuple[str, ...]:
    ratio = results["ratios"][OURS].get(name, {}).get("whole") if OURS in results["ratios"] else None
    return (
        *(duration(result["stages"][stage]) for stage in STAGES),
        duration(result["whole_seconds"]),
        "–" if ratio is None else f"{ratio:.2f}",
        duration(result["step_seconds"][-1]),
        "–" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 1e6:.0f}",
        "–" if result.get("accuracy") is None else f"{result['accuracy']:.1f} %",
    )


def write_growth(results: Mapping[str, Any]) -> None:
    """Every curve with its exponents, and what memory does over many tasks."""
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    for sweep in results["sweeps"].values():
        out = Table(title=f"growth with {sweep['label']}", title_justify="left", box=None, pad_edge=False)
        for column in ("", *map(str, sweep["values"]), "exponent", "of the upper half"):
            out.add_column(column, justify="right", no_wrap=True)
        for contender, curve in sweep["curves"].items():
            out.add_row(
                f"{contender}: step",
                *map(duration, curve["seconds"]),
                *_exponents(curve["exponents"]["seconds"]),
            )
            megabytes = [f"{b / 1e6:.1f} MB" for b in curve["peak_bytes"]]
            out.add_row(f"{contender}: memory", *megabytes, *_exponents(curve["exponents"]["peak_bytes"]))
        console.print(out)
    kept = results["kept"]
    console.print(
        f"after {kept['tasks'][-1]} tasks: {kept['held_bytes'][-1] / 1e6:.2f} MB in tensors beyond the base, "
        f"{kept['accounted_bytes'][-1] / 1e6:.2f} MB of them experts, gates and bases; unaccounted per task: "
        f"{kept['unaccounted_bytes_per_task']:.0f} bytes",
        highlight=False,
    )


def _exponents(exponents: Mapping[str, float]) -> tuple[str, str]:
    return f"{exponents['all']:.2f}", f"{exponents['upper']:.2f}"
