"""The cells of a plan, run by any number of processes."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path

import torch

from mingle import suites
from mingle.io.files import free_space, made, read_json, write_json
from mingle.io.locks import Locked, lock
from mingle.runs import devices
from mingle.runs.observer import Observer
from mingle.runs.reproduce.request import TablePlan
from mingle.suites import Suite

_POLL_SECONDS = 1.0


def run(
    plan: TablePlan,
    out: Path,
    observer: Observer | None = None,
    *,
    device: torch.device | None = None,
    keep_models: bool = False,
) -> None:
    """Run the cells that are not finished, under ``out/cells``.

    Processes that run the same plan in the same folder share the cells: one that another process holds is
    passed over and tried again at the end, so that the cells of a killed process are finished too.
    """
    observer, folder, revisions = observer or Observer(), out / "cells", out / "revisions.json"
    device = device or devices.usual()
    made(folder)

    @lru_cache(maxsize=2)  # neighbouring cells share a suite, and its samples may be large
    def suite(name: str, protocol: str, samples_per_class: int, seed: int) -> Suite:
        noted = read_json(revisions) if revisions.exists() else {}
        return suites.load(
            name,
            protocol=protocol,
            samples_per_class=samples_per_class,
            seed=seed,
            on_training=observer.training,
            revisions=noted,
        )

    waiting = plan.cells
    while waiting:
        held = []
        for cell in waiting:
            own = folder / cell.folder_name
            own.mkdir(parents=True, exist_ok=True)
            try:
                with lock(own):
                    if cell.result(folder) is None:
                        loaded = suite(cell.suite, cell.protocol, cell.samples_per_class, cell.seed)
                        # missing experts are fetched or trained once, and before anything is timed
                        with lock(folder, wait=True):
                            cell.prepare(loaded)
                            free_space(own, cell.room(loaded, keep_model=keep_models))
                            if loaded.revisions:  # every later cell keeps to the commits of the first
                                noted = read_json(revisions) if revisions.exists() else {}
                                write_json(revisions, noted | dict(loaded.revisions))
                        cell.run(loaded, folder, observer, device, keep_model=keep_models)
            except Locked:
                held.append(cell)
        if held == waiting:
            time.sleep(_POLL_SECONDS)
        waiting = held
