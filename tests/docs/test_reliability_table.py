"""The page of faults: every row has its number once and in order, and names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "explanations" / "reliability.md"
SECTIONS = ["Kernels", "Task maths", "Environment", "Files"]
ROWS = re.findall(r"^\| (\d+) \| (.+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)


def test_rows_are_numbered_once_and_in_order() -> None:
    assert [int(number) for number, _, _ in ROWS] == list(range(1, 36))


def test_the_page_has_its_sections_in_order() -> None:
    assert re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE) == SECTIONS


@pytest.mark.parametrize(("number", "promise", "tests"), ROWS, ids=[f"row {row[0]}" for row in ROWS])
def test_every_row_names_tests_that_exist(number: str, promise: str, tests: str) -> None:
    named = re.findall(r"`(tests/\S+\.py)::(test_\w+)`", tests)
    assert promise and named and ", ".join(f"`{file}::{test}`" for file, test in named) == tests
    for file, test in named:
        defined = ast.walk(ast.parse((ROOT / file).read_text()))
        assert test in {node.name for node in defined if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"
