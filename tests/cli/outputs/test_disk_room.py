"""What a merge takes on the disk is estimated, and refused where there is no room for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from output_folders import refusal, tree

from mingle.cli import main
from mingle.io.journal import Journal
from mingle.io.leftovers import finished_bytes
from mingle.io.manifest import read_manifest
from mingle.merging.merger import Merger
from mingle.runs import room
from mingle.runs.check import check
from mingle.runs.config import load
from mingle.runs.forecast import Forecast
from mingle.tasks.clip import ClipTask

SPARE = 16 << 20


def with_free(monkeypatch, free: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(total=0, used=0, free=free))


def test_a_disk_without_room_is_refused_before_work(config, tmp_path, base_folder, capsys, monkeypatch):
    size = room.of_merge("individual", {}, base_folder, ClipTask())
    needed, spare = size.base + 2 * size.task, 16 << 20
    with_free(monkeypatch, needed + spare - 1)
    text = refusal(capsys, "merge", config, "--out", tmp_path / "out")
    assert f"{tmp_path}/out: disk full: {needed} bytes and {spare} spare are needed" in text
    assert f"{needed + spare - 1} are free" in text
    assert not (tmp_path / "out").exists()
    few = ("--suite", "glyphs4", "--methods", "average", "--out", tmp_path / "x")
    assert "disk full" in refusal(capsys, "demo", *few)
    assert "disk full" in refusal(capsys, "reproduce", "main", *few)
    monkeypatch.undo()
    assert main(["merge", str(config), "--out", str(tmp_path / "out")]) == 0
    with_free(monkeypatch, spare)
    before = tree(tmp_path / "out")
    model = json.loads(json.dumps(yaml.safe_load(config.read_text())))["experts"][0]["model"]
    assert "disk full" in refusal(capsys, "add", tmp_path / "out", "--name", "new", "--model", model)
    assert "disk full" in refusal(
        capsys, "export", tmp_path / "out", "--task", "task 0", "--out", tmp_path / "plain"
    )
    assert tree(tmp_path / "out") == before
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize(
    "method", ["average", "individual", "pre-trained", "opcm", "consensus-ta", "tsv-m", "iso-c", "wudi"]
)
def test_the_estimate_covers_what_a_merge_takes(method, config, tmp_path, base_folder):
    content = yaml.safe_load(config.read_text()) | {"method": method}
    if method == "consensus-ta":
        content["options"] = {"masks": "all"}
    config.write_text(yaml.safe_dump(content))
    assert main(["merge", str(config), "--out", str(tmp_path / "out")]) == 0
    taken = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors"))
    size = room.of_merge(method, content.get("options", {}), base_folder, ClipTask())
    headers = 64 << 10
    assert taken <= size.base + size.saved_each(2) + headers
    assert size.base + size.saved_each(2) < 4 * taken


@pytest.mark.parametrize("method", ["mingle", "routed", "wemoe"])
def test_the_estimate_covers_experts(method, base_folder, tuned_states, samples, tmp_path):
    options = {"rank": 4} | ({} if method == "routed" else {"steps": 1})
    options |= {"depths": (0,)} if method == "routed" else {}
    merger = Merger(base_folder, method, **options)
    for i in range(2):
        merger.add(f"task {i}", tuned_states[i], samples[i])
    merger.save_pretrained(tmp_path)
    size = room.of_merge(method, options, base_folder, ClipTask())
    largest = max(path.stat().st_size for path in (tmp_path / "tasks").iterdir())
    assert size.task / 2 < largest < size.task + (64 << 10)


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def streamed(config: Path) -> Callable[..., Forecast]:
    """Rewrites the config for a merge from files, and returns what `check` says of it."""

    def written(method: str, **more: Any) -> Forecast:
        content = {key: yaml.safe_load(config.read_text())[key] for key in ("base", "experts")}
        config.write_text(yaml.safe_dump(content | {"method": method} | more))
        forecast = check(load(config)).forecast
        assert forecast is not None
        return forecast

    return written


@pytest.mark.parametrize("more", [{}, {"keep": 1}], ids=str)
@pytest.mark.parametrize("method", ["average", "ties", "opcm"])
def test_a_merge_from_files_needs_what_check_says(
    method, more, streamed, config, tmp_path, capsys, monkeypatch
):
    disk = streamed(method, **more).disk
    with_free(monkeypatch, disk + SPARE - 1)
    text = refusal(capsys, "merge", config, "--out", tmp_path / "out")
    assert f"disk full: {disk} bytes and {SPARE} spare are needed" in text
    with_free(monkeypatch, disk + SPARE)
    assert main(["merge", str(config), "--out", str(tmp_path / "out")]) == 0
    assert bytes_in(tmp_path / "out") < disk + (128 << 10)  # pages and headers
    with_free(monkeypatch, SPARE + (64 << 10))  # for the page
    assert main(["merge", str(config), "--out", str(tmp_path / "out")]) == 0  # there is nothing left to do


def test_what_an_interrupted_merge_has_finished_needs_no_room_again(
    streamed, config, tmp_path, capsys, monkeypatch
):
    """In its second step, with what was set aside of all tensors and one part of the result."""
    disk, out = streamed("opcm").disk, tmp_path / "out"
    monkeypatch.setattr("mingle.merging.streamed.PART_BYTES", 1)
    write, results = Journal.write, []

    def killed(journal: Journal, *arguments: Any, aside: bool = False) -> None:
        if not aside and (out / "manifest.json").exists():
            results.append(arguments)
            if len(results) == 2:
                raise KeyboardInterrupt
        write(journal, *arguments, aside=aside)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", killed)
        assert main(["merge", str(config), "--out", str(out)]) == 1
    assert len(read_manifest(out)["tasks"]) == 1 and finished_bytes(out) > 0
    left = disk - bytes_in(out)
    capsys.readouterr()
    with_free(monkeypatch, left // 2)
    assert "disk full" in refusal(capsys, "merge", config, "--out", out)
    with_free(monkeypatch, left + SPARE + (32 << 10))  # headers and notes of small tensors
    assert main(["merge", str(config), "--out", str(out)]) == 0
    assert len(read_manifest(out)["tasks"]) == 2
