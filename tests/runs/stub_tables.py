"""Tables of the suite ``stub``, measured in a moment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from stub_suite import NAMES as NAMES

from mingle.runs import reproduce
from mingle.runs.observer import Observer
from mingle.runs.reproduce import Request, summary

QUICK = (("steps", 3), ("rank", 4), ("lr", 5e-3))
METHODS = ("pre-trained", "average", "mingle")


def request(table: str = "main", **changes) -> Request:
    return Request(table, **({"suites": ("stub",), "methods": METHODS, "options": QUICK} | changes))


def measure(out: Path, observer: Observer | None = None, keep_models: bool = False, **changes) -> dict:
    plan = reproduce.plan(request(**changes))
    reproduce.run(plan, out, observer, device=torch.device("cpu"), keep_models=keep_models)
    return summary.write(plan, out)


def results(out: Path) -> dict[str, dict]:
    """result.json by folder, without seconds."""
    found = {}
    for path in sorted(out.glob("cells/*/result.json")):
        found[path.parent.name] = {
            key: value
            for key, value in json.loads(path.read_text()).items()
            if key not in ("seconds", "steps")
        }
    return found


class Recorder(Observer):
    def __init__(self) -> None:
        self.merged_tasks: list[tuple[str, int, int]] = []

    def merging(self, method: str, order: int, index: int, names: Sequence[str]) -> None:
        self.merged_tasks.append((method, order, index))
