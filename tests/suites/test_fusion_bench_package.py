"""The package `fusion_bench` itself, where it is installed: its class names and prompts are found, and
nothing else of it is imported.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from mingle.suites.fusionbench import prompts
from mingle.suites.fusionbench.datasets import GLUE_TASKS, IMAGE_TASKS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("fusion_bench") is None, reason="fusion_bench is not installed"
)

CLASSES = dict(
    zip(
        (task.name for task in IMAGE_TASKS),
        (397, 196, 45, 10, 10, 43, 10, 47, 102, 2, 7, 37, 10, 100, 10, 101, 10, 26, 10, 2),
        strict=True,
    )
)


@pytest.mark.parametrize("task", IMAGE_TASKS, ids=lambda task: task.name)
def test_class_names_and_templates(task):
    names, templates = prompts.classes(task.model)
    assert len(names) == CLASSES[task.name] and all(names)
    assert templates and all(template.count("{}") == 1 for template in templates)


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_prompts_speak_of_the_columns(task):
    form, columns = prompts.glue(task), GLUE_TASKS[task].columns
    text = form["input_text"].format(**{column: f"<{column}>" for column in columns})
    assert all(f"<{column}>" in text for column in columns)
    assert isinstance(form["target_text"], str) == (task == "stsb")


def test_the_package_is_read_and_not_imported():
    code = """
import sys
from mingle.suites.fusionbench import prompts
prompts.classes("sun397")
prompts.glue("cola")
sys.exit(any(name in sys.modules for name in ("fusion_bench", "lightning", "hydra", "datasets")))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
