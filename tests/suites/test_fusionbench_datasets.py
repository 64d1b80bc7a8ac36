"""Data sets from Parquet: which files, columns and rows, and what a user is told of a data set that is not as
expected.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pyarrow", reason="the suites of the papers read Parquet files")

from standin_hub import images, table

from mingle.io.files import CheckpointError
from mingle.suites.fusionbench.datasets import Source
from mingle.suites.fusionbench.layout import DatasetError
from mingle.suites.fusionbench.loading import Split

REPO = "tanganke/eurosat"
SOURCE = Source(REPO)
CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - split: test
    path: [data/held-out-*, more/test.parquet]
- config_name: other
  data_files:
  - split: test
    path: other/*
---
# A data set
"""


def add(hub, files, repo=REPO, ref="main"):
    return hub.add(repo, files, "dataset", ref)


def labels(source=SOURCE, classes=3) -> list[int]:
    return Split(source).class_labels(classes).tolist()


def test_shards_and_row_groups_are_one_sequence_of_rows(hub):
    shards = {
        f"data/test-{i:05d}-of-00003-0a1b.parquet": table(images(count, 3, first=10 * i))
        for i, count in enumerate((5, 9, 1))
    }
    add(hub, {**shards, "data/train-00000-of-00001-0a1b.parquet": table(images(2, 3))})
    split = Split(SOURCE)
    assert len(split) == 15
    expected = [*range(5), *range(10, 19), 20]
    assert split.class_labels(3).tolist() == [i % 3 for i in expected]
    for wanted in ([14, 0, 6], [4, 5], [3, 3], range(15), []):
        assert [row["image"]["path"] for row in split.rows(wanted)] == [f"{expected[i]}.png" for i in wanted]
    assert "data/test-00001-of-00003-0a1b.parquet, row 8" in split.place(13)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (SOURCE, ["data/test-00000-of-00001.parquet", "data/test_contrast-00000-of-00001.parquet"]),
        (SOURCE, ["test.parquet", "train.parquet", "latest.parquet"]),
        (SOURCE, ["default/test/0000.parquet", "default/train/0000.parquet"]),
        (
            Source(REPO, config="cropped_digits"),
            ["cropped_digits/test-00000-of-00001.parquet", "full/test-00000-of-00001.parquet"],
        ),
        (
            Source(REPO, "validation_matched"),
            ["validation_matched-00000-of-00001.parquet", "validation_mismatched-00000-of-00001.parquet"],
        ),
        (
            Source(REPO, "contrast"),
            ["data/contrast-00000-of-00001-ab.parquet", "data/test-00000-of-00001-ab.parquet"],
        ),
    ],
)
def test_files_are_found_by_their_names(hub, source, names):
    add(hub, {name: table(images(i + 2, 3)) for i, name in enumerate(names)})
    assert len(Split(source)) == 2


def test_the_card_says_which_files_are_a_split(hub):
    files = {
        "data/held-out-0.parquet": 3,
        "more/test.parquet": 4,
        "data/test-00000-of-00001.parquet": 5,
        "other/x.parquet": 6,
    }
    add(hub, {"README.md": CARD.encode(), **{name: table(images(count, 3)) for name, count in files.items()}})
    assert len(Split(SOURCE)) == 7
    assert len(Split(Source(REPO, config="other"))) == 6
    with pytest.raises(
        DatasetError, match=f"{REPO}, split 'tset': no files of this split at .*it has train, test"
    ):
        Split(Source(REPO, "tset"))


@pytest.mark.parametrize(
    "card",
    [b"# no head", b"---\nconfigs: [\n---\n", b"---\nconfigs: 3\n---\n", b"---\na: 1\n---\n", b"\xff\xfe"],
)
def test_a_card_that_says_nothing_leaves_it_to_the_names(hub, card):
    add(hub, {"README.md": card, "data/test-00000-of-00001.parquet": table(images(3, 3))})
    assert len(Split(SOURCE)) == 3


def test_a_data_set_of_another_form_is_read_from_the_hub_s_own_copy(hub):
    source = Source("clip-benchmark/wds_fer2013", columns=("jpg",), labels=("cls",))
    add(hub, {"test/0.tar": b"", "README.md": b""}, source.repo)
    with pytest.raises(
        DatasetError, match="no Parquet files at .*nor under refs/convert/parquet.*hf download"
    ):
        Split(source)
    commit = add(
        hub,
        {"default/test/0000.parquet": table(images(4, 2, "jpg", "cls"))},
        source.repo,
        "refs/convert/parquet",
    )
    revisions: dict[str, str] = {}
    assert Split(source, revisions).class_labels(2).tolist() == [0, 1, 0, 1]
    assert revisions == {f"datasets/{source.repo}": commit}
    assert len(Split(source, revisions)) == 4


def test_the_noted_commit_is_read(hub):
    first = add(hub, {"data/test-00000-of-00001.parquet": table(images(3, 3))})
    revisions: dict[str, str] = {}
    Split(SOURCE, revisions)
    add(hub, {"data/test-00000-of-00001.parquet": table(images(9, 3))})
    assert len(Split(SOURCE, revisions)) == 3 and revisions == {f"datasets/{REPO}": first}
    assert len(Split(SOURCE)) == 9


def test_a_wrong_split_names_those_that_are_there(hub):
    add(
        hub,
        {f"data/{split}-00000-of-00001.parquet": table(images(3, 3)) for split in ("train", "validation")},
    )
    with pytest.raises(
        DatasetError,
        match=f"{REPO}, split 'test': no files of this split.*it has train, validation.*hf download {REPO}",
    ):
        Split(SOURCE)


def test_a_missing_shard_is_named(hub):
    add(hub, {f"data/test-{i:05d}-of-00004-ab.parquet": table(images(3, 3)) for i in (0, 3)})
    with pytest.raises(
        DatasetError,
        match=f"{REPO}, split 'test': shards 00001-of-00004, 00002-of-00004 are missing.*hf download",
    ):
        Split(SOURCE)


@pytest.mark.parametrize(("column", "renamed"), [("image", "img"), ("label", "labels")])
def test_a_renamed_column_is_named_with_those_that_are_there(hub, column, renamed):
    columns = {renamed if name == column else name: values for name, values in images(3, 3).items()}
    add(hub, {"data/test-00000-of-00001.parquet": table(columns)})
    with pytest.raises(
        DatasetError,
        match=rf"{REPO}, split 'test': no column '{column}'.*test-00000-of-00001.parquet; it has .*{renamed}",
    ):
        Split(SOURCE)


def test_a_column_missing_in_one_shard_only_is_found_before_any_row_is_read(hub):
    whole, lacking = images(3, 3), images(3, 3)
    del lacking["label"]
    add(
        hub,
        {
            "data/test-00000-of-00002.parquet": table(whole),
            "data/test-00001-of-00002.parquet": table(lacking),
        },
    )
    with pytest.raises(DatasetError, match="no column 'label' in test-00001-of-00002.parquet"):
        Split(SOURCE)


def test_labels_of_other_names_are_taken_in_the_order_given(hub):
    columns = images(4, 3) | {"fine_label": [2, 1, 0, 2]}
    add(hub, {"data/test-00000-of-00001.parquet": table(columns)})
    assert labels(Source(REPO, labels=("fine_label", "label"))) == [2, 1, 0, 2]
    assert labels(Source(REPO, labels=("coarse_label", "label"))) == [0, 1, 2, 0]


@pytest.mark.parametrize("wrong", [3, -1, "forest", None, 1.5])
def test_a_label_that_is_not_a_class_is_named_with_its_row(hub, wrong):
    given = [0, 1, wrong, 2] if isinstance(wrong, int | None) else [wrong] * 4
    add(
        hub,
        {
            "data/test-00000-of-00001.parquet": table(
                {"image": images(4, 3)["image"], "label": given}, group=2
            )
        },
    )
    with pytest.raises(DatasetError, match=f"{REPO}, split 'test': row {given.index(wrong)} has .*label"):
        labels()


def test_truth_values_are_classes(hub):
    add(
        hub,
        {
            "data/test-00000-of-00001.parquet": table(
                {"image": images(3, 2)["image"], "label": [True, False, True]}
            )
        },
    )
    found = Split(SOURCE).class_labels(2)
    assert found.tolist() == [1, 0, 1] and found.dtype == torch.int64


def test_an_empty_split_is_refused(hub):
    add(hub, {"data/test-00000-of-00001.parquet": table({"image": [], "label": []})})
    with pytest.raises(
        DatasetError, match=f"{REPO}, split 'test': no rows in data/test-00000-of-00001.parquet"
    ):
        Split(SOURCE)


def test_damaged_files_are_named(hub):
    data = table({"image": images(40, 3)["image"], "label": [i % 3 for i in range(40)]})
    add(hub, {"data/test-00000-of-00001.parquet": data[:-20]})
    with pytest.raises(DatasetError, match=r"test-00000-of-00001.parquet is not a readable Parquet file"):
        Split(SOURCE)
    torn = data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :]
    add(hub, {"data/test-00000-of-00001.parquet": torn})
    with pytest.raises(DatasetError, match=r"test-00000-of-00001.parquet is damaged"):
        Split(SOURCE).rows([0])


def test_a_file_outside_the_cache_is_not_opened(hub, tmp_path):
    add(hub, {"data/test-00000-of-00001.parquet": table(images(3, 3))})
    link = hub.snapshot(REPO, "dataset") / "data/test-00000-of-00001.parquet"
    outside = tmp_path / "outside.parquet"
    outside.write_bytes(link.read_bytes())
    link.unlink()
    link.symlink_to(outside)
    with pytest.raises(CheckpointError, match="refusing a symlink"):
        Split(SOURCE)


def test_the_data_set_s_own_class_names(hub):
    add(hub, {"data/test-00000-of-00001.parquet": table(images(3, 3), {"label": ["a", "b", "c"]})})
    assert Split(SOURCE).declared_classes() == ["a", "b", "c"]
    add(hub, {"data/test-00000-of-00001.parquet": table(images(3, 3))})
    with pytest.raises(DatasetError, match="the column 'label' declares no class names"):
        Split(SOURCE).declared_classes()
