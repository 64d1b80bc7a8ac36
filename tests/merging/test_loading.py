"""`mingle.load`: a merged model alone, from what was saved or exported, here or on the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from classifiers import NAMES, inputs, made, tuned
from standin_hub import contents
from tiny_merge import TinyMerge

import mingle
from mingle.io.files import CheckpointError
from mingle.merging.merger import Merger


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyMerge:
    tiny = TinyMerge(tmp_path_factory.mktemp("load"))
    tiny.routed()
    return tiny


@torch.no_grad()
def answers(model: torch.nn.Module) -> torch.Tensor:
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found: torch.Tensor = model.vision_model(pixel_values=pixels).pooler_output
    return found


def test_a_folder_gives_the_merged_model_ready_for_inference(models: TinyMerge, tmp_path: Path) -> None:
    for name in ("merged", "routed"):
        expected = Merger.from_pretrained(models.root / name).model
        model = mingle.load(models.root / name)
        assert not model.training
        assert torch.equal(answers(model), answers(expected))
    with pytest.raises(CheckpointError, match="a local folder has no revision 'main'"):
        mingle.load(models.root / "merged", "main")
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        mingle.load(tmp_path / "nowhere")


def test_exports_load_too(models: TinyMerge, tmp_path: Path) -> None:
    Merger.from_pretrained(models.root / "merged").export(tmp_path / "plain")
    plain = mingle.load(tmp_path / "plain")
    assert not plain.training
    assert torch.equal(answers(plain), answers(mingle.load(models.root / "merged")))
    with pytest.raises(ValueError, match="task 'a': .*plain holds one plain model; leave the task out"):
        mingle.load(tmp_path / "plain", task="a")
    Merger.from_pretrained(models.root / "routed").export(tmp_path / "adapters", format="peft")
    adapted = mingle.load(tmp_path / "adapters", base=models.inputs / "base")
    assert torch.equal(answers(adapted), answers(mingle.load(models.root / "routed")))
    with pytest.raises(CheckpointError, match="adapters of a base that is not on the hub; give it as base="):
        mingle.load(tmp_path / "adapters")


def test_tasks_with_heads_or_models_of_their_own_are_to_be_named(models: TinyMerge, tmp_path: Path) -> None:
    merger = Merger(made("vit"), "average")
    for number, names in enumerate(NAMES):
        merger.add(f"task {number}", tuned(merger.base, names, number), inputs(merger.base, seed=number))
    merger.save_pretrained(tmp_path / "heads")
    with pytest.raises(
        ValueError, match="each task has a model or a head .*; name one by task=, of task 0, task 1"
    ):
        mingle.load(tmp_path / "heads")
    served = mingle.load(tmp_path / "heads", task="task 0")
    assert served.num_labels == len(NAMES[0])
    with pytest.raises(ValueError, match="'task 2' is not among the merged ones: task 0, task 1"):
        mingle.load(tmp_path / "heads", task="task 2")


def test_a_folder_without_its_base_needs_it(models: TinyMerge, tmp_path: Path) -> None:
    merger = Merger.from_pretrained(models.root / "routed")
    merger.save_pretrained(tmp_path, include_base=False)
    assert "The base model is not in this folder" in (tmp_path / "README.md").read_text()
    with pytest.raises(CheckpointError, match="saved without its base model; give it as base="):
        mingle.load(tmp_path)
    model = mingle.load(tmp_path, base=models.inputs / "base")
    assert torch.equal(answers(model), answers(merger.model))


def test_the_hub_s_cache_gives_a_merge_at_any_revision_offline(
    models: TinyMerge, hub, tmp_path: Path
) -> None:
    """Its files are links to blobs, those of the base in a folder of its own."""
    first = hub.add("me/merged", contents(models.root / "merged"))
    second = hub.add("me/merged", contents(models.root / "routed"))
    for revision, name in ((None, "routed"), (first, "merged"), (second, "routed"), ("main", "routed")):
        model = mingle.load("me/merged", revision)
        assert torch.equal(answers(model), answers(mingle.load(models.root / name)))
    Merger.from_pretrained(models.root / "merged").export(tmp_path / "plain")
    hub.add("me/plain", contents(tmp_path / "plain"))
    assert torch.equal(answers(mingle.load("me/plain")), answers(mingle.load(models.root / "merged")))
    with pytest.raises(CheckpointError, match="me/other: not in the hub's cache .* and offline"):
        mingle.load("me/other")
    with pytest.raises(CheckpointError, match="me/merged: not in the hub's cache .* at revision 'v2'"):
        mingle.load("me/merged", "v2")


def test_adapters_on_the_hub_find_their_base_there(models: TinyMerge, hub, tmp_path: Path) -> None:
    hub.add("me/base", contents(models.inputs / "base"))
    merger = Merger(hub.snapshot("me/base"), "mass", rank=2)
    merger.add("a", models.inputs / "a")
    merger.export(tmp_path / "adapters", format="peft")
    hub.add("me/adapters", contents(tmp_path / "adapters"))
    assert torch.equal(answers(mingle.load("me/adapters")), answers(merger.model))


def test_a_link_in_a_cached_folder_that_leads_elsewhere_is_refused(
    models: TinyMerge, hub, tmp_path: Path
) -> None:
    hub.add("me/merged", contents(models.root / "merged"))
    weights = next(hub.snapshot("me/merged").glob("base-*/model.safetensors"))
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(weights.read_bytes())
    weights.unlink()
    weights.symlink_to(outside)
    with pytest.raises(CheckpointError, match="refusing a symlink to .*outside"):
        mingle.load("me/merged")
