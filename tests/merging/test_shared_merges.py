"""Merges that go tensor by tensor in several processes: the same files, and an error of one is one of all."""

from __future__ import annotations

import copy
import errno
import os
import random
import shutil
import signal

import pytest
import torch
from bare_methods import tuned_states
from tiny_merge import contents
from transformers import LlamaConfig, LlamaForCausalLM
from worlds import world

from mingle import ranks
from mingle.io import journal, shared_folder
from mingle.io.files import CheckpointError
from mingle.merging import streamed
from mingle.merging.streamed import StreamedMerger
from mingle.methods import METHODS
from mingle.ranks import OtherRankFailed

TASKS = ("one", "two")
#: of the model
TENSORS = 21


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and two fine-tuned models."""
    place = tmp_path_factory.mktemp("models")
    sizes = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=40, intermediate_size=24
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16()
    model.save_pretrained(place / "base", max_shard_size="12KB")
    for name, state in zip(TASKS, tuned_states(model), strict=False):
        tuned = copy.deepcopy(model)
        tuned.load_state_dict(state)
        tuned.save_pretrained(place / name)
    return place


@pytest.fixture(autouse=True)
def _parts(monkeypatch):
    """Parts so small that there are a dozen."""
    monkeypatch.setattr(streamed, "PART_BYTES", 3000)
    monkeypatch.setattr(shared_folder, "_DELAY", 0.5)


@pytest.fixture(scope="module")
def wholes(folders, tmp_path_factory):
    """The folder that a process alone leaves of both tasks, and the one of the first, by method."""
    found = {}

    def whole(method):
        if method not in found:
            place = tmp_path_factory.mktemp(method)
            merger = StreamedMerger(folders / "base", method)
            merger.add("one", folders / "one", place / "start")
            shutil.copytree(place / "start", place / "whole")
            StreamedMerger.from_pretrained(place / "whole").add("two", folders / "two", place / "whole")
            found[method] = place
        return found[method]

    return whole


def merging(folders, out, before=lambda: None):
    """What every process does to merge the second task."""

    def work():
        before()
        calls = []
        merge = METHODS["opcm"].merge_tensor

        def counted(self, step, found, aside):
            calls.append(step.name)
            return merge(self, step, found, aside)

        METHODS["opcm"].merge_tensor = counted
        place = out(ranks.rank()) if callable(out) else out
        StreamedMerger.from_pretrained(place).add("two", folders / "two", place)
        return calls

    return work


@pytest.mark.parametrize(("method", "size"), [("ties", 2), ("ties", 4), ("opcm", 3), ("tsv-m", 2)])
def test_any_number_of_processes_leaves_the_same_folder(folders, wholes, method, size, tmp_path):
    def work():
        merger = StreamedMerger(folders / "base", method)
        for name in TASKS:
            merger.add(name, folders / name, tmp_path)
        return merger.task_names

    assert world(size, work) == [list(TASKS)] * size
    assert contents(tmp_path) == contents(wholes(method) / "whole")


@pytest.mark.parametrize("method", ["mingle", "mass"])
def test_experts_of_any_number_of_processes_are_the_same_files(folders, method, tmp_path):
    options = {"rank": 4} | ({"steps": 0} if method == "mingle" else {})

    def work():
        merger = StreamedMerger(folders / "base", method, **options)
        for name in TASKS:
            merger.add(name, folders / name, tmp_path / str(ranks.size()))
        return merger.task_names

    assert work() == list(TASKS) and world(2, work) == [list(TASKS)] * 2
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_the_processes_share_the_work(folders, wholes, tmp_path):
    shutil.copytree(wholes("opcm") / "start", tmp_path / "merged")
    calls = world(3, merging(folders, tmp_path / "merged"))
    tensors = [name for each in calls for name in each]
    assert len(tensors) == len(set(tensors)) == TENSORS and min(map(len, calls)) > 3


def killed_at(rank, written):
    """Have one process killed when it has written that many parts."""

    def before():
        remaining, write = [written], journal.write_tensors

        def writing(path, tensors):
            if ranks.rank() == rank and not remaining[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            remaining[0] -= 1
            return write(path, tensors)

        journal.write_tensors = writing

    return before


@pytest.mark.parametrize("trial", range(3))
def test_a_merge_of_which_a_process_was_killed_goes_on_in_any_number(folders, wholes, trial, tmp_path):
    pick = random.Random(trial)
    size, again = pick.choice([2, 3]), pick.choice([1, 3, 4])
    rank, written, out = pick.randrange(size), pick.randrange(1, 6), tmp_path / "merged"
    start = wholes("opcm") / "start"
    shutil.copytree(start, out)
    found = world(size, merging(folders, out, killed_at(rank, written)), lost=3.0)
    assert found.pop(rank) is None
    assert [type(other) for other in found] == [OtherRankFailed] * (size - 1)
    there = contents(out)
    assert {name: there[name] for name in contents(start)} == contents(start)
    passes = journal.read(out)
    assert sum(len(each["parts"]) for each in passes) >= written
    merged = len(passes[1]["parts"]) if len(passes) > 1 else 0
    calls = world(again, merging(folders, out))
    assert contents(out) == contents(wholes("opcm") / "whole")
    assert sum(map(len, calls)) <= TENSORS - merged  # of what was finished, nothing is done again


def test_a_full_disk_of_one_process_is_an_error_of_all(folders, wholes, tmp_path):
    def before():
        def full(path, tensors):
            if ranks.rank() == 1:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return write(path, tensors)

        write, journal.write_tensors = journal.write_tensors, full

    out, start = tmp_path / "merged", wholes("opcm") / "start"
    shutil.copytree(start, out)
    found = world(3, merging(folders, out, before))
    assert found[1].errno == errno.ENOSPC
    for other in (found[0], found[2]):
        assert type(other) is OtherRankFailed
        assert str(other).startswith("rank 1 on host ") and "No space left on device" in str(other)
    there = contents(out)
    assert {name: there[name] for name in contents(start)} == contents(start)
    StreamedMerger.from_pretrained(out).add("two", folders / "two", out)
    assert contents(out) == contents(wholes("opcm") / "whole")


def test_a_folder_that_one_process_does_not_see_is_refused_before_any_work(folders, wholes, tmp_path):
    for name in "ab":
        shutil.copytree(wholes("opcm") / "start", tmp_path / name)
    before = contents(tmp_path / "a")
    found = world(3, merging(folders, lambda rank: tmp_path / ("b" if rank == 2 else "a")))
    assert type(found[2]) is CheckpointError
    for error in found:
        assert "rank 2 on host " in str(error) and f"{tmp_path / 'b'}: " in str(error)
        assert "does not see what rank 0 writes there" in str(error)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == before
