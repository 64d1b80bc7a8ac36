"""Folders of merges and runs that are not what they should be: refused with the file and the key."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_merges import merge
from test_hostile_names import fabricated

from mingle.cli import main
from mingle.io.files import CheckpointError
from mingle.io.schema import check
from mingle.merging.merger import Merger


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")


@pytest.fixture(scope="module")
def intact(base_model, tuned_states, samples, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merges") / "intact"
    few = {"steps": 1, "layers": ("q_proj", "fc2")}
    merge(base_model, tuned_states, samples, count=2, **few).save_pretrained(folder)
    return folder


@pytest.fixture
def saved(intact, tmp_path) -> Path:
    return shutil.copytree(intact, tmp_path / "merged")


def refusal(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2, arguments
    out = capsys.readouterr().out
    assert "error: " in out
    return out


def commands(folder: Path) -> list[tuple[object, ...]]:
    return [
        ("inspect", folder),
        ("eval", folder, "--suite", "glyphs4"),
        ("export", folder, "--out", folder.parent / "plain"),
        ("add", folder, "--name", "new", "--model", folder),
    ]


@pytest.mark.parametrize(
    "kind", ["a file", "below a file", "nothing", "an empty folder", "a folder of other files"]
)
def test_what_is_not_a_merge_is_named(kind, tmp_path, capsys):
    folder = tmp_path / "x"
    if kind == "a file":
        folder.write_text("mine")
    elif kind == "below a file":
        folder.write_text("mine")
        folder = folder / "y"
    elif kind != "nothing":
        folder.mkdir()
        if kind == "a folder of other files":
            (folder / "manifest.json").mkdir()
            (folder / "results.json").mkdir()
    for command in [*commands(folder), ("report", folder)]:
        text = refusal(capsys, *command)
        assert str(folder.parent if kind == "below a file" else folder) in text


def put(value: Any, path: str, new: Any) -> Any:
    """A copy with another value at a path such as ``tasks.0.notes``; `...` removes it."""
    value = copy.deepcopy(value)
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = value
    for key in way:
        place = place[key]
    if new is ...:
        del place[last]
    else:
        place[last] = new
    return value


#: a place in the manifest, what is there instead, and how the message names the place
HOSTILE = [
    *((key, ..., f"{key} is missing") for key in (
        "method", "task_type", "seed", "dtype", "options", "tasks", "matrix", "metadata", "base", "state",
    )),
    *((f"tasks.1.{key}", ..., f"tasks[1].{key} is missing") for key in (
        "name", "seed_samples", "skipped", "notes", "tensors",
    )),
    *((f"tasks.0.tensors.{key}", ..., f"tasks[0].tensors.{key} is missing") for key in (
        "file", "bytes", "sha256",
    )),
    ("base.sha256", ..., "base.sha256 is missing"),
    ("base.folder", ..., "base.folder is missing"),
    ("format", "other", "not the manifest of a mingle-merge folder"),
    ("format_version", True, "format version True"),
    ("format_version", [1], "format version [1]"),
    ("method", "mingel", "unknown method 'mingel'; did you mean 'mingle'"),
    ("method", ["mingle"], "method: expected a text"),
    ("method", "average", "unknown option"),
    ("task_type", "os", "unknown task type 'os'"),
    ("seed", "0", "seed: expected a whole number, found '0'"),
    ("seed", True, "seed: expected a whole number, found True"),
    ("seed", 10**30, "seed: expected a whole number"),
    ("seed", 0.5, "seed: expected a whole number"),
    ("dtype", "os", "dtype: expected a text of the form float64|float32|float16|bfloat16, found 'os'"),
    ("dtype", "int8", "dtype: expected"),
    ("options", [], "options: expected an object"),
    ("options.rank", "x", "rank: 'x'"),
    ("options.rank", -1, "rank=-1"),
    ("options.device", "cpu", "unknown option 'device'"),
    ("options.layers", [1], "layers"),
    ("options.reduce", {}, "reduce: {}"),
    ("tasks", {}, "tasks: expected a list"),
    ("tasks.0", "one", "tasks[0]: expected an object"),
    ("tasks.0.name", "", "tasks[0].name: expected"),
    ("tasks.0.name", 3, "tasks[0].name: expected"),
    ("tasks.0.name", "two", "tasks: two of them are called 'two'"),
    ("tasks.0.notes", None, "tasks[0].notes: expected a list"),
    ("tasks.0.notes", [["x"]], "tasks[0].notes[0]: expected a text"),
    ("tasks.0.skipped", True, "tasks[0].skipped: expected a text"),
    ("tasks.0.seed_samples", None, "tasks[0].seed_samples: expected a whole number"),
    ("tasks.0.tensors.file", "../../x.safetensors", "tasks[0].tensors.file: expected"),
    ("tasks.0.tensors.file", "/etc/passwd", "tasks[0].tensors.file: expected"),
    ("tasks.0.tensors.file", "manifest.json", "tasks[0].tensors.file: expected"),
    ("tasks.0.tensors.bytes", "9", "tasks[0].tensors.bytes: expected a whole number"),
    ("tasks.0.tensors.bytes", -1, "expected -1 bytes"),
    ("tasks.0.tensors.sha256", "0" * 63, "tasks[0].tensors.sha256: expected"),
    ("tasks.0.tensors.sha256", "0" * 64, "SHA-256 differs"),
    ("matrix", {}, "matrix: expected a list"),
    ("matrix", [], "matrix: expected a row per task"),
    ("matrix", [["x"], [None, None]], "matrix[0][0]: expected a number, found 'x'"),
    ("matrix", [[1, 2], [None, None]], "matrix: expected a row per task"),
    ("matrix", [[10**400], [None, None]], "matrix[0][0]: expected a number"),
    ("matrix", [[float("nan")], [None, None]], "matrix[0][0]: expected a number"),
    ("matrix", [5, [None, None]], "matrix[0]: expected a list"),
    ("metadata", None, "metadata: expected an object"),
    ("base", "base", "base: expected an object"),
    ("base.folder", "..", "base.folder: expected a text of the form"),
    ("base.folder", "/", "base.folder: expected"),
    ("base.sha256", 5, "base.sha256: expected"),
    ("state", 3, "state: expected an object"),
    ("state", {}, "state.file is missing"),
]  # fmt: skip
#: what only those find who open the base or read tensors
INSIDE = [
    ("options.layers", ["nowhere"], "manifest.json: no Linear layer's name ends in 'nowhere'"),
    ("base.folder", "base-0123456789ab", "base-0123456789ab"),
    ("base.folder", None, "saved without its base model"),
    ("base.sha256", "0" * 64, "merged into another base model"),
    ("options.layers", ["fc1"], "the tensors do not fit the method 'mingle' with these options"),
]


def broken(saved: Path, path: str, new: Any) -> Path:
    file = saved / "manifest.json"
    file.write_text(json.dumps(put(json.loads(file.read_text()), path, new)))
    return file


@pytest.mark.parametrize(("path", "new", "message"), HOSTILE, ids=lambda value: repr(value)[:30])
def test_a_manifest_of_another_form_is_named_with_the_key(path, new, message, saved, capsys):
    file = broken(saved, path, new)
    before = file.read_bytes()
    for command in commands(saved):
        text = refusal(capsys, *command)
        assert message in text
        assert str(saved) in text
    assert file.read_bytes() == before
    assert not (saved.parent / "plain").exists()


@pytest.mark.parametrize(("path", "new", "message"), INSIDE, ids=lambda value: repr(value)[:30])
def test_a_manifest_that_does_not_suit_its_files_is_named(path, new, message, saved, capsys):
    broken(saved, path, new)
    for command in commands(saved)[1:]:
        text = refusal(capsys, *command)
        assert message in text
        assert str(saved) in text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("suite", 3, "metadata.suite: expected a text, found 3"),
        ("protocol", None, "metadata.protocol: expected a text"),
        ("protocol", "x", "protocol: 'x'"),
        ("samples_per_class", -1, "metadata.samples_per_class: expected 0 or more"),
        ("batch_size", "8", "metadata.batch_size: expected a whole number"),
        ("batch_size", 0, "metadata.batch_size: expected 1 or more"),
        ("revisions", [], "metadata.revisions: expected an object"),
        ("revisions", {"x/y": 1}, "metadata.revisions.'x/y': expected a text"),
    ],
)
def test_an_origin_of_another_form_is_named_with_the_key(key, value, message, saved, capsys):
    broken(saved, "metadata", {"suite": "glyphs4", key: value})
    _, _, _, add = commands(saved)
    for command in (("eval", saved), add):
        assert message in refusal(capsys, *command)


def test_other_metadata_are_the_user_s_own(saved, capsys):
    broken(saved, "metadata", {"mine": [1, {"x": None}]})
    assert main(["inspect", str(saved)]) == 0
    assert Merger.from_pretrained(saved).metadata == {"mine": [1, {"x": None}]}


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "3", "{}", '{"format": 1, "format": 2}', "{" * 10**5, "\xff"]
)
def test_a_manifest_that_is_no_manifest_is_named(text, saved, capsys):
    (saved / "manifest.json").write_bytes(text.encode("latin-1"))
    for command in commands(saved):
        assert f"{saved}/manifest.json: " in refusal(capsys, *command)


# Run folders


RUNS = [
    ("results.json", "methods", ..., "methods is missing"),
    ("results.json", "methods", [], "methods: expected an object"),
    ("results.json", "suite", 3, "suite: expected a text"),
    ("results.json", "protocol", None, "protocol: expected a text"),
    ("results.json", "methods.average", 3, "methods.average: expected an object"),
    ("results.json", "methods.average.acc", ["x"], "methods.average.acc[0]: expected a number"),
    ("results.json", "methods.average.acc", [10**400], "methods.average.acc[0]: expected a number"),
    ("results.json", "methods.average.acc", [], "methods.average: acc: expected one value for each of 1"),
    ("results.json", "methods.average.order", [], "methods.average: acc: expected one value for each of 0"),
    ("results.json", "methods.average.order", [[]], "methods.average: order[0]: expected some tasks"),
    ("results.json", "methods.average.order", [["a", 3]], "methods.average.order[0][1]: expected a text"),
    ("results.json", "methods.average.order", [["a"]], "methods.average: matrix[0]: expected 1 rows of 1"),
    ("results.json", "methods.average.matrix", [[[1.0], [1.0]]], "methods.average: matrix[0]: expected 2"),
    ("results.json", "methods.average.seconds", None, "methods.average.seconds: expected a list"),
    ("traces.json", "a", [], "a: expected an object"),
    ("traces.json", "a.order", ..., "a.order is missing"),
    ("traces.json", "a.layers", [1], "a.layers[0]: expected a text"),
    ("traces.json", "a.loss", [[1.0]], "a: loss: expected one entry for each of 2 tasks, found 1"),
    ("traces.json", "a.loss", [["x"], []], "a.loss[0][0]: expected a number"),
    ("traces.json", "a.interference", [{}, {"nowhere": [1, 2]}], "a: interference[1]: 'nowhere'"),
    ("traces.json", "a.strength", [{}, {"[x]$\\frac{": [1]}], "a: strength[1]: '[x]$\\\\frac{': expected"),
    ("traces.json", "a.gates", [[[1, 2]], [[1]]], "a: gates: expected 2 × 2 rows of one length"),
    ("traces.json", "a.gates", [[[1], [1, 2]], [[1], [1]]], "a: gates: expected 2 × 2 rows"),
    ("traces.json", "a.gates", 3, "a.gates: expected a list"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "path", "new", "message"), RUNS, ids=lambda value: repr(value)[:30])
def test_a_run_folder_of_another_form_is_named_with_the_key(name, path, new, message, tmp_path, capsys):
    parts = dict(zip(("results.json", "traces.json"), fabricated(["a", "b"]), strict=True))
    parts[name] = put(parts[name], path, new)
    for file, content in parts.items():
        (tmp_path / file).write_text(json.dumps(content))
    assert f"{tmp_path}/{name}: {message}" in refusal(capsys, "report", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "traces.json"]


def test_a_run_folder_without_one_of_its_files_is_named(tmp_path, capsys):
    assert f"{tmp_path}: holds no run; expected results.json of demo" in refusal(capsys, "report", tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(fabricated(["a"])[0]))
    assert f"{tmp_path}/traces.json" in refusal(capsys, "report", tmp_path)
    (tmp_path / "traces.json").write_text("{")
    assert f"{tmp_path}/traces.json: bad JSON: line 1" in refusal(capsys, "report", tmp_path)


def test_forms():
    form = {"a": (int, None), "b": [{str: float}]}
    check({"a": None, "b": [{"x": 1, "y": 2.5}], "more": object}, form, Path("f"))
    for value, message in (
        ([], "f: the whole: expected an object, found []"),
        ({"a": 1}, "f: b is missing"),
        ({"a": 1.0, "b": []}, "f: a: expected a whole number, found 1.0"),
        ({"a": 1, "b": [{}, {"x.y": "z" * 200}]}, f"f: b[1].'x.y': expected a number, found '{'z' * 79}…"),
    ):
        with pytest.raises(CheckpointError) as caught:
            check(value, form, Path("f"))
        assert str(caught.value) == message
