"""Memory that was freed, and that the C library keeps."""

from __future__ import annotations

import ctypes
import sys


def trim() -> None:
    """Give freed memory back to the system, where the C library is glibc; elsewhere nothing is done.

    glibc keeps what lies between pieces that are still in use, such as the experts of a layer after they were
    copied to a longer stack.  It would be there beside what comes next, as large pieces get memory of their
    own.
    """
    if sys.platform == "linux":
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim is not None:
            malloc_trim(0)
