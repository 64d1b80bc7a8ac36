"""csrc under g++'s sanitizers: addresses, undefined behaviour, and data races between the phases of an
algorithm.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from host_build import CSRC, MISSING, compile_program

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

HERE = Path(__file__).parent
# Each is needed: without it two phases become one, in which a thread reads what another writes.
BARRIERS = {
    "after loading S": (
        "cholesky_qr.cuh",
        "        if (j == i) shared.at(i, i) = 1.0 + tau;\n    });\n    block.sync();",
    ),
    "after a column": ("cholesky_qr.cuh", "1.0 / value;\n            });\n            block.sync();"),
    "after the rows of M X": (
        "cholesky_qr.cuh",
        "            }\n        });\n        block.sync();\n        block.each(height",
    ),
    "after a pivot": ("small_eigh.cuh", "// done\n        });\n        block.sync();"),
    "after a round": ("small_eigh.cuh", "rotated = true;\n            });\n            block.sync();"),
    "after the coefficients": (
        "small_eigh.cuh",
        "shared.lengths[c] = product; });\n        });\n        block.sync();",
    ),
    "after the peaks": ("signs.cuh", "shared.peaks[k] = peak;\n    });\n    block.sync();"),
}


def run(program: Path) -> subprocess.CompletedProcess[str]:
    # the first race ends it: threads that disagree on a pivot might wait for each other for ever
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(
        [str(program)], capture_output=True, text=True, check=False, timeout=60, env=environment
    )


def runs(folder: Path, *options: str) -> bool:
    """Whether a program built with these options starts here."""
    (folder / "empty.cpp").write_text("int main() {}\n")
    try:
        return run(compile_program([folder / "empty.cpp"], folder / "empty", *options)).returncode == 0
    except AssertionError:
        return False


def test_no_address_or_undefined_behaviour_is_wrong(tmp_path: Path) -> None:
    options = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    if not runs(tmp_path, *options):
        pytest.skip("no address sanitizer")
    done = run(compile_program([HERE / "sanitized.cpp"], tmp_path / "sanitized", *options))
    assert done.stdout == "done\n" and not done.stderr, done.stdout + done.stderr


THREADS = ("-O1", "-g", "-fsanitize=thread", "-pthread")


def test_no_phase_races_with_itself(tmp_path: Path) -> None:
    if not runs(tmp_path, *THREADS):
        pytest.skip("no thread sanitizer")
    done = run(compile_program([HERE / "threads.cpp"], tmp_path / "threads", *THREADS))
    assert done.returncode == 0 and done.stdout == "done\n" and not done.stderr, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", BARRIERS)
def test_a_missing_barrier_is_seen(name: str, tmp_path: Path) -> None:
    if not runs(tmp_path, *THREADS):
        pytest.skip("no thread sanitizer")
    file, code = BARRIERS[name]
    for source in [*CSRC.iterdir(), HERE / "threads.cpp", HERE / "fuzz.h"]:
        shutil.copy(source, tmp_path)
    text = (tmp_path / file).read_text()
    assert text.count(code) == 1, name
    (tmp_path / file).write_text(text.replace(code, code.replace("block.sync();", "")))
    done = run(compile_program([tmp_path / "threads.cpp"], tmp_path / "threads", *THREADS))
    assert done.returncode != 0 and "data race" in done.stderr
