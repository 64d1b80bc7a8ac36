"""Suites with few test samples, for tests that do not ask how accurate a merge is."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch

from mingle.suites import Suite, glyphs
from mingle.tasks import TaskData

#: of 25; the strict protocol takes five of each class as seed samples
PER_CLASS = 6

_samples = cache(glyphs._samples.__wrapped__)


def draw_few(patch: pytest.MonkeyPatch) -> None:
    """Of glyph suites few test images are drawn at all, once for all tests."""
    patch.setattr(glyphs, "TEST_IMAGES_PER_CLASS", PER_CLASS)
    patch.setattr(glyphs, "_samples", _samples)


@pytest.fixture(scope="module")
def few_images() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        draw_few(patch)
        yield


def every_tenth(patch: pytest.MonkeyPatch) -> None:
    """Of any suite's test samples every tenth is measured; seed samples are chosen among all."""
    whole = Suite.__getitem__

    def some(suite: Suite, name: str) -> TaskData:
        data = whole(suite, name)
        return data.select(torch.arange(0, len(data), 10))

    patch.setattr(Suite, "__getitem__", some)
