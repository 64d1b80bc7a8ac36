"""Packages, package data and the CUDA extension; everything else is in ``pyproject.toml``.

The extension ``mingle._C`` is built where nvcc, cmake, ninja and pybind11's headers are found; the build
environment needs no torch.  The outcome is recorded in ``mingle/_build.json``, which `mingle.ops.extension`
reads.  Environment variables:

    MINGLE_BUILD_EXTENSION      auto (default): leave the extension out where it cannot be built; 1: fail
                                there; 0: leave it out
    MINGLE_CUDA_ARCHITECTURES   by default those of 80;90;100 that the compiler knows
    CUDACXX, CUDA_HOME          which nvcc; where neither is set, the one on PATH or in /usr/local/cuda
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = ("80", "90", "100")


class CannotBuild(Exception):
    """The reason why there is no extension, in words for the record."""


class Toolchain(NamedTuple):
    """The programs and headers that the build needs."""

    nvcc: str
    cmake: str
    ninja: str
    pybind11: str  # the folder that holds pybind11/pybind11.h

    @classmethod
    def find(cls) -> Toolchain:
        """The tools on this machine; raises CannotBuild, naming what is missing."""
        return cls(_nvcc(), _program("cmake", "CMAKE_BIN_DIR"), _program("ninja", "BIN_DIR"), _pybind11())

    def version(self) -> str:
        """The version of nvcc, such as 13.0."""
        found = re.search(r"release (\d+\.\d+)", _output(self.nvcc, "--version"))
        return found[1] if found else "unknown"

    def architectures(self) -> list[str]:
        """The architectures to build for: those asked for, or the default ones that the compiler knows."""
        asked = [
            part.strip()
            for part in re.split("[;,]", os.environ.get("MINGLE_CUDA_ARCHITECTURES", ""))
            if part.strip()
        ]
        if asked:
            return asked
        known = _output(self.nvcc, "--list-gpu-arch").split()
        return [number for number in ARCHITECTURES if f"compute_{number}" in known]

    def build(self, architectures: list[str], output: Path) -> None:
        """Compile the module into `output`.

        Each build starts from scratch in a folder of its own, away from the state and locks of earlier ones.
        Raises CannotBuild with the compiler's first errors.
        """
        with tempfile.TemporaryDirectory(prefix="mingle-build-") as scratch:
            settings = {
                "CMAKE_CUDA_COMPILER": self.nvcc,
                "CMAKE_MAKE_PROGRAM": self.ninja,
                "MINGLE_CUDA_ARCHITECTURES": ";".join(architectures),
                "MINGLE_OUTPUT": output,
                "MINGLE_PYBIND11_INCLUDE": self.pybind11,
                "Python_EXECUTABLE": sys.executable,
            }
            definitions = [f"-D{name}={value}" for name, value in settings.items()]
            _run(self.cmake, "-G", "Ninja", "-S", ROOT, "-B", scratch, *definitions)
            _run(self.cmake, "--build", scratch)


def _nvcc() -> str:
    if compiler := os.environ.get("CUDACXX"):
        candidates, where = [compiler], f"CUDACXX={compiler}"
    elif home := os.environ.get("CUDA_HOME"):
        candidates, where = [f"{home}/bin/nvcc"], f"CUDA_HOME={home}"
    else:
        candidates, where = ["nvcc", "/usr/local/cuda/bin/nvcc"], "PATH or /usr/local/cuda"
    for candidate in candidates:
        if path := shutil.which(candidate):
            return path
    raise CannotBuild(f"no nvcc was found in {where}")


def _program(name: str, folder: str) -> str:
    """A program on PATH, or from the Python package of its name, whose attribute `folder` is its place."""
    if path := shutil.which(name):
        return path
    if importlib.util.find_spec(name) and (
        path := shutil.which(name, path=getattr(importlib.import_module(name), folder, ""))
    ):
        return path
    raise CannotBuild(f"no {name} was found on PATH or as a Python package")


def _pybind11() -> str:
    """pybind11's include folder, or that of the copy that torch carries, without importing torch."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        for location in (spec and spec.submodule_search_locations) or ():
            if (Path(location) / "include/pybind11/pybind11.h").exists():
                return f"{location}/include"
    raise CannotBuild("the headers of pybind11 were found neither in a package pybind11 nor in torch")


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _run(*command: str | Path) -> None:
    try:
        done = subprocess.run(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    except OSError as error:
        raise CannotBuild(f"{command[0]} does not run: {error}") from error
    print(done.stdout, flush=True)
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        first = next(
            (i for i, line in enumerate(lines) if re.search(r"\berror\b", line, re.IGNORECASE)),
            max(len(lines) - 6, 0),
        )
        raise CannotBuild("the build failed: " + " | ".join(lines[first : first + 6]))


def _record(
    folder: Path,
    extension: str,
    reason: str | None = None,
    architectures: Sequence[str] = (),
    nvcc: str | None = None,
) -> None:
    """Write ``_build.json``; `extension` is "built" or "left out"."""
    facts = {"extension": extension, "reason": reason, "architectures": architectures, "nvcc": nvcc}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build.json").write_text(json.dumps(facts, indent=1) + "\n")


def _asked() -> str:
    mode = os.environ.get("MINGLE_BUILD_EXTENSION", "auto")
    if mode not in ("0", "1", "auto"):
        raise SystemExit(f"MINGLE_BUILD_EXTENSION={mode}: expected 0, 1 or auto")
    return mode


def _reason_to_leave_out() -> str | None:
    """Why the build is not even tried; None where it is."""
    if _asked() == "0":
        return "MINGLE_BUILD_EXTENSION=0"
    if _asked() == "1":
        return None
    try:
        Toolchain.find()
    except CannotBuild as reason:
        return str(reason)
    return None


LEFT_OUT = _reason_to_leave_out()


class BuildPackages(build_py):
    """Copies the packages, and records why the extension is left out, if it is."""

    def run(self) -> None:
        super().run()
        if LEFT_OUT:
            folder = ROOT / "mingle" if self.editable_mode else Path(self.build_lib, "mingle")
            _record(folder, "left out", LEFT_OUT)


class BuildExtension(build_ext):
    """Builds ``mingle._C`` with cmake, and records that it did or why it could not."""

    def run(self) -> None:
        in_place = self.inplace  # the base class builds elsewhere and copies
        super().run()
        _record(ROOT / "mingle" if in_place else Path(self.build_lib, "mingle"), **self.facts)

    def build_extension(self, extension: Extension) -> None:
        try:
            tools = Toolchain.find()
            architectures = tools.architectures()
            tools.build(architectures, Path(self.get_ext_fullpath(extension.name)).resolve().parent)
            self.facts = {"extension": "built", "architectures": architectures, "nvcc": tools.version()}
        except CannotBuild as reason:
            if not extension.optional:
                raise SystemExit(f"MINGLE_BUILD_EXTENSION=1: {reason}") from reason
            self.facts = {"extension": "left out", "reason": str(reason)}


setup(
    # without ext_modules the wheel is one for every platform
    ext_modules=[] if LEFT_OUT else [Extension("mingle._C", sources=[], optional=_asked() == "auto")],
    cmdclass={"build_py": BuildPackages, "build_ext": BuildExtension},
)
