"""Merges from files that were broken off, be it by damage or by a signal, go on where they were."""

from __future__ import annotations

import json
import logging
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from bare_methods import tuned_states
from merge_files import merge_file
from streamed_merges import TASKS, from_files, interrupted_at
from streamed_models import SIZES, Interrupted
from tiny_merge import contents
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

import mingle
from mingle.io import journal
from mingle.merging import streamed
from mingle.merging.streamed import StreamedMerger
from mingle.methods import METHODS


@pytest.mark.parametrize("method", ["ties", "opcm"])
def test_a_merge_that_was_broken_off_anywhere_goes_on_in_the_middle(mixtral, method, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "PART_BYTES", 14000)
    from_files(mixtral, method, tmp_path / "start", TASKS[:1])
    shutil.copytree(tmp_path / "start", tmp_path / "whole")
    StreamedMerger.from_pretrained(tmp_path / "whole").add("two", mixtral / "two", tmp_path / "whole")
    whole, start = contents(tmp_path / "whole"), contents(tmp_path / "start")
    done: dict[int, int] = {}
    for written in range(40):
        out = tmp_path / f"{written}"
        shutil.copytree(tmp_path / "start", out)
        with monkeypatch.context() as patch:
            interrupted_at(patch, written)
            try:
                StreamedMerger.from_pretrained(out).add("two", mixtral / "two", out)
                break
            except Interrupted:
                pass
        there = contents(out)
        assert {name: there[name] for name in start} == start  # the old merge is there as it was
        with monkeypatch.context() as patch:
            calls = counted(patch, method)
            StreamedMerger.from_pretrained(out).add("two", mixtral / "two", out)
        assert contents(out) == whole, written
        done[written] = len(calls)
    tensors = len(json.loads((mixtral / "base/model.safetensors.index.json").read_text())["weight_map"])
    assert done[0] == max(done.values()) and tensors > 8
    assert len(done) > 2 and done[len(done) - 1] < 8  # of what was finished, nothing is done again


def counted(monkeypatch, method):
    """The tensors that are worked on: merged, and where that is the work, projected."""
    calls = []
    merge = METHODS[method].merge_tensor

    def merging(self, step, found, aside):
        calls.append(step.name)
        return merge(self, step, found, aside)

    monkeypatch.setattr(METHODS[method], "merge_tensor", merging)
    if method == "opcm":
        project = mingle.methods.opcm.project

        def projecting(*arguments):
            calls.append("projected")
            return project(*arguments)

        monkeypatch.setattr(mingle.methods.opcm, "project", projecting)
    return calls


def broken_off(folders, method, out, monkeypatch, written=4):
    from_files(folders, method, out, TASKS[:1])
    merger = StreamedMerger.from_pretrained(out)
    with monkeypatch.context() as patch:
        interrupted_at(patch, written)
        with pytest.raises(Interrupted):
            merger.add("two", folders / "two", out, "digest")
    assert (out / journal.JOURNAL).exists()


@pytest.mark.parametrize("damage", ["changed", "missing", "journal", "digit", "version"])
def test_damage_to_what_was_finished_is_made_good(mixtral, damage, parts, tmp_path, monkeypatch, caplog):
    out = tmp_path / "merged"
    broken_off(mixtral, "opcm", out, monkeypatch)
    notes = json.loads((out / journal.JOURNAL).read_text())
    first = notes["passes"][0]["parts"]
    part = out / first[1]["file"]
    if damage == "changed":
        part.write_bytes(part.read_bytes()[:-1] + b"!")
    elif damage == "missing":
        part.unlink()
    elif damage == "journal":
        (out / journal.JOURNAL).write_text('{"step": ')
    elif damage == "digit":
        first[0]["numbers"][0][0] += 1.0
        (out / journal.JOURNAL).write_text(json.dumps(notes))
    else:
        (out / journal.JOURNAL).write_text(json.dumps(notes | {"format_version": 1}))
    with caplog.at_level(logging.WARNING):
        StreamedMerger.from_pretrained(out).add("two", mixtral / "two", out, "digest")
    assert (part.name if damage in ("changed", "missing") else journal.JOURNAL) in caplog.text
    from_files(mixtral, "opcm", tmp_path / "whole", TASKS[:2])
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("other", ["model", "task"])
def test_what_another_step_has_finished_is_neither_taken_nor_kept(
    mixtral, other, parts, tmp_path, monkeypatch
):
    out = tmp_path / "merged"
    broken_off(mixtral, "average", out, monkeypatch)
    name = "two" if other == "model" else "three"
    StreamedMerger.from_pretrained(out).add(name, mixtral / "three", out, "another digest")
    merger = StreamedMerger(mixtral / "base", "average")
    merger.add("one", mixtral / "one", tmp_path / "whole")
    merger.add(name, mixtral / "three", tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_command_killed_at_random_moments_ends_in_the_same_bits(tmp_path):
    sizes = SIZES | dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(tmp_path / "base", max_shard_size="5MB")
    for name, state in zip(TASKS, tuned_states(model), strict=True):
        model.load_state_dict(state)
        model.save_pretrained(tmp_path / name, max_shard_size="5MB")
    names = {name: tmp_path / name for name in TASKS[:2]}
    file = merge_file(tmp_path, tmp_path / "base", names, "opcm")
    code = "import sys; from mingle.merging import streamed; from mingle.cli import main; "
    code += "streamed.PART_BYTES = 1 << 20; sys.exit(main(sys.argv[1:]))"

    def merge(out):
        command = [sys.executable, "-c", code, "merge", str(file), "--out", str(tmp_path / out)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    assert merge("whole").wait() == 0
    killed, chance, notes = 0, random.Random(0), tmp_path / "killed" / journal.JOURNAL

    def noted():
        return notes.stat().st_mtime_ns if notes.exists() else None

    while killed < 4:
        process, before = merge("killed"), noted()
        while process.poll() is None and noted() in (None, before):  # until it has got on
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 1))
        process.kill()
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
        killed += 1
    assert killed and merge("killed").wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
