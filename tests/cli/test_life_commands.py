"""`remove`, `rollback`, `tidy`, and what `inspect` says of generations: as a user sees them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tiny_merge import TinyMerge, contents

from mingle.cli import main
from mingle.io.manifest import read_manifest
from mingle.merging.merger import Merger
from mingle.runs import config, life
from mingle.runs.check import check


@pytest.fixture
def averaged(models: TinyMerge, tmp_path: Path) -> Path:
    shutil.copytree(models.root / "merged", tmp_path / "averaged")
    return tmp_path / "averaged"


@pytest.fixture
def routed(models: TinyMerge, tmp_path: Path) -> Path:
    shutil.copytree(models.routed(), tmp_path / "routed")
    return tmp_path / "routed"


def said(models: TinyMerge) -> str:
    return " ".join(models.said.read_text().split())


def test_inspect_lists_generations_with_what_came_and_left(models: TinyMerge, routed: Path) -> None:
    assert models.remove(routed, "b")() == 0
    assert "b: nothing of it stays" in said(models)
    listed = life.history(routed)
    assert [(each.number, each.parent, each.current, each.came, each.left) for each in listed] == [
        (1, None, False, ["a", "b"], []),
        (2, 1, True, [], ["b"]),
    ]
    [gone] = [path.stat().st_size for path in routed.glob("tasks/001-b-*")]
    assert [each.own_bytes for each in listed] == [gone, 0]
    assert models._command("inspect", routed)() == 0
    assert "in use: 2 │ 1 │ 1" in said(models) and "− b" in said(models)
    assert models.rollback(routed, 1)() == 0
    assert "generation 1: a, b" in said(models)
    assert Merger.from_pretrained(routed).task_names == ["a", "b"]


def test_several_tasks_leave_as_one_generation_and_merging_goes_on(models: TinyMerge, routed: Path) -> None:
    assert models.remove(routed, "b", "a")() == 0
    assert Merger.from_pretrained(routed).task_names == []
    assert read_manifest(routed)["generation"] == 2
    assert models._command("inspect", routed)() == 0
    merger = Merger.from_pretrained(routed)
    merger.add("b", models.inputs / "b", samples_of(merger))
    merger.save_pretrained(routed)
    assert Merger.from_pretrained(routed).task_names == ["b"]


def samples_of(merger: Merger) -> dict[str, object]:
    import torch

    return {"pixel_values": torch.randn(4, 3, 8, 8), "text_embeds": torch.randn(2, 8)}


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("bb",), "task 'bb' is not among the merged ones: a, b; did you mean 'b'?"),
        (("a", "a"), "task 'a' is named twice"),
        (("a", "x"), "task 'x' is not among the merged ones:"),
    ],
)
def test_names_that_cannot_leave_are_refused_and_nothing_changes(
    models: TinyMerge, routed: Path, names: tuple[str, ...], reason: str
) -> None:
    before = contents(routed)
    assert models.remove(routed, *names)() == 2
    assert reason in said(models)
    assert contents(routed) == before


def test_a_sum_is_refused_with_the_generation_that_does_not_have_the_task(
    models: TinyMerge, averaged: Path
) -> None:
    before = contents(averaged)
    assert models.remove(averaged, "c")() == 2
    assert "task 'c' cannot be removed: method 'average' keeps all that it merged as one" in said(models)
    assert f"generation 2 does not have it: `mingle rollback {averaged} --to 2`" in said(models)
    assert contents(averaged) == before
    assert models.remove(averaged, "a")() == 2
    assert "generation" not in said(models)  # all of them have it


def test_what_stays_is_printed_and_in_the_card_and_inspect(models: TinyMerge, tmp_path: Path) -> None:
    merger = Merger(models.inputs / "base", "mingle", rank=2, steps=1, k=1)
    for name in "abc":
        merger.add(name, models.inputs / name, samples_of(merger))
    merger.save_pretrained(tmp_path)
    assert models.remove(tmp_path, "b")() == 0
    lines = read_manifest(tmp_path)["removed"][0]["stays"]
    assert len(lines) == 3
    for where in (said(models), " ".join((tmp_path / "README.md").read_text().split())):
        assert all(f"b: {line}" in where for line in lines)
    assert "; concerns c" in (tmp_path / "README.md").read_text()
    assert models._command("inspect", tmp_path)() == 0
    assert all(f"b, removed: {line}" in said(models) for line in lines)
    export = tmp_path / "adapters"
    assert models.export(tmp_path, export, "--format", "peft")() == 0
    assert all(f"b: {line}" in " ".join((export / "README.md").read_text().split()) for line in lines)
    back = Merger.from_adapters(models.inputs / "base", export)
    assert [(task.stays, task.tasks) for task in back.removed] == [(lines, ["c"])]
    assert models.remove(tmp_path, "c")() == 0  # with what it had of b
    assert "removed" not in read_manifest(tmp_path)


@pytest.mark.slow
def test_a_task_that_left_is_measured_without(few_images: None, tmp_path: Path) -> None:
    """`remove` and then `eval` say what `eval` says of a merge that never had it."""
    from mingle import suites

    suite = suites.load("glyphs4")
    for folder, left_out in (("all", None), ("without", 1)):
        merger = Merger(suite.base, "mass", rank=4)
        for number, name in enumerate(list(suite)[:3]):
            if number != left_out:
                merger.add(name, suite.expert(name))
        merger.metadata = {"suite": "glyphs4"}
        merger.save_pretrained(tmp_path / folder)
    name = list(suite)[1]
    assert main(["remove", str(tmp_path / "all"), name]) == 0
    ended, never = (Merger.from_pretrained(tmp_path / folder) for folder in ("all", "without"))
    result = never.evaluate(suite, 128)
    assert None not in ended.matrix[-1]
    assert (ended.matrix[-1], ended.unknown[-1]) == (result.matrix[-1], result.unknown[-1])


def test_tidy_says_what_it_frees(models: TinyMerge, averaged: Path) -> None:
    before = contents(averaged)
    assert models.tidy(averaged, "--dry-run")() == 0
    told = said(models)
    assert contents(averaged) == before
    assert models.tidy(averaged)() == 0
    assert said(models) == told.replace("would be freed", "were freed")
    freed = int(told.split(": ")[1].split()[0].replace(",", ""))
    assert freed > 2 * (averaged / read_manifest(averaged)["state"]["file"]).stat().st_size
    assert models.tidy(averaged, "--keep", "9")() == 0
    assert "0 bytes were freed" in said(models)


@pytest.mark.parametrize("command", ["remove", "rollback", "tidy"])
def test_folders_without_a_merge_are_refused(models: TinyMerge, tmp_path: Path, command: str) -> None:
    words = {"remove": ("a",), "rollback": ("--to", "1"), "tidy": ()}[command]
    assert models._command(command, tmp_path, *words)() == 2
    assert f"{tmp_path}/manifest.json: missing" in said(models)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [("rollback", "x"), ("rollback", "x", "--to", "0"), ("tidy", "x", "--keep", "0")]
)
def test_numbers_that_no_generation_has_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 2


def test_the_yaml_key_keep_bounds_what_a_merge_leaves(
    models: TinyMerge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.write_config("abc", keep=2)
    assert models.merge(tmp_path / "out")() == 0
    assert [each.number for each in life.history(tmp_path / "out")] == [2, 3]
    assert models.add(tmp_path / "out", "a")() == 2  # already merged
    shutil.copytree(models.inputs / "a", models.inputs / "d", dirs_exist_ok=True)
    assert models.add(tmp_path / "out", "d")() == 0
    assert [each.number for each in life.history(tmp_path / "out")] == [3, 4]
    models.write_config("abc", keep=0)
    assert models.merge(tmp_path / "none")() == 2
    assert "keep=0: expected a positive integer" in said(models)


def test_a_merge_that_is_done_keeps_what_keep_says_now(models: TinyMerge, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for keep, numbers in ((None, [1, 2, 3]), (2, [2, 3]), (1, [3]), (3, [3])):
        models.write_config("abc", **({} if keep is None else {"keep": keep}))
        assert models.merge(out)() == 0
        assert [each.number for each in life.history(out)] == numbers
        assert read_manifest(out)["keep"] == keep


def test_room_is_asked_for_every_generation_that_is_kept(
    models: TinyMerge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {}
    for keep in (None, 1):
        models.write_config("abc", **({} if keep is None else {"keep": keep}))
        path = models.inputs / "merge.yaml"
        assert yaml.safe_load(path.read_text()).get("keep") == keep
        with monkeypatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=0, used=0, free=0))
            with pytest.raises(ValueError, match="disk full: ([0-9]+) bytes") as refused:
                check(config.load(path), tmp_path / "out")
        sizes[keep] = int(str(refused.value).split("disk full: ")[1].split()[0])
        notes = getattr(refused.value, "__notes__", [])
        assert len(notes) == (1 if keep is None else 0)
        folder = tmp_path / f"out-{keep}"
        assert models.merge(folder)() == 0
        taken = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        assert taken <= sizes[keep] + (64 << 10)
        if keep is None:
            least = int(notes[0].split()[-1])
    assert sizes[1] == least < sizes[None]


def test_a_card_that_somebody_has_edited_is_left_alone(models: TinyMerge, averaged: Path) -> None:
    card = averaged / "README.md"
    card.write_text(card.read_text().replace("# 3 tasks", "# My three tasks"))
    edited = card.read_text()
    assert models.rollback(averaged, 1)() == 0
    assert card.read_text() == edited
    card.unlink()
    assert models.rollback(averaged, 2)() == 0
    assert "# 2 tasks in one model" in card.read_text()


def test_a_card_that_an_interruption_left_behind_is_put_right(models: TinyMerge, averaged: Path) -> None:
    old = (averaged / "README.md").read_bytes()
    assert models.rollback(averaged, 2)() == 0
    new = (averaged / "README.md").read_bytes()
    (averaged / "README.md").write_bytes(old)  # as if killed between manifest and card
    assert models.remove(averaged, "nobody")() == 2  # whoever writes to the folder next
    assert (averaged / "README.md").read_bytes() == new != old
    json.loads((averaged / "manifest.json").read_text())
