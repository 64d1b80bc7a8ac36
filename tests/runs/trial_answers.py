"""What an answer to a trial begins with."""

from __future__ import annotations

import pytest


def first(answer):
    """The likeliest class of an answer, as a test compares it."""
    best = answer.classes[0]
    return best.task, best.label, pytest.approx(best.probability, abs=1e-6)
