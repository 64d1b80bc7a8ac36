"""A suite of a tiny model, for tables and commands that take a moment."""

from __future__ import annotations

import pytest

from mingle import suites
from mingle.suites import Suite
from mingle.suites.protocol import SeedRequest

NAMES = ("one", "two", "three")


@pytest.fixture
def stub(monkeypatch, base_folder, tuned_folders, samples):
    """A suite ``stub`` of three tasks of a tiny model; its sequential methods have nothing to run on."""
    load = suites.load

    def loader(name, *, protocol="strict", samples_per_class=5, seed=0, **others):
        if name not in ("stub", "other"):
            return load(name, protocol=protocol, samples_per_class=samples_per_class, seed=seed, **others)
        return Suite(
            name,
            "clip",
            base_folder,
            {task: lambda i=i: samples[i] for i, task in enumerate(NAMES)},
            {task: lambda i=i: tuned_folders[i] for i, task in enumerate(NAMES)},
            SeedRequest(protocol, min(samples_per_class, 3), seed),
        )

    monkeypatch.setattr(suites, "load", loader)
