"""Commands in several processes: one speaks, all end alike, and they leave what one process leaves."""

from __future__ import annotations

import io
import json
import os
import re
from contextlib import redirect_stdout

import pytest
import torch
import yaml
from merge_files import merge_file
from tiny_merge import contents
from worlds import world

from mingle import cli
from mingle.cli import main, progress
from mingle.io import shared_folder
from mingle.merging import streamed
from mingle.merging.merger import Merger
from mingle.merging.sharded import ShardedMerger
from mingle.runs import room, sharding


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(streamed, "PART_BYTES", 3000)
    monkeypatch.setattr(shared_folder, "_DELAY", 0.5)


@pytest.fixture
def files(base_folder, tuned_folders, tmp_path):
    """A merge file by method."""
    models = dict(zip(("one", "two"), tuned_folders, strict=False))
    return lambda method: merge_file(tmp_path, base_folder, models, method)


def command(*arguments):
    """What a process does: run a command; gives its exit code and all that it printed."""

    def work():
        given = [str(each() if callable(each) else each) for each in arguments]
        with redirect_stdout(io.StringIO()) as printed:
            code = main(given)
        return code, printed.getvalue()

    return work


def number():
    return int(os.environ.get("RANK", "0"))


def test_merge_and_add_from_files(files, tuned_folders, tmp_path):
    merge = ("merge", files("ties"), "--out")
    add = ("--name", "three", "--model", tuned_folders[2], "--json")
    assert command(*merge, tmp_path / "alone")()[0] == command("add", tmp_path / "alone", *add)()[0] == 0
    merged = world(3, command(*merge, tmp_path / "shared"), joined=False)
    added = world(2, command("add", tmp_path / "shared", *add), joined=False)
    assert [code for code, _ in (*merged, *added)] == [0] * 5
    assert "merged model: " in merged[0][1] and json.loads(added[0][1])["tasks"] == ["one", "two", "three"]
    assert {text for _, text in (*merged[1:], *added[1:])} == {""}
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    assert (tmp_path / "shared/report.html").is_file()


def test_one_process_tells_of_its_parts(files, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_PAUSE", 0.0)
    for size, quiet in ((2, ()), (1, ("--quiet",))):
        out = tmp_path / f"out {size} {quiet}"
        found = world(size, command("merge", files("ties"), "--out", out, *quiet), joined=False)
        said = found[0][1]
        passes = re.findall(r"merging from files, pass (\d+), (\S+) of (\S+) GB(.*)", said)
        assert [code for code, _ in found] == [0] * size
        assert {number for number, *_ in passes} == (set() if quiet else {"1", "2", "3"}), said
        assert {rest for *_, rest in passes} <= {", the part of one process of 2"}
        assert all(text == "" for _, text in found[1:])


def test_a_merge_in_memory_is_saved_once(files, tmp_path):
    found = world(2, command("merge", files("nufilt"), "--out", tmp_path / "out"), joined=False)
    assert [code for code, _ in found] == [0, 0] and found[1][1] == ""
    assert Merger.from_pretrained(tmp_path / "out").task_names == ["one", "two"]


@pytest.fixture
def adapted(base_folder, tuned_folders, tmp_path, stub):
    """A file of a merge with adaptation, with more keys."""
    models = dict(zip(("one", "two"), tuned_folders, strict=False))
    more = {
        "rank": 2,
        "adapt": {"steps": 2, "batch_size": 4, "samples_per_class": 1},
        "eval": {"suite": "stub"},
    }
    return lambda **keys: merge_file(tmp_path, base_folder, models, "mingle", **more, **keys)


@pytest.fixture
def sharing(monkeypatch, tmp_path):
    """The ranks that have shared out the weights of a model so far."""

    def filled(merger, *arguments, real=ShardedMerger._filled):
        (tmp_path / f"rank {number()}").touch()
        return real(merger, *arguments)

    monkeypatch.setattr(ShardedMerger, "_filled", filled)
    return lambda: {path.name for path in tmp_path.glob("rank *")}


@pytest.fixture
def little_memory(tuned_folders):
    """Bytes that are too few for a merge that holds whole models."""
    base = Merger(tuned_folders[0].parent / "base").base
    return room._LIBRARIES + 16 * sum(tensor.numel() for tensor in base.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("little", [True, False])
def test_weights_are_shared_out_where_a_process_has_too_little_memory(
    adapted, sharing, tuned_folders, tmp_path, monkeypatch, little, little_memory
):
    # one of them has too little, and both decide alike
    monkeypatch.setattr(sharding, "there", lambda: little_memory if little and number() == 1 else 1 << 40)
    file, out = adapted(), tmp_path / "out"
    found = world(2, command("merge", file, "--out", out), joined=False)
    assert [code for code, _ in found] == [0, 0], found
    assert sharing() == ({"rank 0", "rank 1"} if little else set())
    assert command("merge", file, "--out", tmp_path / "alone")()[0] == 0
    kept = [Merger.from_pretrained(tmp_path / name) for name in ("out", "alone")]
    pairs = zip(*(merger.method.task_tensors(1).items() for merger in kept), strict=True)
    for (name, mine), (_, theirs) in pairs:
        torch.testing.assert_close(mine, theirs, msg=name)
    assert kept[0].matrix == kept[1].matrix
    more = ("add", out, "--name", "three", "--model", tuned_folders[2])
    assert [code for code, _ in world(2, command(*more), joined=False)] == [0, 0]
    assert Merger.from_pretrained(out).task_names == ["one", "two", "three"]


@pytest.mark.parametrize("found", ["check", "merge", "add"])
def test_a_process_alone_leaves_models_in_files_where_it_has_too_little_memory(
    adapted, sharing, tuned_folders, little_memory, tmp_path, monkeypatch, found
):
    file, out = adapted(), tmp_path / "out"
    add = ("--name", "three", "--model", tuned_folders[2])
    for folder, there in ((out, little_memory), (tmp_path / "whole", 1 << 40)):
        monkeypatch.setattr(sharding, "there", lambda there=there: there)
        if found == "check":
            said = json.loads(command("check", file, "--json")()[1])["costs"]["memory"]
            assert ("base" in said, "merged model" in said) == (there > little_memory, True)
            continue
        assert command("merge", file, "--out", folder)()[0] == 0
        assert sharing() == {"rank 0"}
        if found == "add":
            assert command("add", folder, *add)()[0] == 0
    if found != "check":
        assert contents(out) == contents(tmp_path / "whole")


def test_a_merge_for_which_there_is_too_little_memory_is_refused(adapted, little_memory, monkeypatch):
    monkeypatch.setattr(sharding, "there", lambda: little_memory)
    code, said = command("check", adapted(shard="never"))()
    assert code == 2 and f"bytes of memory, and there are {little_memory}; base" in said.replace("\n", " ")
    monkeypatch.setattr(sharding, "there", lambda: 600_000_000)  # the libraries alone
    code, said = command("check", adapted())()
    assert code == 2 and "and there are 600000000; merged model" in said.replace("\n", " ")


def test_sharing_out_can_be_asked_for(adapted, files, sharing, tmp_path):
    out = tmp_path / "out"
    assert world(2, command("merge", adapted(shard="never"), "--out", out), joined=False)[0][0] == 0
    assert sharing() == set()
    assert world(2, command("eval", out, "--shard", "always"), joined=False)[0][0] == 0
    assert sharing() == {"rank 0", "rank 1"}


def test_sharing_out_what_takes_whole_models_is_refused(adapted, tmp_path):
    file = adapted(shard="always")
    file.write_text(file.read_text().replace("method: mingle", "method: wemoe"))
    code, said = command("check", file)()
    assert code == 2
    reason = "shard: always: method 'wemoe' needs whole models; mingle and mingle-light do not"
    assert reason in said.replace("\n", " ")


def test_faults_of_the_input_are_told_once_and_end_all(files, tmp_path):
    file = files("average")
    file.write_text(file.read_text().replace("tuned1", "gone"))
    found = world(3, command("merge", file, "--out", tmp_path / "out"), joined=False)
    assert all(code for code, _ in found)
    assert "gone" in found[0][1] and [text for _, text in found[1:]] == ["", ""]
    assert not (tmp_path / "out").exists()


def test_what_is_not_the_same_for_all_is_refused(files, tmp_path):
    file = files("average")
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"keep": 1}))
    work = command("merge", lambda: other if number() == 1 else file, "--out", tmp_path / "out")
    code, said = world(2, work, joined=False)[0]
    assert code and f"rank 1 was started with config {other}, and rank 0 with {file}" in said.replace(
        "\n", " "
    )

    def changed():
        here = tmp_path / f"{number()}"
        here.mkdir()
        os.chdir(here)
        (here / "merge.yaml").write_text((other if number() == 1 else file).read_text())
        return "merge.yaml"

    code, said = world(2, command("merge", changed, "--out", tmp_path / "out"), joined=False)[0]
    assert code and re.search(r"rank 1 on host \S+: the config's keep is not that of rank 0", said)
    assert not (tmp_path / "out").exists()


def test_commands_without_use_for_several_processes_say_so():
    found = world(2, command("env"), joined=False)
    assert [code for code, _ in found] == [0, 0]
    assert "`mingle env` makes no use of several processes: one does all of it" in found[0][1]
    assert found[1][1] == ""


@pytest.mark.usefixtures("stub")
def test_cells_of_a_table_are_shared(tmp_path):
    arguments = ("--suite", "stub", "--methods", "average,pre-trained", "--out", tmp_path)
    found = world(2, command("reproduce", "main", *arguments), joined=False)
    assert [code for code, _ in found] == [0, 0], found
    assert found[0][1].count("table and plots: ") == 1 and found[1][1] == ""
    rows = json.loads((tmp_path / "table.json").read_text())["tables"][0]["rows"]
    assert [row["cells"]["stub"]["finished"] for row in rows] == [[42], [42]]


@pytest.mark.parametrize("launched", [True, False])
@pytest.mark.parametrize(("outcome", "code"), [(0, 0), (2, 2), (RuntimeError("unforeseen"), 1)])
def test_a_process_of_several_ends_at_once(launched, outcome, code, monkeypatch, capsys):
    """Its threads may wait for other processes inside PyTorch, and could abort the end of the interpreter."""

    def stand_in() -> int:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def ended(status: int) -> None:
        raise SystemExit(f"at once, {status}")

    monkeypatch.setattr(cli, "main", stand_in)
    monkeypatch.setattr(cli.ranks, "launched", lambda: launched)
    monkeypatch.setattr(os, "_exit", ended)
    with pytest.raises((SystemExit, RuntimeError)) as found:
        cli.run_and_exit()
    if launched:
        assert str(found.value) == f"at once, {code}"
        assert ("unforeseen" in capsys.readouterr().err) == isinstance(outcome, Exception)
    else:
        assert found.value is outcome or found.value.code == code
