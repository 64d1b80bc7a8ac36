"""The commands as a user runs them, on the embedded suite."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from few_samples import PER_CLASS

import mingle
from mingle import suites
from mingle.cli import main
from mingle.methods import DEFAULT
from mingle.runs import merge
from mingle.runs.check import check
from mingle.runs.compare import Comparison, run
from mingle.runs.config import Expert, load
from mingle.runs.observer import Observer
from mingle.runs.settings import for_suite
from mingle.suites import glyphs
from mingle.suites.glyphs.tasks import SUITES

pytestmark = pytest.mark.usefixtures("few_images")
TASKS = [task.name for task in SUITES["glyphs4"]]
few_tasks = pytest.mark.parametrize(
    "tasks", [2, pytest.param(4, marks=pytest.mark.slow)], ids="{} tasks".format
)


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=pytest.mark.slow) for n in "12"], ids="orders {}".format
)
def demo(request, tmp_path_factory, few_images) -> Path:
    out = tmp_path_factory.mktemp("demo")
    arguments = ["demo", "--suite", "glyphs4", "--methods", "pre-trained,individual,average,mingle"]
    arguments += ["--set", "steps=10", "--orders", request.param, "--out", str(out)]
    assert main(arguments) == 0
    return out


def test_demo_writes_everything_it_promises(demo):
    expected = {
        "config.yaml", "results.json", "accuracy_matrix.csv", "timings.json", "traces.json", "merged",
        "accuracy_matrix.png", "accuracy_over_tasks.png", "gate_activation.png", "interference.png",
        "loss.png", "task_known_or_unknown.png", "report.html",
    }  # fmt: skip
    assert {path.name for path in demo.iterdir()} == expected
    assert {path.name for path in (demo / "merged").iterdir()} == {"average", "mingle"}


def test_demo_results_follow_the_schema(demo, request):
    orders = int(request.node.callspec.params["demo"])
    results = json.loads((demo / "results.json").read_text())
    assert set(results) == {"suite", "protocol", "seed", "versions", "methods"}
    assert (results["suite"], results["protocol"]) == ("glyphs4", "strict")
    for method, row in results["methods"].items():
        assert len(row["order"]) == orders
        keys = {"acc", "acc_unknown", "bwt", "matrix", "unknown", "answers", "order", "seconds"}
        assert set(row) == keys | ({"bytes"} if method in ("average", "mingle") else set())
        for answers in row["answers"]:
            assert {name: sum(each["taken"].values()) for name, each in answers.items()} == (
                {} if method == "individual" else dict.fromkeys(TASKS, 20 * (PER_CLASS - 5))
            )
        for acc, bwt, matrix, order in zip(row["acc"], row["bwt"], row["matrix"], row["order"], strict=True):
            assert sorted(order) == sorted(TASKS)
            assert all(
                (cell is None) == (j > i) for i, line in enumerate(matrix) for j, cell in enumerate(line)
            )
            assert acc == pytest.approx(sum(matrix[-1]) / 4)
            assert bwt == pytest.approx(sum(matrix[-1][j] - matrix[j][j] for j in range(3)) / 3)
    for reference in ("pre-trained", "individual"):
        assert results["methods"][reference]["bwt"] == [0] * orders
    assert results["methods"]["individual"]["acc"][0] > results["methods"]["average"]["acc"][0]


@pytest.mark.slow
@pytest.mark.parametrize("demo", ["2"], ids="orders {}".format, indirect=True)
def test_the_same_seed_gives_the_same_numbers(demo, tmp_path):
    again = run(Comparison("glyphs4", methods=("mingle",), options=(("steps", 10),)), tmp_path)
    before = json.loads((demo / "results.json").read_text())
    assert again["methods"]["mingle"]["matrix"][0] == before["methods"]["mingle"]["matrix"][0]


def test_the_demo_s_merged_model_loads_and_goes_on(demo):
    merger = mingle.Merger.from_pretrained(demo / "merged" / "mingle")
    assert sorted(merger.task_names) == sorted(TASKS)
    results = json.loads((demo / "results.json").read_text())
    assert merger.matrix[-1] == results["methods"]["mingle"]["matrix"][0][-1]


@pytest.mark.slow
def test_the_demo_s_merged_models_evaluate_as_they_did(demo, capsys):
    assert main(["eval", str(demo / "merged" / "average")]) == 0
    results = json.loads((demo / "results.json").read_text())
    assert f"ACC {results['methods']['average']['acc'][0]:.1f}" in capsys.readouterr().out


def test_report_makes_table_and_plots_again(demo, capsys):
    (demo / "loss.png").unlink()
    assert main(["report", str(demo)]) == 0
    assert (demo / "loss.png").exists()
    assert "mingle" in capsys.readouterr().out


def write_config(tmp_path, names=TASKS[:3], **changes) -> Path:
    content = {
        "base": str(glyphs.BASE),
        "method": "mingle",
        "experts": [{"name": name, "model": str(glyphs.DATA / "experts" / name)} for name in names],
        "rank": 8,
        "adapt": {"steps": 4, "lr": 1e-3, "samples_per_class": 1},
        "eval": {"suite": "glyphs4"},
    } | changes
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


@few_tasks
def test_merge_add_eval_and_inspect(tmp_path, capsys, tasks):
    out, (*first, last) = tmp_path / "merged", TASKS[:tasks]
    assert main(["merge", str(write_config(tmp_path, first)), "--out", str(out)]) == 0
    assert main(["add", str(out), "--name", last, "--model", str(glyphs.DATA / "experts" / last)]) == 0
    added = json.loads((out / "manifest.json").read_text())
    assert [task["name"] for task in added["tasks"]] == [*first, last]
    assert [task["seed_samples"] for task in added["tasks"]] == [20] * tasks
    assert main(["eval", str(out)]) == 0
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*first, last])

    whole = tmp_path / "whole"
    assert main(["merge", str(write_config(tmp_path, [*first, last])), "--out", str(whole)]) == 0
    merged = json.loads((whole / "manifest.json").read_text())
    assert merged["matrix"] == added["matrix"]
    assert [task["tensors"] for task in merged["tasks"]] == [task["tensors"] for task in added["tasks"]]


def test_a_merge_takes_what_the_suite_recommends_and_what_the_user_says(tmp_path):
    """As the demo does: the suite's settings win over the published ones, explicit ones over both."""
    config = write_config(tmp_path, rank=None, adapt={"steps": 4}, eval={"suite": "glyphs4"})
    plan = check(load(config))
    suite = suites.load("glyphs4")
    recommended = suite.settings["mingle"]
    assert recommended != {}
    assert plan.options == for_suite("mingle", suite, {"steps": 4}) | {"steps": 4}
    assert plan.options.items() >= recommended.items()
    own = check(load(write_config(tmp_path, rank=8, adapt={"lr": 1.0})))
    assert (own.options["rank"], own.options["lr"]) == (8, 1.0)
    assert own.options["gamma"] == recommended["gamma"]


def test_a_file_that_names_no_method_takes_the_default_and_says_so(tmp_path, capsys):
    plain = {"method": None, "rank": None, "adapt": None}
    assert check(load(write_config(tmp_path, **plain))).config.method == DEFAULT == "routed"
    assert main(["check", str(write_config(tmp_path, **plain))]) == 0
    assert "method: routed, the default\n" in capsys.readouterr().out
    assert main(["check", str(write_config(tmp_path))]) == 0
    assert "method: mingle\n" in capsys.readouterr().out
    text = fails(capsys, "check", write_config(tmp_path, **plain, eval=None))
    assert "method 'routed' needs seed samples, which come from a suite; average, task-arithmetic" in text
    assert "pre-trained" not in text and "mingle" not in text.partition("come from a suite")[2]


def test_several_orders_make_several_merges(tmp_path):
    out = tmp_path / "merged"
    config = write_config(
        tmp_path,
        TASKS[:2],
        method="average",
        rank=None,
        adapt=None,
        order={"shuffle": True, "seeds": [42, 43]},
    )
    assert main(["merge", str(config), "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"order-42", "order-43", "report.html"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@few_tasks
def test_a_killed_merge_resumes_bit_for_bit(tmp_path, tasks):
    config = write_config(tmp_path, TASKS[:tasks])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["merge", str(config), "--out", str(whole)]) == 0
    # a fork has imported everything already, and has the same few images
    process = multiprocessing.get_context("fork").Process(
        target=main, args=(["merge", str(config), "--out", str(killed)],)
    )
    process.start()
    deadline = time.monotonic() + 120
    while not (killed / "manifest.json").exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (killed / "manifest.json").exists()
    assert main(["merge", str(config), "--out", str(killed)]) == 0
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (whole, killed)]
    assert manifests[0] == manifests[1]


def fails(capsys, *arguments) -> str:
    assert main(list(map(str, arguments))) == 2
    return " ".join(capsys.readouterr().out.split())


def test_merge_refuses_before_anything_is_written(tmp_path, capsys, monkeypatch):
    out = tmp_path / "merged"

    def message(**changes):
        return fails(capsys, "merge", write_config(tmp_path, **changes), "--out", out)

    assert "unknown option 'rnak'; did you mean 'rank'" in message(rnak=3)
    assert "did you mean 'fc" in message(layers=["fc3"])
    assert "no such folder" in message(base="./nowhere")
    assert "a file, expected the folder of a model" in message(base=__file__)
    assert "has no task 'greek'" in message(
        experts=[{"name": "greek", "model": str(glyphs.DATA / "experts" / TASKS[0])}]
    )
    assert "unknown suite 'glyphs5'" in message(eval={"suite": "glyphs5"})
    assert "needs seed samples" in message(eval={})
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save({}, pickled / "pytorch_model.bin")
    assert "pickle" in message(experts=[{"name": TASKS[0], "model": str(pickled)}])
    assert not out.exists()
    assert main(["check", str(write_config(tmp_path))]) == 0
    monkeypatch.setenv("MINGLE_CPU_GEMM", "blas")
    assert "MINGLE_CPU_GEMM='blas': expected one of mkl, onednn" in message()


def test_merge_refuses_another_architecture(tmp_path, capsys, tuned_folders):
    text = fails(
        capsys,
        "merge",
        write_config(tmp_path, experts=[{"name": TASKS[0], "model": str(tuned_folders[0])}]),
        "--out",
        tmp_path / "x",
    )
    assert f"expert {TASKS[0]!r}" in text
    assert "missing" in text


def test_resuming_with_other_settings_is_refused_with_the_differences(tmp_path, capsys):
    out = tmp_path / "merged"
    assert main(["merge", str(write_config(tmp_path, TASKS[:1])), "--out", str(out)]) == 0
    text = fails(capsys, "merge", write_config(tmp_path, TASKS[1:3], rank=4), "--out", out)
    assert "option rank: 8 there, 4 now" in text
    assert f"tasks: {TASKS[0]} there" in text
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert "not empty" in fails(capsys, "merge", write_config(tmp_path), "--out", tmp_path / "other")


def test_add_refuses_an_unknown_task(tmp_path, capsys):
    out = tmp_path / "merged"
    assert main(["merge", str(write_config(tmp_path, TASKS[:1])), "--out", str(out)]) == 0
    before = (out / "manifest.json").read_bytes()
    model = glyphs.DATA / "experts" / TASKS[1]
    assert "has no task 'klingon'" in fails(capsys, "add", out, "--name", "klingon", "--model", model)
    assert "is already merged" in fails(capsys, "add", out, "--name", TASKS[0], "--model", model)
    assert "no such folder" in fails(capsys, "add", out, "--name", TASKS[1], "--model", "./nowhere")
    assert (out / "manifest.json").read_bytes() == before


def test_a_suite_of_own_images(tmp_path, capsys):
    """A folder of PNG files per class, for any CLIP folder."""
    from PIL import Image

    task = SUITES["glyphs4"][0]
    pictures, labels = task.test_set(3)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        folder = tmp_path / "images" / task.name / task.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    (tmp_path / "images" / task.name / "templates.txt").write_text("a glyph of {}.\n")
    config = write_config(tmp_path, [task.name], eval={"suite": str(tmp_path / "images")})
    assert main(["merge", str(config), "--out", str(tmp_path / "merged")]) == 0
    accuracy = json.loads((tmp_path / "merged" / "manifest.json").read_text())["matrix"][-1][0]
    assert accuracy > 80
    (tmp_path / "images" / task.name / "empty").mkdir()
    assert "empty: no images in it" in fails(capsys, "eval", tmp_path / "merged")


def test_unknown_methods_and_options(capsys, tmp_path):
    assert "unknown method 'mingel'; did you mean 'mingle'" in fails(
        capsys, "demo", "--methods", "mingel", "--out", tmp_path
    )
    assert "no method has this option" in fails(capsys, "demo", "--set", "gama=1", "--out", tmp_path)
    assert "does not hold a saved merge" in fails(capsys, "inspect", tmp_path)
    assert main(["env"]) == 0


def test_a_merger_saved_by_hand_evaluates_with_a_suite_named(tmp_path, capsys):
    merger = mingle.Merger(glyphs.BASE, "task-arithmetic", scaling=1.0)
    merger.add(TASKS[0], glyphs.DATA / "experts" / TASKS[0])
    merger.save_pretrained(tmp_path)
    assert "suite: name one" in fails(capsys, "eval", tmp_path)
    assert main(["eval", str(tmp_path), "--suite", "glyphs4"]) == 0


def test_session_api_adds_and_evaluates(tmp_path):
    out = tmp_path / "merged"
    assert main(["merge", str(write_config(tmp_path, TASKS[:1])), "--out", str(out)]) == 0
    result = merge.add(out, Expert(TASKS[1], str(glyphs.DATA / "experts" / TASKS[1])), {}, Observer())
    assert result.tasks == TASKS[:2]
    assert merge.evaluate(out, {}, 128).matrix == result.matrix
