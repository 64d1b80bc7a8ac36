"""Merges that go tensor by tensor, from folder to folder, against the same merges in memory."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from bare_methods import tuned_states
from live_memory import peak_bytes
from merge_files import merge_file
from streamed_models import SIZES, Interrupted, models, save_gpt2_and_adapter, save_tuned
from tiny_merge import contents
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralForCausalLM,
)

import mingle
from mingle.cli import main
from mingle.io import generations, journal, lazy_tensors
from mingle.io.files import CheckpointError
from mingle.io.manifest import read_manifest
from mingle.io.state_dicts import IncompatibleModel
from mingle.merging import streamed
from mingle.merging.finite import NonFiniteMerge
from mingle.merging.streamed import StreamedMerger
from mingle.methods import METHODS
from mingle.methods.tensorwise import TensorMethod
from mingle.tasks.base import TaskType

STREAMED = [name for name, method in METHODS.items() if issubclass(method, TensorMethod)]
OPTIONS = {
    "consensus-ta": {"masks": "all"},
    "wudi": {"steps": 5},
    "nufilt": {"steps": 3, "r_p": 4, "r_v": 2, "r_l": 3},
}
TASKS = ("one", "two", "three")


def folders_of(kind, place):
    """A base and three fine-tuned models in shards, of which no two have the same."""
    model = models(kind, **({"tie_word_embeddings": True} if kind == "mixtral" else {}))
    model.save_pretrained(place / "base", max_shard_size="12KB")
    save_tuned(place, model, TASKS, ["8KB", "11KB", "14KB"])
    return place


@pytest.fixture(scope="module", params=["gpt2", "bert"])
def folders(request, tmp_path_factory):
    return folders_of(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return folders_of("mixtral", tmp_path_factory.mktemp("one"))


@pytest.fixture
def parts(monkeypatch):
    """Parts so small that there are a dozen, and blocks of which large tensors have several."""
    monkeypatch.setattr(streamed, "PART_BYTES", 6000)
    monkeypatch.setattr(lazy_tensors, "BLOCK_ENTRIES", 200)


def in_memory(folders, method, out, tasks=TASKS, **options):
    merger = mingle.Merger(folders / "base", method, **OPTIONS.get(method, {}), **options)
    for name in tasks:
        merger.add(name, folders / name)
        merger.save_pretrained(out)
    return merger


def from_files(folders, method, out, tasks=TASKS, **options):
    merger = StreamedMerger(folders / "base", method, **OPTIONS.get(method, {}), **options)
    for name in tasks:
        merger.add(name, folders / name, out)
    return merger


def assert_same_merge(found, expected):
    """The bits of all that is kept, of the model, and of what is known of the tasks."""
    for mine, other in (
        (found.method.state_tensors(), expected.method.state_tensors()),
        (found.model.state_dict(), expected.model.state_dict()),
    ):
        assert mine.keys() == other.keys()
        assert all(t.dtype == other[n].dtype and t.equal(other[n]) for n, t in mine.items())
    assert found.merged == expected.merged
    assert (found.matrix, found.unknown) == (expected.matrix, expected.unknown)
    for mine, other in zip(found.merged, expected.merged, strict=True):
        assert all(tensor.equal(other.tensors[name]) for name, tensor in mine.tensors.items())


def test_methods_that_go_tensor_by_tensor():
    names = "average task-arithmetic ties magmax consensus-ta opcm tsv-m iso-c wudi nufilt"
    assert set(names.split()) == set(STREAMED)


@pytest.mark.parametrize("method", ["ties", "opcm", "tsv-m", "nufilt"])
def test_a_merge_from_files_leaves_the_very_folder_that_one_in_memory_does(folders, method, tmp_path):
    in_memory(folders, method, tmp_path / "memory", TASKS[:2])
    from_files(folders, method, tmp_path / "files", TASKS[:2])
    assert contents(tmp_path / "files") == contents(tmp_path / "memory")


@pytest.mark.parametrize("method", STREAMED)
def test_merges_in_many_parts_have_the_same_bits_whoever_goes_on(mixtral, method, parts, tmp_path):
    expected = in_memory(mixtral, method, tmp_path / "memory")
    from_files(mixtral, method, tmp_path / "files", TASKS[:2])
    manifest = read_manifest(tmp_path / "files")
    assert len(manifest["state"]) > 4
    assert {name for name in generations.names(tmp_path / "files", manifest) if "state" in name} == {
        path.name for path in (tmp_path / "files").glob("state-*")
    }
    again = mingle.Merger.from_pretrained(tmp_path / "files")
    again.add(TASKS[2], mixtral / TASKS[2])
    assert_same_merge(again, expected)
    StreamedMerger.from_pretrained(tmp_path / "files").add(TASKS[2], mixtral / TASKS[2], tmp_path / "files")
    assert_same_merge(mingle.Merger.from_pretrained(tmp_path / "files"), expected)


def test_what_a_merger_in_memory_has_saved_goes_on_from_files(mixtral, tmp_path):
    in_memory(mixtral, "opcm", tmp_path / "whole")
    in_memory(mixtral, "opcm", tmp_path / "files", TASKS[:2])
    StreamedMerger.from_pretrained(tmp_path / "files").add("three", mixtral / "three", tmp_path / "files")
    assert contents(tmp_path / "files") == contents(tmp_path / "whole")


def test_mergers_of_half_precision_modules_go_on_from_files(mixtral, tmp_path):
    """Their base is rounded to bfloat16 when it is loaded again, and what they serve is rounded once."""
    half = MixtralForCausalLM.from_pretrained(mixtral / "base", dtype=torch.bfloat16)
    merger = mingle.Merger(half, "opcm")
    merger.add("one", mixtral / "one")
    merger.save_pretrained(tmp_path)
    StreamedMerger.from_pretrained(tmp_path).add("two", mixtral / "two", tmp_path)
    merger.add("two", mixtral / "two")
    found = mingle.Merger.from_pretrained(tmp_path)
    assert_same_merge(found, merger)
    assert next(found.model.parameters()).dtype == torch.bfloat16


def test_adapters_are_merged_from_their_files(tmp_path):
    save_gpt2_and_adapter(tmp_path)
    in_memory(tmp_path, "opcm", tmp_path / "memory", ["one"])
    from_files(tmp_path, "opcm", tmp_path / "files", ["one"])
    assert contents(tmp_path / "files") == contents(tmp_path / "memory")


def interrupted_at(monkeypatch, written):
    """Break off when that many parts are written."""
    remaining, write = [written], journal.write_tensors

    def writing(path, tensors):
        if not remaining[0]:
            raise Interrupted
        remaining[0] -= 1
        return write(path, tensors)

    monkeypatch.setattr(journal, "write_tensors", writing)


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


def edited(folder, target, change):
    """A copy of a model's folder in one file, its tensors changed."""
    from safetensors.torch import load_file, save_file

    tensors = {
        name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()
    }
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


NORM = "model.layers.1.input_layernorm.weight"
FAULTS = {
    "missing": lambda tensors: tensors.pop(NORM),
    "extra": lambda tensors: tensors.update({"model.layers.7.x.weight": torch.ones(2)}),
    "shape": lambda tensors: tensors.update({NORM: torch.ones(3)}),
    "not finite": lambda tensors: tensors[NORM].__setitem__(1, float("nan")),
    "integers": lambda tensors: tensors.update({NORM: torch.ones(16, dtype=torch.int8)}),
    "untied": lambda tensors: tensors.update({"lm_head.weight": torch.ones(40, 16)}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_fine_tuned_model_are_refused_in_the_same_words(mixtral, fault, tmp_path):
    broken = edited(mixtral / "two", tmp_path / "broken", FAULTS[fault])
    out = tmp_path / "merged"
    merger = from_files(mixtral, "average", out, ["one"])
    before, memory = contents(out), mingle.Merger(mixtral / "base", "average")
    memory.add("one", mixtral / "one")
    said = []
    for add in (lambda: memory.add("two", broken), lambda: merger.add("two", broken, out)):
        with pytest.raises((IncompatibleModel, CheckpointError)) as refusal:
            add()
        said.append((type(refusal.value), str(refusal.value)))
    assert said[0] == said[1] and said[0][1].startswith("task 'two': ")
    assert contents(out) == before
    merger.add("two", mixtral / "two", out)  # which is as it was before
    assert mingle.Merger.from_pretrained(out).task_names == ["one", "two"]


def test_results_that_are_not_finite_are_refused_in_the_same_words(mixtral, tmp_path):
    options = {"scaling": 1e38}
    memory = mingle.Merger(mixtral / "base", "task-arithmetic", **options)
    merger = StreamedMerger(mixtral / "base", "task-arithmetic", **options)
    huge = edited(mixtral / "one", tmp_path / "huge", lambda t: t[NORM].fill_(1e6))
    said = []
    for add in (lambda: memory.add("one", huge), lambda: merger.add("one", huge, tmp_path / "merged")):
        with pytest.raises(NonFiniteMerge) as refusal:
            add()
        said.append(str(refusal.value))
    assert said[0] == said[1] and NORM in said[0]
    assert not (tmp_path / "merged/manifest.json").exists()


def test_names_that_are_taken_and_methods_that_need_a_model_are_refused(mixtral, tmp_path):
    merger = from_files(mixtral, "average", tmp_path, ["one"])
    with pytest.raises(ValueError, match="task 'one' is already merged"):
        merger.add("one", mixtral / "two", tmp_path)
    with pytest.raises(ValueError, match="method 'routed' cannot merge this base tensor by tensor"):
        StreamedMerger(mixtral / "base", "routed")


def test_commands_load_no_model_where_none_is_needed(mixtral, tmp_path, monkeypatch):
    in_memory(mixtral, "ties", tmp_path / "memory", scaling=0.3, density=0.2)
    file = merge_file(tmp_path, mixtral / "base", {name: mixtral / name for name in TASKS[:2]}, "ties")
    monkeypatch.setattr(TaskType, "load", None)
    assert main(["merge", str(file), "--out", str(tmp_path / "files")]) == 0
    assert main(["merge", str(file), "--out", str(tmp_path / "files")]) == 0
    assert main(["add", str(tmp_path / "files"), "--name", "three", "--model", str(mixtral / "three")]) == 0
    assert main(["inspect", str(tmp_path / "files")]) == 0
    monkeypatch.undo()
    expected, found = (mingle.Merger.from_pretrained(tmp_path / name) for name in ("memory", "files"))
    assert_same_merge(found, expected)
    assert set(found.metadata["inputs"]) == set(TASKS)
    assert main(["export", str(tmp_path / "files"), "--out", str(tmp_path / "plain")]) == 0


def test_task_types_that_load_models_in_their_own_way_are_merged_in_memory(mixtral):
    class Changing(mingle.tasks.get("causal-lm").__class__):
        def load(self, folder):
            return super().load(folder).double()

    base = mingle.tasks.get("causal-lm").skeleton(mixtral / "base")

    def streams(method, task, **options):
        return streamed.streams(METHODS[method], METHODS[method].Options(**options), task, base)

    causal = mingle.tasks.get("causal-lm")
    assert streams("average", causal) and streams("mingle", causal, steps=0)
    assert not streams("average", Changing()) and not streams("mingle", Changing(), steps=0)
    assert not streams("routed", causal) and not streams("mingle", causal)
    base.register_buffer("counter", torch.zeros(()))
    assert not streams("average", causal)


@pytest.mark.parametrize("method", ["average", "opcm"])
def test_no_more_than_one_tensor_is_in_memory(method, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "PART_BYTES", 1 << 17)
    sizes = SIZES | dict(hidden_size=64, num_hidden_layers=12, intermediate_size=192)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16()
    for name in ("base", "one", "two"):
        model.save_pretrained(tmp_path / name, max_shard_size="200KB")
    whole, largest = (f(4 * tensor.numel() for tensor in model.parameters()) for f in (sum, max))
    merger = from_files(tmp_path, method, tmp_path / "merged", ["one"])
    found = peak_bytes(lambda: merger.add("two", tmp_path / "two", tmp_path / "merged"))
    assert found < (1 << 17) + 12 * largest < whole / 2
    assert found > peak_bytes(lambda: None) == 0


@pytest.mark.parametrize("method", ["task-arithmetic", "opcm"])
def test_of_a_large_tensor_that_is_merged_entry_by_entry_only_rows_are_in_memory(
    method, tmp_path, monkeypatch
):
    monkeypatch.setattr(streamed, "PART_BYTES", 1 << 14)
    monkeypatch.setattr(lazy_tensors, "BLOCK_ENTRIES", 1 << 12)
    model = LlamaForCausalLM(
        LlamaConfig(**SIZES | {"vocab_size": 9000}, intermediate_size=24, tie_word_embeddings=True)
    ).bfloat16()
    for name in ("base", "one", "two"):
        model.save_pretrained(tmp_path / name)
        model.model.embed_tokens.weight.data *= 1.5
    merger = from_files(tmp_path, method, tmp_path / "merged", ["one"])
    found = peak_bytes(lambda: merger.add("two", tmp_path / "two", tmp_path / "merged"))
    result = 4 * model.model.embed_tokens.weight.numel()
    assert result < found < 1.5 * result


_MEASURED = """
import sys
from pathlib import Path
from mingle.merging.streamed import StreamedMerger

def peak():
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

place = Path(sys.argv[1])
merger = StreamedMerger(place / "base", sys.argv[2])
merger.add("one", place / "one", place / "merged-small")
before = peak()
merger = StreamedMerger(place / "large", sys.argv[2])
for name in ("one", "two"):
    merger.add(name, place / "large", place / "merged")
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["average", "ties", "opcm", "iso-c"])
def test_a_process_takes_no_more_memory_for_a_large_model(method, tmp_path):
    """A hundred million parameters, 400 MB in fp32, none of whose tensors has more than 4 MB."""
    sizes = SIZES | dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8)
    for name in ("base", "one"):
        LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16().save_pretrained(tmp_path / name)
    large = LlamaForCausalLM(LlamaConfig(**sizes | {"num_hidden_layers": 24})).bfloat16()
    large.save_pretrained(tmp_path / "large", max_shard_size="20MB")
    size = sum(4 * tensor.numel() for tensor in large.parameters())
    assert size > 3.9e8
    del large
    command = [sys.executable, "-c", _MEASURED, str(tmp_path), method]
    # as a merge's command has it: nothing that was freed is kept for later
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    more = int(run.stdout)
    assert more < streamed.PART_BYTES + 0.2 * size


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
