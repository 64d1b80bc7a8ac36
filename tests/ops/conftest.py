"""How the tests of the operators run: without the interpreter, and on request with their calls noted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mingle import ops
from mingle.ops import dispatch


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._triton_installed.cache_clear()
    yield
    dispatch._triton_installed.cache_clear()


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that were called, and with which backend."""
    calls: list[str] = []
    for name in ("FOLDED", "LOW_RANK"):
        operator = getattr(ops, name)

        def call(*arguments, name=name, operator=operator):
            calls.append(f"{name} {arguments[-1]}")
            return operator(*arguments)

        monkeypatch.setattr(ops, name, call)
    return calls
