"""When to give up an adaptation."""

from __future__ import annotations

#: After this many steps in a row whose loss or gradient is not finite, adaptation gives up.
PATIENCE = 3
#: what to do about it
ADVICE = "a smaller learning rate (lr) may help"


class AdaptationDiverged(RuntimeError):
    """The loss, a gradient or the adapted model's answers were not finite, and going on could not help."""
