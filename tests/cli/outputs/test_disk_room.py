"""What a merge takes on the disk is estimated, and refused where there is no room for it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import yaml
from output_folders import refusal, tree

from mingle.cli import main
from mingle.merging.merger import Merger
from mingle.runs import room
from mingle.tasks.clip import ClipTask


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
