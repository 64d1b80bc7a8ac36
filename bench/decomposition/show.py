"""Results as text for a terminal or a log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mingle.bench import machine
from mingle.bench.decomposition.peers import ACCURATE, OURS
from mingle.bench.table import duration

_WIDTH = 120
PARTS = {"decompose": "decompose Δ", "project": "project Δ after earlier experts, then decompose"}


def write(results: Mapping[str, Any]) -> None:
    """Shapes, the whole task, what a GPU would do, and the targets."""
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    for part in PARTS:
        console.print(_table(results, part, not console.is_terminal))
        _notes(console, results, part)
    console.print(_prediction(results, not console.is_terminal))
    _prediction_notes(console, results["prediction"])
    for target in results["targets"]:
        mark = "[green]met[/]" if target["met"] else "[red]missed[/]"
        where = target["shape"] or "whole task"
        text = f"target {target['case']}, {where}, {target['part']}: {escape(target['peer'])} ≥ {target['ratio']:g}× ours"
        console.print(
            f"{text}: found {target['found']:.2f}×, excess residual {target['excess']:.0e}: {mark}",
            highlight=False,
        )


def _table(results: Mapping[str, Any], part: str, plain: bool) -> Table:
    case, device = results["case"], results["device"]
    threads = f", {device['threads']} threads" if device["type"] == "cpu" else ""
    title = f"{case['title']}: {PARTS[part]}; {device['name']}{threads}, torch {results['versions']['torch']}"
    columns = ("per layer", "p20 … p80", "× ours", "p20 … p80", "residual/best − 1", "calls")
    out = _empty(title, f"{part}: shape and peer", columns, plain)
    for measured in results[part]:
        shape = measured["shape"]
        out.add_row(
            f"[bold]{shape['m']}×{shape['n']}[/], {shape['count']} layers", *[""] * len(columns), style="cyan"
        )
        peers = measured["peers"].items()
        # the other points of the curves are in the file and the picture
        timed = [(name, peer) for name, peer in peers if "median" in peer and peer["telling"]]
        for name, peer in sorted(timed, key=lambda item: item[1]["median"]):
            out.add_row(f"  {name}", *_cells(peer), style="bold" if name in (OURS, ACCURATE) else None)
        for name, peer in peers:
            if peer["status"] in ("wrong", "failed"):
                out.add_row(f"  {name}", peer["status"].upper(), *[""] * (len(columns) - 1), style="bold red")
        out.add_section()
    out.add_row("[bold]all layers[/]", *[""] * len(columns), style="cyan")
    telling = {
        name for measured in results[part] for name, peer in measured["peers"].items() if peer["telling"]
    }
    whole = {
        name: total
        for name, total in results["totals"][part].items()
        if name in telling and "median_seconds" in total
    }
    for name, total in sorted(whole.items(), key=lambda item: item[1]["median_seconds"]):
        spread = f"{duration(total['p20_seconds'])} … {duration(total['p80_seconds'])}"
        ratios = (
            (f"{total['ratio']:.2f}", f"{total['ratio_p20']:.2f} … {total['ratio_p80']:.2f}")
            if "ratio" in total
            else ("–", "–")
        )
        cells = (duration(total["median_seconds"]), spread, *ratios, f"{total['worst_excess']:.0e}", "")
        out.add_row(f"  {name}", *cells, style="bold" if name in (OURS, ACCURATE) else None)
    return out


def _cells(peer: Mapping[str, Any]) -> tuple[str, ...]:
    ratios = ("–", "–")
    if "round_ratio" in peer:
        ratios = (
            f"{peer['round_ratio']:.2f}",
            f"{peer['round_ratio_p20']:.2f} … {peer['round_ratio_p80']:.2f}",
        )
    spread = f"{duration(peer['p20'])} … {duration(peer['p80'])}"
    return (
        duration(peer["median"]),
        spread,
        *ratios,
        f"{peer['errors']['excess']:.0e}",
        str(peer["repetitions"]),
    )


def _notes(console: Console, results: Mapping[str, Any], part: str) -> None:
    for measured in results[part]:
        shape = f"{measured['shape']['m']}×{measured['shape']['n']}"
        reasons: dict[str, list[str]] = {}
        for name, peer in measured["peers"].items():
            if "reason" in peer:
                reasons.setdefault(f"{peer['status']}: {peer['reason']}", []).append(name)
        for reason, names in reasons.items():
            console.print(
                f"{shape}: {escape(', '.join(names))}: {escape(reason)}", style="dim", highlight=False
            )
        if (others := measured["cpus_used_by_others"] or 0) > machine.MUCH:
            text = f"{shape}: other processes kept {others:.1f} CPUs busy; take its times with care"
            console.print(text, style="yellow", highlight=False)


def _prediction(results: Mapping[str, Any], plain: bool) -> Table:
    """Steps by name, over all shapes."""
    prediction = results["prediction"]
    columns = ("launches", "GB", "fp32 GFLOP", "fp64 GFLOP", "floor")
    out = _empty(
        f"{results['case']['title']} on one {prediction['hardware']['name']}, by counting",
        "step",
        columns,
        plain,
    )
    for part in PARTS:
        shapes = sorted(
            prediction[part]["steps"].values(), key=len, reverse=True
        )  # the first has all steps, in order
        steps = [step for shape in shapes for step in shape]
        for name in dict.fromkeys(step["name"] for step in steps):
            alike = [step for step in steps if step["name"] == name]
            total = {
                key: sum(step[key] for step in alike)
                for key in ("launches", "bytes", "fp32", "fp64", "floor")
            }
            out.add_row(f"  {name}", *_counts(total), duration(total["floor"]))
        out.add_row(
            f"[bold]{part}[/]",
            *_counts(prediction[part]),
            duration(prediction[part]["floor_seconds"]),
            style="bold",
        )
        out.add_section()
    return out


def _counts(step: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(step["launches"]),
        *(f"{step[key] / 1e9:.2f}" if step[key] else "" for key in ("bytes", "fp32", "fp64")),
    )


def _prediction_notes(console: Console, prediction: Mapping[str, Any]) -> None:
    rates = prediction["hardware"]
    console.print(
        f"floors: {rates['fp32'] / 1e12:g} TFLOP/s fp32, {rates['fp64'] / 1e12:g} TFLOP/s fp64, {rates['bytes'] / 1e12:g} TB/s, "
        f"{rates['launch'] * 1e6:g} µs per launch; K1 and K2 one block per matrix at {rates['fp64_block'] / 1e9:.0f} GFLOP/s; "
        f"not in the floors: the library's eigh, matrix after matrix, at an estimated {rates['eigh_per_column'] * 1e6:g} µs per column: "
        f"{duration(prediction['project']['library_estimate_seconds'])}",
        style="dim",
        highlight=False,
    )


def _empty(title: str, first: str, columns: tuple[str, ...], plain: bool) -> Table:
    out = Table(title=title, title_justify="left", box=None if plain else box.SIMPLE_HEAD, pad_edge=False)
    out.add_column(first, no_wrap=True)
    for column in columns:
        out.add_column(column, justify="right", no_wrap=True)
    return out
