"""What is installed, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_wheel_holds_only_mingle_and_its_data(tmp_path):
    """An installed top-level package called `kernels` would shadow the one that transformers imports."""
    built = run(sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT))
    assert built.returncode == 0, built.stdout + built.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"mingle"}
    for expected in (
        "mingle/kernels/gated_experts/reference.py",
        "mingle/kernels/relaxed_projection/triton.py",
        "mingle/bench/run.py",
        "mingle/py.typed",
        "mingle/_build.json",
        "mingle/suites/glyphs/data/manifest.json",
        "mingle/suites/glyphs/data/base/tokenizer.json",
        "mingle/suites/glyphs/data/experts/greek-inverted/model.safetensors",
    ):
        assert expected in names


def test_importing_mingle_is_light():
    heavy = "transformers, matplotlib, PIL"
    code = f"import sys, mingle; print([m for m in {heavy.split(', ')!r} if m in sys.modules])"
    assert run(sys.executable, "-c", code).stdout.strip() == "[]"
