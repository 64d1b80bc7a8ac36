"""Merges of which every process has a share of the weights: what comes out is what one process makes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from small_merges import NAMES, SETTINGS, same_bits
from tiny_decoders import CONFIGS, built, prompts
from tiny_decoders import tuned as tuned_decoder
from tiny_merge import contents
from worlds import world

import mingle
from mingle import ranks
from mingle.io.files import CheckpointError
from mingle.io.state_dicts import state_hash
from mingle.merging.merger import Merger
from mingle.merging.sharded import ShardedMerger
from mingle.nn.sharded import is_sharded, own_part
from mingle.tasks import TaskData
from mingle.tasks.skeletons import completed


def kept(merger):
    """All that is kept of tasks, and the bytes of weights in blocks that this process has."""
    tensors = {
        f"{i}/{name}": tensor.clone()
        for i in range(len(merger.merged))
        for name, tensor in merger.method.task_tensors(i).items()
    }
    tower = merger.method.tower
    size = sum(
        own_part(parameter).untyped_storage().nbytes()
        for stack in merger.method.structure.stacks
        for block in stack.blocks
        for name, parameter in tower.get_submodule(block).named_parameters()
        if "gate" not in name.rpartition(".")[2]
    )
    return tensors, size


def images(kind, base, tuned, samples, folder):
    """A merge of two tasks, saved, and gone on with by a merger that is read from there."""
    merger = kind(base, "mingle", **SETTINGS | {"steps": 4})
    traces = []

    def add(merger, i):
        report = merger.add(NAMES[i], tuned[i], TaskData(samples[i].inputs, samples[i].shared))
        traces.append((report.trace.loss, report.trace.interference, report.trace.strength))

    add(merger, 0)
    merger.save_pretrained(folder)
    merger = kind.from_pretrained(folder)
    add(merger, 1)
    result = merger.evaluate(dict(zip(NAMES, samples, strict=False)), batch_size=5)
    merger.save_pretrained(folder)
    return *kept(merger), traces, result, is_sharded(merger.model)


def texts(kind, base, tuned, pair, _):
    """Of a decoder or an encoder with its decoder, whose tasks have other numbers of tokens that count.

    Where weights are shared out, one sample after another: some processes then have more of them than others.
    """
    at_once = None if kind is Merger else 1
    merger = kind(base, "mingle", rank=4, steps=3, lr=1e-3, batch_size=5, micro_batch_size=at_once)
    traces = []
    for i, folder in enumerate(tuned):
        seeds = prompts(pair, i)
        if pair not in ("mt5", "bart"):
            seeds["answer_mask"] = seeds["attention_mask"].clone()
            seeds["answer_mask"][:2] = 0
        report = merger.add(NAMES[i], folder, seeds)
        traces.append((report.trace.loss, report.trace.interference, report.trace.strength))
    return *kept(merger), traces, None, is_sharded(merger.model)


def check(found, alone, share):
    for each in found:
        if isinstance(each, BaseException):
            raise each
    tensors, _, traces, result, _ = found[0]
    for mine, size, trace, accuracies, sharded in found:
        same_bits(mine, tensors)  # on all ranks, S and λ in traces too
        assert (trace, accuracies) == (traces, result) and sharded
        assert size <= share * alone[1]
    assert result == alone[3]
    assert tensors.keys() == alone[0].keys()
    for part in ("gate_weight", "gate_bias", "basis"):
        pair = [
            torch.cat([values[name].flatten() for name in tensors if part in name])
            for values in (tensors, alone[0])
        ]
        assert (pair[0] - pair[1]).norm() <= 1e-5 * pair[1].norm(), part
    for name in tensors:
        if name.endswith((".A", ".B")):
            assert torch.equal(tensors[name], alone[0][name]), name
    for mine, theirs in zip(traces, alone[2], strict=True):
        assert mine[0] == pytest.approx(theirs[0], rel=1e-5)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_merge_of_images(base_folder, tuned_folders, samples, size, tmp_path):
    work = partial(images, base=base_folder, tuned=tuned_folders, samples=samples)
    alone = work(Merger, folder=tmp_path / "alone")
    found = world(size, lambda: work(ShardedMerger, folder=tmp_path / "shared"), seconds=150)
    check(found, alone, 1.2 / size)
    merged = Merger.from_pretrained(tmp_path / "shared")
    same_bits(kept(merged)[0], found[0][0])
    assert len(contents(tmp_path / "shared")) == len(contents(tmp_path / "alone"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mt5", "gpt2"])
def test_a_merge_of_texts(name, tmp_path):
    base = built(CONFIGS[name]())
    base.save_pretrained(tmp_path / "base")
    folders = [tmp_path / f"tuned{i}" for i in range(2)]
    for i, folder in enumerate(folders):
        tuned_decoder(base, i).save_pretrained(folder)
    work = partial(texts, base=tmp_path / "base", tuned=folders, pair=name, _=None)
    check(world(2, lambda: work(ShardedMerger), seconds=150), work(Merger), 0.55)


@pytest.mark.slow
def test_a_process_alone_makes_the_same_bits(base_folder, tuned_folders, samples, tmp_path):
    work = partial(images, base=base_folder, tuned=tuned_folders, samples=samples)
    whole, shared = (work(kind, folder=tmp_path / kind.__name__) for kind in (Merger, ShardedMerger))
    same_bits(whole[0], shared[0])
    assert whole[1:] == shared[1:] and not shared[-1]
    assert contents(tmp_path / "Merger") == contents(tmp_path / "ShardedMerger")


@pytest.mark.parametrize("name", ["llama", "bart", "mt5", "gemma3"])
def test_skeletons_have_what_loaded_models_have_beside_parameters(name, tmp_path):
    built(CONFIGS[name]()).save_pretrained(tmp_path)
    task = mingle.tasks.of(tmp_path)
    loaded, bare = task.load(tmp_path), task.skeleton(tmp_path)
    wanted = loaded.generation_config.to_dict()
    assert bare.generation_config.to_dict() != wanted  # no end of answers
    skeleton = completed(bare, tmp_path)
    assert skeleton.generation_config.to_dict() == wanted
    wanted, found = dict(loaded.named_buffers()), dict(skeleton.named_buffers())
    same_bits(found, wanted)
    assert wanted or name == "mt5"
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_what_cannot_be_shared_out_is_refused(base_model, base_folder, tmp_path):
    with pytest.raises(ValueError, match="a base whose weights are shared out is read from its folder"):
        ShardedMerger(base_model)
    with pytest.raises(ValueError, match="method 'ties' needs whole models"):
        ShardedMerger(base_folder, "ties")
    with pytest.raises(ValueError, match="method 'mingle-routed' needs whole models"):
        ShardedMerger(base_folder, "mingle-routed")
    with pytest.raises(ValueError, match="precision 'bf16' would keep a whole copy"):
        ShardedMerger(base_folder, precision="bf16")
    merger = ShardedMerger(base_folder)
    with pytest.raises(ValueError, match="no process has the whole model: save it"):
        merger.export(tmp_path / "out")
    assert merger.base_hash == state_hash(merger.task.load(base_folder))


def test_faults_of_a_fine_tuned_model_are_found_before_any_work(
    base_folder, tuned_folders, tuned_states, samples, tmp_path
):
    broken = {f"vision_model.{name}": tensor.clone() for name, tensor in tuned_states[0].items()}
    broken["vision_model.post_layernorm.bias"][3] = float("nan")
    config = (tuned_folders[0] / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    save_file(broken, tmp_path / "model.safetensors", {"format": "pt"})

    def add():
        merger = ShardedMerger(base_folder, **SETTINGS)
        merger.add("one", tmp_path, TaskData(samples[0].inputs, samples[0].shared))

    found = world(2, add)
    kinds = {type(error) for error in found}  # each finds it by itself, unless it hears of it first
    assert CheckpointError in kinds and kinds <= {CheckpointError, ranks.OtherRankFailed}
    assert all("post_layernorm.bias" in str(error) and "not finite" in str(error) for error in found)
