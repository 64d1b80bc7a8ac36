"""A stand-in of the hub that this process finds offline."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty hub cache, offline, with the stand-in of `fusion_bench` installed."""
    pytest.importorskip("pyarrow", reason="the suites of the papers read Parquet files")
    import standin_hub as standin
    from huggingface_hub import constants

    from mingle.suites.fusionbench import prompts

    made = standin.Hub(tmp_path / "hf")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(made.cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MINGLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(standin.fusion_bench(tmp_path / "packages")))
    prompts.classes.cache_clear()
    prompts.glue.cache_clear()
    yield made
    prompts.classes.cache_clear()
    prompts.glue.cache_clear()


@pytest.fixture
def glue_hub(hub, tmp_path: Path):
    """The base of GLUE and its data."""
    import standin_hub as standin

    hub.add("google/flan-t5-base", standin.t5_base(tmp_path / "t5"))
    hub.add("glue", standin.glue_files(), "dataset")
    return hub
