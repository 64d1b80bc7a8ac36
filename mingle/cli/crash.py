"""What a user sees of an error that nobody foresaw: one line, and a file with the rest."""

from __future__ import annotations

import sys
import tempfile
import traceback
from types import TracebackType

from mingle.text import visible


def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A `sys.excepthook`: name the error, and the file that its traceback was written to.

    Python then exits with 1.
    """
    lines = "".join(traceback.format_exception(kind, error, trace))
    try:
        with tempfile.NamedTemporaryFile("wb", prefix="mingle-", suffix=".txt", delete=False) as file:
            file.write(lines.encode(errors="backslashreplace"))
        where = f"please report it with the file {file.name}"
    except OSError as unwritable:
        where = f"the traceback could not be written: {unwritable}"
    print(visible(f"internal error: {kind.__name__}: {error}; {where}"), file=sys.stderr)
