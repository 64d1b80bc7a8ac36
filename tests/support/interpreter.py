"""Runs the tests marked `interpret` under Triton's interpreter.

TRITON_INTERPRET must be set before Triton is imported, so one subprocess of pytest for each file runs its
selected tests, and each test here reports what became of it there.  Under TRITON_INTERPRET=1 the tests run in
the process itself, for a debugger.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
