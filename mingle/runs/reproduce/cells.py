"""One cell of a table: one method on one suite in one order, in a folder from which it can be resumed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mingle import methods, tasks
from mingle.adaptation.divergence import AdaptationDiverged
from mingle.adaptation.trace import AdaptTrace
from mingle.io.files import read_json, without_nan, write_json
from mingle.io.manifest import MANIFEST, read_manifest, size_of
from mingle.io.provenance import describe
from mingle.io.schema import Absent, check
from mingle.merging.merger import Merger
from mingle.runs import room
from mingle.runs.loop import Evaluate, MergeStep, experts_of, merge_all
from mingle.runs.observer import Observer
from mingle.runs.orders import FIRST_ORDER_SEED, shuffled
from mingle.runs.origin import origin
from mingle.runs.traces import trace_of
from mingle.suites import Suite

#: what a finished cell has measured; earlier versions measured less
_MEASURED = {
    "acc": float,
    "bwt": float,
    "acc_unknown": Absent((float, None)),
    "bytes": Absent((int, None)),
}
RESULT, TRACE, _MERGER = "result.json", "trace.json", "merger"


@dataclass(frozen=True)
class Cell:
    """Everything that a cell's numbers depend on.

    Attributes:
        suite, protocol, samples_per_class, seed: see `mingle.suites.load`; the seed is also that of gates and
            batches.
        method: a name in `mingle.methods.METHODS`.
        options: all of the method's options.
        order: the seed of the task order.
        evaluate: see `mingle.runs.loop`.
    """

    suite: str
    protocol: str
    method: str
    options: Mapping[str, Any]
    order: int
    samples_per_class: int
    seed: int
    evaluate: Evaluate

    @property
    def folder_name(self) -> str:
        """A readable name, different for different settings."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        suite = re.sub(r"[^A-Za-z0-9._-]+", "_", self.suite)
        return f"{suite}-{self.protocol}-{self.method}-{self.order}-{digest}"

    def result(self, cells: Path) -> dict[str, Any] | None:
        """The results of the finished cell; None while it is not finished."""
        path = cells / self.folder_name / RESULT
        if not path.exists():
            return None
        result: dict[str, Any] = read_json(path)
        check(result, {"failed": (str, None), "seconds": float}, path)
        if result["failed"] is None:
            check(result, _MEASURED, path)
        return result

    def prepare(self, suite: Suite) -> None:
        """Check the samples, and fetch or train every fine-tuned model that is missing."""
        order, sequential = shuffled(suite, self.order), methods.get(self.method).sequential
        for index, task in enumerate(order):
            suite.check(task)
            suite.expert(task, order[:index] if sequential else ())

    def room(self, suite: Suite, *, keep_model: bool) -> int:
        """How many bytes the merge may take on the disk."""
        size = room.of_merge(self.method, self.options, suite.base, tasks.get(suite.task_type))
        return size.task * len(suite) + size.state + (size.base if keep_model else 0)

    def run(
        self, suite: Suite, cells: Path, observer: Observer, device: torch.device, *, keep_model: bool
    ) -> None:
        """Merge the tasks that are not merged yet, saving after each, and write the result.

        The caller holds the folder's lock.  A merge that diverged is a result too: it would diverge again.
        """
        folder = cells / self.folder_name
        saved, number = folder / _MERGER, self.order - FIRST_ORDER_SEED
        merger = self._begin(suite, saved, device)
        order = shuffled(suite, self.order)
        expert = experts_of(suite, sequential=merger.method.sequential)
        done, failed = merger.metadata["steps"], None
        try:
            for step in merge_all(merger, order, expert, suite, observer, number, evaluate=self.evaluate):
                done.append(without_nan(asdict(step)))
                merger.save_pretrained(saved, include_base=keep_model)
        except AdaptationDiverged as error:
            failed = f"{order[len(done)]}: {error}"
        if number == 0 and failed is None:
            steps = [
                MergeStep(**step | {"trace": step["trace"] and AdaptTrace(**step["trace"])}) for step in done
            ]
            write_json(folder / TRACE, without_nan(trace_of(merger, suite, steps)))
        record = self._record(merger, order, failed) | describe(device)
        if failed is None:
            record["bytes"] = size_of(read_manifest(saved))
        write_json(folder / RESULT, without_nan(record))
        observer.merged(self.method, number, merger.result())
        if not keep_model and saved.exists():
            shutil.rmtree(saved)

    def _record(self, merger: Merger, order: list[str], failed: str | None) -> dict[str, Any]:
        """The results as plain data; `failed` says at which task the merge diverged, and how."""
        result, done = merger.result(), merger.metadata["steps"]
        return {
            "settings": asdict(self),
            "order": order,
            "failed": failed,
            "acc": result.acc if failed is None else None,
            "bwt": result.bwt if failed is None else None,
            "acc_unknown": result.acc_unknown if failed is None else None,
            "matrix": result.matrix,
            "unknown": result.unknown,
            "answers": {name: each.noted() for name, each in result.answers.items()},
            "seconds": round(sum(step["merge"] for step in done), 3),
            "steps": [{key: value for key, value in step.items() if key != "trace"} for step in done],
        }

    def _begin(self, suite: Suite, saved: Path, device: torch.device) -> Merger:
        """The merger of an interrupted run, or a new one."""
        if (saved / MANIFEST).exists():
            return Merger.from_pretrained(saved, base=suite.base, device=device)
        merger = Merger(
            suite.base, self.method, suite.task_type, seed=self.seed, device=device, **self.options
        )
        merger.metadata = origin(
            self.suite, self.protocol, self.samples_per_class, revisions=suite.revisions
        ) | {"steps": []}
        return merger
