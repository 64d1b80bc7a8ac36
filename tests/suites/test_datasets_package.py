"""Parquet as the package `datasets` writes it, where that is installed: we read what it reads."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pyarrow", reason="the suites of the papers read Parquet files")

from standin_hub import images
from transformers import CLIPImageProcessorPil

from mingle.suites.fusionbench.clip import _Pixels
from mingle.suites.fusionbench.datasets import Source
from mingle.suites.fusionbench.loading import Split
from mingle.tasks.image_processor import ImageProcessor


def test_rows_labels_and_class_names_are_those_of_datasets(hub, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["crop", "forest", "river"])}
    )
    path = tmp_path / "test.parquet"
    datasets.Dataset.from_dict(images(30, 3), features=features).to_parquet(path, batch_size=7)
    hub.add("org/data", {"data/test-00000-of-00001.parquet": path.read_bytes()}, "dataset")
    theirs = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    ours = Split(Source("org/data"))
    assert ours.class_labels(3).tolist() == list(theirs["label"])
    assert ours.declared_classes() == theirs.features["label"].names
    base = tmp_path / "base"
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        base
    )
    processor = CLIPImageProcessorPil.from_pretrained(base)
    expected = torch.cat(
        [
            processor(images=[row["image"].convert("RGB")], return_tensors="pt")["pixel_values"]
            for row in theirs
        ]
    )
    assert torch.equal(_Pixels([ours], ImageProcessor(base))(list(range(30)))["pixel_values"], expected)
