"""The text suites: where the base comes from, what samples are, and experts that are trained once."""

from __future__ import annotations

import importlib.util
import shutil
import sys

import pytest
import torch
from few_samples import every_tenth
from small_minilm import write_model, write_package

import mingle
from mingle import suites
from mingle.io.files import sha256
from mingle.io.safetensors import CheckpointReader
from mingle.merging.evaluate import accuracy
from mingle.options import OptionError
from mingle.runs.compare import Comparison, run
from mingle.suites import texts
from mingle.suites.texts.base import HUB_ID, PACKAGE, TextBase, find_base
from mingle.suites.texts.corpus import read_tasks
from mingle.suites.texts.finetune import FinetuneConfig, finetune
from mingle.tasks.sentence_encoder import SentenceEncoderTask

TASKS = read_tasks("texts8")
SHORT = FinetuneConfig(steps=2, batch_size=4)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site-packages")
    write_package(folder)
    return folder


@pytest.fixture
def package(site, monkeypatch):
    """The model's folder in the stand-in of the package, which is installed."""
    monkeypatch.syspath_prepend(site)
    return site / PACKAGE / "model"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache, in which training takes two steps."""
    monkeypatch.setenv("MINGLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(texts.finetune, "FinetuneConfig", lambda: SHORT)
    return tmp_path / "cache" / "texts"


def test_the_base_is_the_package_s_model(package):
    assert suites.load("texts8").base == package


def test_without_the_package_the_hub_s_cache_will_do(hub, site, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    folder = site / PACKAGE / "model"
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    commit = hub.add(HUB_ID, files)
    suite = suites.load("texts8")
    assert suite.base == hub.snapshot(HUB_ID)
    assert suite.revisions == {HUB_ID: commit}
    assert TextBase(suite.base).digest == TextBase(folder).digest


def test_without_the_package_and_the_hub_the_error_says_what_to_install(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    with pytest.raises(OptionError, match=r"pip install 'mingle-merge\[texts\]'.*not in the hub's cache"):
        _ = suites.load("texts8").base


def test_samples_are_tokens_with_the_base_s_embeddings_of_the_class_names(package):
    suite = suites.load("texts8", protocol="official")
    data, task = suite["emoji"], TASKS["emoji"]
    assert set(data.inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    assert data.inputs["input_ids"].shape == data.inputs["attention_mask"].shape
    assert torch.bincount(data.labels).tolist() == [len(own) for own in task.test]
    head = data.shared["text_embeds"]
    assert head.shape == (len(task.class_names), 32)
    torch.testing.assert_close(head.norm(dim=1), torch.ones(len(head)))
    encoder = SentenceEncoderTask()
    # A class name is a text like any other: its own embedding is nearest.
    names = encoder.data({**TextBase(package).tokens(task.class_names), "text_embeds": head})
    assert encoder.logits(encoder.load(package), names).argmax(1).tolist() == list(range(len(head)))


def test_strict_seeds_leave_enough_texts_for_the_test(package):
    suite = suites.load("texts8")
    for name, task in TASKS.items():
        suite.check(name)
        seeds, test = suite.seeds(name), suite[name]
        assert len(seeds) == 5 * len(task.class_names)
        assert len(test) == sum(map(len, task.test)) - len(seeds) >= 300
        assert suite.shortage(name) == ""


def test_classes_that_the_tokenizer_cannot_tell_apart_are_refused(package):
    with pytest.raises(ValueError, match="the classes 'Ünion' and 'union' are the same tokens"):
        TextBase(package).check(["other", "Ünion", "union"])


def test_experts_are_trained_once_into_the_cache(package, cache):
    steps = []
    suite = suites.load("texts8", on_training=lambda *step: steps.append(step))
    folder = suite.expert("emoji")
    assert steps == [("emoji", 1, 2), ("emoji", 2, 2)]
    assert folder.parent == cache
    again = suites.load("texts8", on_training=lambda *_: pytest.fail("trained twice"))
    assert again.expert("emoji") == folder
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_another_base_or_other_training_makes_another_expert(package, cache, tmp_path, monkeypatch):
    first = suites.load("texts8").expert("feelings")
    copied = tmp_path / "copied"
    shutil.copytree(package, copied)
    assert suites.load("texts8", base=copied).expert("feelings") == first
    other = write_model(tmp_path / "other")
    pooling = other / "1_Pooling" / "config.json"
    pooling.write_text('{"pooling_mode_cls_token": true}')
    assert suites.load("texts8", base=other).expert("feelings") != first
    monkeypatch.setattr(texts.finetune, "FinetuneConfig", lambda: FinetuneConfig(steps=1, batch_size=4))
    assert suites.load("texts8").expert("feelings") != first


def test_chains_are_trained_once_and_kept_by_order(package, cache):
    trained = []
    suite = suites.load("texts8", on_training=lambda name, step, total: trained.append(name))
    suite.check_sequential()
    folders = {
        names: suite.expert(names[-1], names[:-1])
        for names in (("emoji", "cities"), ("cities",), ("emoji",), ("feelings", "emoji", "cities"))
    }
    assert len(set(folders.values())) == 4
    assert suite.expert("cities", ("emoji",)) == folders["emoji", "cities"]
    assert trained[::2] == ["emoji", "cities", "cities", "feelings", "emoji", "cities"]


def test_finetuning_may_start_from_another_task_s_model(package, tmp_path):
    finetune(TextBase(package), TASKS["emoji"], tmp_path / "emoji", SHORT)
    still = FinetuneConfig(steps=1, batch_size=4, lr=1e-12)
    finetune(TextBase(package), TASKS["cities"], tmp_path / "cities", still, start=tmp_path / "emoji")
    before, after = (CheckpointReader(tmp_path / name).state_dict() for name in ("emoji", "cities"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_training_texts_are_those_that_finetuning_sees(package):
    whole = suites.load("texts8").seeds("feelings", whole=True)
    assert whole.labels is None
    assert len(whole) == sum(map(len, TASKS["feelings"].train))


def test_finetuning_is_reproducible_and_writes_a_hub_folder(package, tmp_path):
    from transformers import AutoModel

    for name in ("a", "b"):
        torch.rand(1)  # whatever happened before
        finetune(TextBase(package), TASKS["emoji"], tmp_path / name, SHORT)
    assert sha256(tmp_path / "a" / "model.safetensors") == sha256(tmp_path / "b" / "model.safetensors")
    model, report = AutoModel.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    before = CheckpointReader(package)
    changed = [
        name for name in before if not torch.equal(model.state_dict()[name], before.tensor(name).half())
    ]
    assert {"embeddings.word_embeddings.weight", "encoder.layer.1.output.dense.bias"} <= set(changed)
    assert model.dtype == torch.float16


def test_finetuning_learns_its_task(package, tmp_path):
    suite, encoder = suites.load("texts8", protocol="official"), SentenceEncoderTask()
    model = encoder.load(package)
    before = accuracy(encoder, model, suite["languages"])
    finetune(TextBase(package), TASKS["languages"], tmp_path / "out", FinetuneConfig(steps=60, lr=5e-3))
    reader = CheckpointReader(tmp_path / "out")
    model.load_state_dict({name: reader.tensor(name) for name in reader})
    assert accuracy(encoder, model, suite["languages"]) > before + 5


@pytest.mark.slow
def test_methods_of_every_sort_run_on_it(package, cache, tmp_path, monkeypatch):
    every_tenth(monkeypatch)
    options = (("rank", 2), ("steps", 1))
    asked = Comparison("texts8", methods=("average", "mingle", "mingle-seq"), options=options)
    found = run(asked, tmp_path / "out")["methods"]
    assert {name: len(rows["matrix"][0]) for name, rows in found.items()} == dict.fromkeys(asked.methods, 8)
    folder = tmp_path / "out/merged/average"
    again = mingle.Merger.from_pretrained(folder).evaluate(suites.load("texts8", base=package))
    assert again.acc == pytest.approx(found["average"]["acc"][0])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed")
def test_the_real_model_knows_something_and_its_expert_more():
    suite, encoder = suites.load("texts8", protocol="official"), SentenceEncoderTask()
    model = encoder.load(find_base())
    before = accuracy(encoder, model, suite["emoji"])
    reader = CheckpointReader(suite.expert("emoji"))
    model.load_state_dict({name: reader.tensor(name) for name in reader})
    assert 30 <= before <= 65
    assert accuracy(encoder, model, suite["emoji"]) >= before + 10
