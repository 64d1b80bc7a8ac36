"""Runs the tests marked `interpret` under Triton's interpreter.

TRITON_INTERPRET must be set before Triton is imported, so one subprocess of pytest for each file runs its
selected tests, and each test here reports what became of it there.  Under TRITON_INTERPRET=1 the tests run in
the process itself, for a debugger.

Two steps of the interpreter that take half of its time are made shorter there, see `_hasten`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
#: by file, what became of its tests, and what the subprocess printed
_RUNS = pytest.StashKey[dict[Path, tuple[dict[str, dict[str, str]], str]]]()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if INTERPRETING or pyfuncitem.get_closest_marker("interpret") is None:
        return None
    runs = pyfuncitem.session.stash.setdefault(_RUNS, {})
    if pyfuncitem.path not in runs:
        runs[pyfuncitem.path] = _run(pyfuncitem.session, pyfuncitem.path)
    reports, output = runs[pyfuncitem.path]
    report = reports.get(pyfuncitem.nodeid)
    if report is None:
        pytest.fail(f"did not run under the interpreter:\n{output}", pytrace=False)
    if report["outcome"] == "skipped":
        pytest.skip(report["text"])
    if report["outcome"] != "passed":
        pytest.fail(report["text"], pytrace=False)
    return True


def _run(session: pytest.Session, file: Path) -> tuple[dict[str, dict[str, str]], str]:
    """What becomes of the selected tests of a file that have the marker, by node id, and what is printed."""
    factory: pytest.TempPathFactory = session.config._tmp_path_factory  # type: ignore[attr-defined]
    path = factory.mktemp("interpret") / "reports"
    marked = [item for item in session.items if item.get_closest_marker("interpret")]
    names = [item.nodeid for item in marked if item.path == file]
    options = ["-q", "-p", "no:cacheprovider", "-m", "", f"--rootdir={session.config.rootpath}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *names],
        env=os.environ | {"TRITON_INTERPRET": "1", "MINGLE_TEST_REPORTS": str(path), "OMP_NUM_THREADS": "1"},
        cwd=session.config.rootpath,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = path.read_text().splitlines() if path.exists() else []
    return {report["id"]: report for report in map(json.loads, lines)}, (done.stdout + done.stderr)[-4000:]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Under the interpreter: write down what became of a test."""
    path = os.environ.get("MINGLE_TEST_REPORTS")
    if path is None or (report.when != "call" and report.passed):
        return
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    with open(path, "a") as file:
        file.write(json.dumps({"id": report.nodeid, "outcome": report.outcome, "text": text}) + "\n")


def _hasten() -> None:
    """Let Triton's interpreter do the same with less work.

    A call of a device function puts the interpreter's functions into Triton's language, member by member, as
    the call of the kernel that it stands in has done; and whether an operation on integers overflows is found
    by five more of the interpreter's own operations, where NumPy takes two.
    """
    from triton import language
    from triton.runtime import interpreter

    patch: Callable[[Any], Any] = interpreter._patch_lang

    def patch_once(function: Any) -> Any:
        seen = {id(value) for value in function.__globals__.values()}
        modules = [module for module in (language, language.core) if id(module) in seen]
        missing = any(language.core.is_builtin(module.load) for module in modules)
        return patch(function) if missing else None

    interpreter._patch_lang = patch_once
    semantic = interpreter.interpreter_semantic
    semantic.binary_op_sanitize_overflow_impl = partial(_no_overflow, semantic)


_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _no_overflow(semantic: Any, left: Any, right: Any, operation: Any) -> None:
    """Raise AssertionError where a sum, difference or product of 8 to 32 bits has no room in its type."""
    kind = left.type.scalar
    if kind.int_bitwidth >= 64 or not semantic.builder.options.sanitize_overflow:
        return
    exact = _EXACT[operation.__name__](*(side.handle.data.astype(np.int64) for side in (left, right)))
    fits = kind.get_int_min_value() <= exact.min() and exact.max() <= kind.get_int_max_value()
    assert fits, f"{kind} overflow detected for operation {operation.__name__}"


if INTERPRETING:
    _hasten()
