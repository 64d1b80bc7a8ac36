"""How the tests of the operators run: without the interpreter, and on request with their calls noted."""

from __future__ import annotations

import pytest

from mingle import ops


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


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
