"""Model cards: what the hub reads at their head, licences of what was merged, and hostile names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from tiny_merge import TinyMerge

from mingle.io.folder_card import card
from mingle.io.hub import ModelName
from mingle.io.licenses import in_conflict, license_of
from mingle.io.manifest import read_manifest
from mingle.merging.merger import Merger


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyMerge:
    return TinyMerge(tmp_path_factory.mktemp("cards"))


def front(text: str) -> dict[str, object]:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def named(folder: Path, license: str | None) -> None:
    line = "" if license is None else f"license: {license}\n"
    (folder / "README.md").write_text(f"---\ntags: [x]\n{line}---\n\n# a model\n")


def licensed(models: TinyMerge, tmp_path: Path, *licenses: str | None) -> Merger:
    """A merge of models whose cards name these, the base's first."""
    shutil.copytree(models.inputs, tmp_path / "inputs")
    merger = None
    for name, license in zip(("base", *"ab"), licenses, strict=True):
        named(tmp_path / "inputs" / name, license)
        if merger is None:
            merger = Merger(tmp_path / "inputs" / "base", "average")
        else:
            merger.add(name, tmp_path / "inputs" / name)
    return merger


def test_one_licence_of_all_is_that_of_the_merge(models: TinyMerge, tmp_path: Path) -> None:
    merger = licensed(models, tmp_path, "mit", "MIT", "mit")
    for folder in (tmp_path / "merged", tmp_path / "plain"):
        merger.save_pretrained(folder) if folder.name == "merged" else merger.export(folder)
        text = (folder / "README.md").read_text()
        library = {"merged": "mingle", "plain": "transformers"}[folder.name]
        assert front(text) == {
            "library_name": library,
            "pipeline_tag": "zero-shot-image-classification",
            "license": "mit",
            "tags": ["merge", "mingle"],
        }
        assert "| base | `base` | mit |" in text and "Warning" not in text
    assert Merger.from_pretrained(tmp_path / "merged").merged[1].model == ModelName("b", None, "mit")
    assert read_manifest(tmp_path / "merged")["base"]["license"] == "mit"


def test_licences_that_do_not_go_together_are_warned_of(models: TinyMerge, tmp_path: Path) -> None:
    merger = licensed(models, tmp_path, "apache-2.0", "cc-by-nc-4.0", None)
    merger.save_pretrained(tmp_path / "merged")
    text = (tmp_path / "merged" / "README.md").read_text()
    assert "license" not in front(text)  # of one, nothing is known
    assert "**Warning:** these licences differ" in text
    assert "| a | `a` | cc-by-nc-4.0 |\n| b | `b` | not named in its card |" in text
    assert front(card(with_license(tmp_path / "merged", "mit")))["license"] == "other"


def with_license(folder: Path, license: str) -> dict[str, object]:
    manifest = read_manifest(folder)
    manifest["tasks"][1]["model"]["license"] = license
    return manifest


@pytest.mark.parametrize(
    ("licenses", "conflict"),
    [
        (["mit", "apache-2.0", None], False),
        (["mit", "mit"], False),
        (["gpl-3.0", "gpl-3.0"], False),
        (["mit", "cc-by-nc-4.0"], True),
        (["llama3", "gemma"], True),
        ([None, "llama3"], False),
        ([], False),
    ],
)
def test_what_counts_as_a_conflict(licenses: list[str | None], conflict: bool) -> None:
    assert in_conflict(licenses) is conflict


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: MIT\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: my-own\n---\n", "my-own"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: [mit, bsd]\n---\n", None),
        ("---\nlicense: 'a | b <script>'\n---\n", None),
        ("---\nlicense: mit: x\n---\n", None),
        ("---\n- mit\n---\n", None),
        ("license: mit\n", None),
        ("---\nlicense: &a [*a]\n---\n", None),
        ("\0\udcff", None),
    ],
)
def test_what_a_card_names(tmp_path: Path, text: str, found: str | None) -> None:
    (tmp_path / "README.md").write_bytes(text.encode(errors="surrogateescape"))
    assert license_of(tmp_path) == found


def test_a_card_that_is_no_card_is_not_read(tmp_path: Path) -> None:
    assert license_of(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n" + " " * (1 << 20))
    assert license_of(tmp_path) is None


def test_hub_names_are_those_of_base_and_models(models: TinyMerge, tmp_path: Path) -> None:
    models_at = tmp_path / "models--org--b" / "snapshots" / ("0" * 40)
    shutil.copytree(models.inputs / "a", models_at)
    named(models_at, "mit")
    merger = Merger(models.inputs / "base", "mass", rank=2)
    merger.add("x", models_at)
    merger.base_name = ModelName("org/base", "1" * 40)
    merger.save_pretrained(tmp_path / "merged")
    metadata = front((tmp_path / "merged" / "README.md").read_text())
    assert metadata["base_model"] == ["org/base", "org/b"]
    assert metadata["base_model_relation"] == "merge"
    assert merger.merged[0].model == ModelName("org/b", "0" * 40, "mit")
    merger.export(tmp_path / "adapters", format="peft")
    metadata = front((tmp_path / "adapters" / "README.md").read_text())
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("org/base", "adapter")


def test_hostile_names_do_nothing_in_a_card(models: TinyMerge, tmp_path: Path) -> None:
    name = "a|b\n---\n<script>`[x](y) \u202e"
    merger = Merger(models.inputs / "base", "average")
    merger.add(name, models.inputs / "a")
    merger.save_pretrained(tmp_path)
    manifest = read_manifest(tmp_path)
    manifest["base"] |= {"name": "x\n---\n`", "license": "mit |\n---"}
    manifest["tasks"][0]["model"] = {"name": "e`vil\n", "license": "l|\n"}
    manifest["method"] = "av`erage\n"
    text = card(manifest)
    assert text.count("\n---\n") == 1 and "<script>" not in text and "\u202e" not in text
    assert set(front(text)) == {"library_name", "pipeline_tag", "license", "license_name", "tags"}
    rows = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("| ")]
    assert {row.count("|") for row in rows} == {3, 4, 5}
