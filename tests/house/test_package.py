"""What is built and installed, and what importing it costs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPECTED = (
    "mingle/kernels/gated_experts/reference.py",
    "mingle/kernels/relaxed_projection/triton.py",
    "mingle/bench/run.py",
    "mingle/py.typed",
    "mingle/runs/report/page/page.html.j2",
    "mingle/runs/report/page/style.css",
    "mingle/runs/report/page/script.js",
    "mingle/_build.json",
    "mingle/suites/glyphs/data/manifest.json",
    "mingle/suites/glyphs/data/base/tokenizer.json",
    "mingle/suites/glyphs/data/experts/greek-inverted/model.safetensors",
    "mingle/suites/texts/data/texts.json.xz",
    "mingle/suites/texts/data/LICENSES.txt",
)


def run(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    """What the command prints; it must succeed."""
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built(out: Path, *options: str) -> set[str]:
    """The names of the files in the wheel that `build` makes."""
    run(sys.executable, "-m", "build", *options, "--outdir", str(out), str(ROOT))
    return set(zipfile.ZipFile(next(out.glob("*.whl"))).namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    return built(tmp_path_factory.mktemp("wheel"), "--wheel")


@pytest.mark.slow
def test_the_wheel_holds_only_mingle_and_its_data(wheel):
    """An installed top-level package called `kernels` would shadow the one that transformers imports."""
    assert {name.split("/")[0] for name in wheel if ".dist-info" not in name} == {"mingle"}
    assert wheel >= set(EXPECTED)


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(wheel, tmp_path):
    """kernels/ and bench/ reach mingle/ through symlinks, which the sdist has to follow."""
    assert built(tmp_path) == wheel  # without options: an sdist, and a wheel from it
    assert next(tmp_path.glob("*.tar.gz"))


@pytest.mark.slow
def test_an_editable_install_is_the_checkout(tmp_path):
    """It holds mingle.kernels and mingle.bench, and no top-level package but mingle."""
    checkout = tmp_path / "checkout"
    kept_out = shutil.ignore_patterns(".*", "tests", "build", "results", "*.egg-info", "_build.json", "_C*")
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=kept_out)
    run(sys.executable, "-m", "venv", str(tmp_path / "environment"))
    python = str(tmp_path / "environment/bin/python")
    run(
        *(python, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", str(checkout)),
        MINGLE_BUILD_EXTENSION="0",
    )
    # what mingle imports comes last: it may hold an editable mingle of its own
    program = f"""
import importlib.util, sys
sys.path += {[path for path in sys.path if path.endswith("-packages")]!r}
import mingle.bench.run
import mingle.kernels.gated_experts.reference
print(mingle.__file__)
for name in ("kernels", "bench", "tests"):
    found = importlib.util.find_spec(name)
    print(found and found.origin)
"""
    package, *others = run(python, "-c", program, cwd=tmp_path, PYTHONPATH="").split("\n")[:-1]
    assert package == str(checkout / "mingle/__init__.py")
    assert not [origin for origin in others if origin.startswith(str(checkout))]


def test_the_command_runs_from_the_checkout():
    """There, kernels/ stands where Python looks for the package `kernels` that transformers may import."""
    program = """
import contextlib, runpy, sys
sys.argv = ["mingle", "env"]
with contextlib.suppress(SystemExit):
    runpy.run_module("mingle", run_name="__main__")
from transformers import CLIPModel
"""
    assert run(sys.executable, "-c", program).startswith("mingle")


def test_importing_mingle_is_light():
    heavy = "transformers, matplotlib, PIL, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor"
    code = f"import sys, mingle; print([m for m in {heavy.split(', ')!r} if m in sys.modules])"
    assert run(sys.executable, "-c", code).strip() == "[]"
