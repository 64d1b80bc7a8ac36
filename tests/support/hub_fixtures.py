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


@pytest.fixture
def image_hub(hub, tmp_path):
    """Base, sharded, and two tasks with their fine-tuned models."""
    import standin_hub as standin
    from standin_hub import BASE, EUROSAT, SVHN, images, table

    base = standin.clip()
    hub.add(BASE, standin.clip_base(tmp_path / "models/base", base, shard="100KB"))
    for seed, task in enumerate(("eurosat", "svhn")):
        hub.add(
            f"tanganke/clip-vit-base-patch32_{task}",
            standin.clip_expert(tmp_path / "models" / task, base, seed),
        )
    shards = {
        f"data/test-{i:05d}-of-00002-ab.parquet": table(images(count, 3, first=first))
        for i, count, first in ((0, 14, 0), (1, 11, 14))
    }
    hub.add(EUROSAT, shards, "dataset")
    digits = {
        f"{config}/test-00000-of-00001.parquet": table(images(count, 3))
        for config, count in (("cropped_digits", 20), ("full", 2))
    }
    hub.add(SVHN, digits, "dataset")
    return hub
