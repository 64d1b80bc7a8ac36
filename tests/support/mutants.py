"""Loads the library with one fault in it."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Mutation(NamedTuple):
    """`old` becomes `new` in `module`, where it stands `times` times, however its lines are broken; `seen_by`
    names the compact check that must fail.
    """

    module: str
    old: str
    new: str
    seen_by: str
    times: int = 1

    def pattern(self) -> re.Pattern[str]:
        """`old` with any white space between its tokens, and a comma or none before a closing bracket."""
        tokens = re.findall(r"\w+|[^\w\s]", self.old)
        return re.compile(r"\s*".join(",?\\s*" * (token in ")]}") + re.escape(token) for token in tokens))


@contextmanager
def applied(mutation: Mutation, folder: Path) -> Iterator[None]:
    """The library with `mutation`: every module sees the mutated functions in place of the original ones."""
    original = importlib.import_module(mutation.module)
    assert original.__file__ is not None
    text = Path(original.__file__).read_text()
    text, times = mutation.pattern().subn(lambda _: mutation.new.strip(), text)
    assert times == mutation.times, f"{mutation.old!r} stands {times} times in {mutation.module}"
    path = folder / Path(original.__file__).name  # Triton reads the source of a kernel from its file
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(mutation.module, path)
    assert spec is not None and spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)

    replaced = {
        id(value): getattr(mutant, name)
        for name, value in vars(original).items()
        # Triton's kernels wrap a function
        if getattr(getattr(value, "fn", value), "__module__", None) == mutation.module
    }
    replaced[id(original)] = mutant
    undo = []
    for module in [
        module
        for name, module in sys.modules.items()
        if name.partition(".")[0] == "mingle" and module is not mutant
    ]:
        for name, value in list(vars(module).items()):
            if id(value) in replaced:
                undo.append((module, name, value))
                setattr(module, name, replaced[id(value)])
    sys.modules[mutation.module] = mutant
    try:
        yield
    finally:
        sys.modules[mutation.module] = original
        for module, name, value in undo:
            setattr(module, name, value)
