"""What setup.py decides: to build the extension, to leave it out and say why, or to fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What setup.py reads, and nothing else."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "mingle", "kernels", "bench"):
        shutil.copytree(
            ROOT / name,
            folder / name,
            ignore=shutil.ignore_patterns("_C*", "_build.json", "__pycache__", "data", "results"),
        )
    return folder


def build(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MINGLE_", "CUDA"))}
    command = command or ("build",)
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *command],
        cwd=folder,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


def record(folder: Path) -> dict[str, Any]:
    (path,) = [
        path for path in folder.rglob("_build.json") if "build" in path.parts or path.parent.name == "mingle"
    ]
    return json.loads(path.read_text())


def compiler(folder: Path, script: str) -> str:
    """An nvcc that does what a shell script says."""
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_without_nvcc_it_is_left_out(checkout: Path) -> None:
    done = build(checkout, CUDA_HOME="/nowhere")
    assert done.returncode == 0, done.stderr
    assert record(checkout) == {
        "extension": "left out",
        "reason": "no nvcc was found in CUDA_HOME=/nowhere",
        "architectures": [],
        "nvcc": None,
    }
    assert not list(checkout.rglob("_C*"))


def test_left_out_on_demand(checkout: Path) -> None:
    assert build(checkout, MINGLE_BUILD_EXTENSION="0").returncode == 0
    assert record(checkout)["reason"] == "MINGLE_BUILD_EXTENSION=0"


def test_demanded_and_without_nvcc_it_fails(checkout: Path) -> None:
    done = build(checkout, MINGLE_BUILD_EXTENSION="1", CUDACXX="/nowhere/nvcc")
    assert (
        done.returncode != 0
        and "MINGLE_BUILD_EXTENSION=1: no nvcc was found in CUDACXX=/nowhere/nvcc" in done.stderr
    )


def test_an_unknown_demand_fails(checkout: Path) -> None:
    done = build(checkout, MINGLE_BUILD_EXTENSION="yes")
    assert done.returncode != 0 and "MINGLE_BUILD_EXTENSION=yes: expected 0, 1 or auto" in done.stderr


@pytest.mark.parametrize(
    ("tool", "words"), [("cmake", "no cmake was found"), ("ninja", "no ninja was found")]
)
def test_without_a_tool_it_is_left_out(tool: str, words: str, checkout: Path, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in {"cmake", "ninja"} - {tool}:
        compiler(programs, "exit 0")
        (programs / "nvcc").rename(programs / name)
    # a package of the same name would do as well
    (checkout / f"{tool}.py").write_text("CMAKE_BIN_DIR = BIN_DIR = '/nowhere'\n")
    done = build(checkout, PATH=str(programs), CUDACXX=compiler(tmp_path, "exit 0"), PYTHONPATH=str(checkout))
    assert done.returncode == 0, done.stderr
    assert words in record(checkout)["reason"]


def test_a_stale_build_lock_never_hangs(checkout: Path, tmp_path: Path) -> None:
    """Those that an interrupted build left behind, here or where torch compiles extensions, are not read."""
    extensions = tmp_path / "torch_extensions"
    for folder in (extensions / "mingle", checkout / "build", tmp_path / "mingle-build-old"):
        folder.mkdir(parents=True)
        for name in ("lock", ".ninja_lock", ".ninja_log"):
            (folder / name).touch()
    programs = tmp_path / "programs"
    programs.mkdir()
    # cmake, which waits forever unless its build folder is empty, and then fails
    waits = """while [ "$1" != -B ]; do shift; done
[ -z "$(/bin/ls -A "$2")" ] || /bin/sleep 1000
echo nothing was locked; exit 1"""
    for name, script in (("ninja", "exit 0"), ("cmake", waits)):
        compiler(programs, script)
        (programs / "nvcc").rename(programs / name)
    tools = dict(PATH=str(programs), CUDACXX=compiler(tmp_path, "echo compute_90"), TMPDIR=str(tmp_path))
    done = build(checkout, **tools, TORCH_EXTENSIONS_DIR=str(extensions))
    assert done.returncode == 0, done.stderr
    assert "nothing was locked" in record(checkout)["reason"]
    code = "from mingle.ops import extension; print(extension.summary())"
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(extensions)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, timeout=100, check=True)


needs_cmake = pytest.mark.skipif(
    not shutil.which("cmake") or not shutil.which("ninja"), reason="no cmake or ninja"
)


@needs_cmake
def test_a_compiler_that_fails_costs_only_the_extension(checkout: Path, tmp_path: Path) -> None:
    broken = compiler(tmp_path, "exit 1")
    done = build(checkout, CUDACXX=broken)
    assert done.returncode == 0, done.stderr
    facts = record(checkout)
    assert (
        facts["extension"] == "left out"
        and facts["reason"].startswith("the build failed: ")
        and "CMake Error" in facts["reason"]
    )
    assert list((checkout / "build").glob("lib*/mingle/merging/merger.py"))
    demanded = build(checkout, MINGLE_BUILD_EXTENSION="1", CUDACXX=broken)
    assert demanded.returncode != 0 and "MINGLE_BUILD_EXTENSION=1: the build failed" in demanded.stderr


@needs_cmake
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.slow
def test_the_compiler_is_quoted(checkout: Path) -> None:
    with (checkout / "csrc/rsvd.cu").open("a") as source:
        source.write("int broken = ;\n")
    done = build(checkout, MINGLE_CUDA_ARCHITECTURES="90")
    assert done.returncode == 0, done.stderr
    assert "rsvd.cu" in record(checkout)["reason"] and "expected an expression" in record(checkout)["reason"]


@needs_cmake
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.slow
def test_it_is_built_in_place(checkout: Path) -> None:
    done = build(
        checkout, "build_ext", "--inplace", MINGLE_CUDA_ARCHITECTURES="90", MINGLE_BUILD_EXTENSION="1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    facts = record(checkout)
    assert facts["extension"] == "built" and facts["architectures"] == ["90"] and facts["reason"] is None
    code = "import _C; print(_C.architectures, _C.cuda_version)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout / "mingle", capture_output=True, text=True, check=False
    )
    assert loaded.stdout.startswith(f"['90'] {facts['nvcc']}"), loaded.stderr
    refused = (
        "import _C\ntry: _C.small_eigh(0, 1, 129, 0, 0, 0, 0, 0)\nexcept ValueError as error: print(error)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", refused], cwd=checkout / "mingle", capture_output=True, text=True, check=False
    )
    assert loaded.stdout == "mingle: small_eigh: n = 129, expected 1 … 128\n", loaded.stderr
