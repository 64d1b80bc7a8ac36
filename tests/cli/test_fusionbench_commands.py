"""The suites of the papers as a user runs them, on a stand-in of the hub."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="the suites of the papers read Parquet files")

import standin_hub as standin
import yaml
from standin_hub import BASE, EUROSAT, SVHN, TEST_FILE, images, table

from mingle.cli import main
from mingle.suites.fusionbench.datasets import IMAGE_SUITES, IMAGE_TASKS, ImageSuite

#: commands one after another, until one fails
COMMANDS = """
import json, sys
from mingle.cli import main
for arguments in json.loads(sys.argv[1]):
    if code := main(arguments):
        sys.exit(code)
"""


def user(hub, tmp_path: Path, *commands: list[str]) -> subprocess.CompletedProcess[str]:
    """Commands as a user runs them, offline; only the environment says where the hub's cache is."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {
        "HF_HOME": str(hub.home),
        "PYTHONPATH": str(tmp_path / "packages"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    return subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )


def write_config(tmp_path: Path, tasks=("eurosat", "svhn"), **changes) -> str:
    content = {
        "base": BASE,
        "method": "mingle",
        "experts": [{"name": task, "model": f"tanganke/clip-vit-base-patch32_{task}"} for task in tasks],
        "rank": 4,
        "adapt": {"steps": 2, "samples_per_class": 1},
        "eval": {"suite": "clip-b32-8"},
    } | changes
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.slow
def test_check_merge_and_eval_as_a_user_runs_them(image_hub, tmp_path):
    config, out = write_config(tmp_path), tmp_path / "merged"
    commands = (["check", config], ["merge", config, "--out", str(out)], ["eval", str(out)])
    done = user(image_hub, tmp_path, *([*command, "--offline"] for command in commands))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 2 experts fit" in done.stdout and done.stdout.count("ACC") >= 2
    manifest = json.loads((out / "manifest.json").read_text())
    assert [task["name"] for task in manifest["tasks"]] == ["eurosat", "svhn"]
    models = [BASE, *(f"tanganke/clip-vit-base-patch32_{task}" for task in ("eurosat", "svhn"))]
    expected = {model: image_hub.snapshot(model).name for model in models}
    expected |= {f"datasets/{repo}": image_hub.snapshot(repo, "dataset").name for repo in (EUROSAT, SVHN)}
    assert manifest["metadata"]["revisions"] == expected


def test_resuming_adding_and_evaluating_keep_to_the_commits_of_the_beginning(image_hub, tmp_path, capsys):
    out, model = tmp_path / "merged", "tanganke/clip-vit-base-patch32_eurosat"
    assert main(["merge", write_config(tmp_path, ["eurosat"]), "--out", str(out)]) == 0
    before = json.loads((out / "manifest.json").read_text())
    first = image_hub.snapshot(model).name
    image_hub.add(EUROSAT, {TEST_FILE: table(images(4, 2))}, "dataset")
    second = image_hub.add(model, standin.clip_expert(tmp_path / "models/again", standin.clip(), 9))
    assert main(["merge", write_config(tmp_path), "--out", str(out)]) == 0
    after = json.loads((out / "manifest.json").read_text())
    assert after["tasks"][0]["tensors"] == before["tasks"][0]["tensors"]
    assert before["metadata"]["revisions"].items() <= after["metadata"]["revisions"].items()
    assert after["metadata"]["revisions"][model] == first
    capsys.readouterr()
    assert main(["merge", write_config(tmp_path, revisions={model: second}), "--out", str(out)]) == 2
    assert f"started with {model} at commit {first}, not {second}" in capsys.readouterr().out
    assert main(["eval", str(out)]) == 0
    assert main(["add", str(out), "--name", "mnist", "--model", model, "--revision", second]) == 2
    assert (
        f"{model}: revision '{second}' is commit {second}, but commit {first} is in use"
        in capsys.readouterr().out
    )


def test_commits_can_be_named_in_the_config(image_hub, tmp_path):
    first = image_hub.snapshot(EUROSAT, "dataset").name
    image_hub.add(EUROSAT, {TEST_FILE: b"broken"}, "dataset")
    assert main(["check", write_config(tmp_path)]) == 2
    assert main(["check", write_config(tmp_path, revisions={f"datasets/{EUROSAT}": first})]) == 0


@pytest.fixture
def two_tasks(image_hub, monkeypatch):
    """``clip-b32-8`` with two of its tasks only."""
    chosen = tuple(task for task in IMAGE_TASKS if task.name in ("eurosat", "svhn"))
    monkeypatch.setitem(IMAGE_SUITES, "clip-b32-8", ImageSuite(BASE, chosen))
    return image_hub


def test_demo_on_a_suite_of_the_papers(two_tasks, tmp_path):
    arguments = [
        "--suite",
        "clip-b32-8",
        "--methods",
        "individual,average,mingle",
        "--set",
        "steps=2",
        "--set",
        "rank=2",
    ]
    assert main(["demo", *arguments, "--out", str(tmp_path / "demo"), "--offline"]) == 0
    results = json.loads((tmp_path / "demo/results.json").read_text())
    assert all(None not in rows["matrix"][0][-1] for rows in results["methods"].values())
    manifest = json.loads((tmp_path / "demo/merged/mingle/manifest.json").read_text())
    assert len(manifest["metadata"]["revisions"]) == 5


def test_a_table_keeps_to_the_commits_of_its_beginning(two_tasks, tmp_path):
    table_of = [
        "reproduce",
        "main",
        "--suite",
        "clip-b32-8",
        "--out",
        str(tmp_path / "table"),
        "--offline",
        "--methods",
    ]
    assert main([*table_of, "average"]) == 0
    noted = json.loads((tmp_path / "table/revisions.json").read_text())
    assert noted[f"datasets/{EUROSAT}"] == two_tasks.snapshot(EUROSAT, "dataset").name and len(noted) == 5
    two_tasks.add(EUROSAT, {TEST_FILE: b"broken"}, "dataset")
    assert main([*table_of, "task-arithmetic"]) == 0
    assert json.loads((tmp_path / "table/revisions.json").read_text()) == noted


def test_the_demo_names_what_is_not_cached(image_hub, tmp_path, capsys):
    assert (
        main(
            [
                "demo",
                "--suite",
                "clip-b32-8",
                "--methods",
                "average",
                "--out",
                str(tmp_path / "demo"),
                "--offline",
            ]
        )
        == 2
    )
    assert "tanganke/sun397: not in the hub's cache" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("repo", "kind", "message"),
    [
        (
            BASE,
            "model",
            f"{BASE}: not in the hub's cache .* and offline; "
            f"fetch it where there is a network connection: hf download {BASE}",
        ),
        (
            EUROSAT,
            "dataset",
            f"{EUROSAT}: not in the hub's cache .*hf download {EUROSAT} --repo-type dataset",
        ),
    ],
)
def test_what_is_not_cached_is_named_to_the_user(image_hub, tmp_path, repo, kind, message, capsys):
    image_hub.storage(repo, kind).rename(tmp_path / "away")
    assert main(["check", write_config(tmp_path), "--offline"]) == 2
    assert re.search(message, capsys.readouterr().out.replace("\n", " "))


def test_a_missing_shard_of_a_model_is_named_to_the_user(image_hub, tmp_path, capsys):
    (image_hub.snapshot(BASE) / "model-00002-of-00003.safetensors").unlink()
    assert main(["check", write_config(tmp_path)]) == 2
    assert "shard 'model-00002-of-00003.safetensors' is missing" in capsys.readouterr().out
