"""Glyph suites with few test images, for tests that do not ask how accurate a merge is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mingle.suites import glyphs

#: of 25; the strict protocol takes five of each class as seed samples
PER_CLASS = 8


@pytest.fixture(scope="module")
def few_images() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs, "TEST_IMAGES_PER_CLASS", PER_CLASS)
        glyphs._samples.cache_clear()
        yield
    glyphs._samples.cache_clear()
