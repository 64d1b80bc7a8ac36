"""The suites of the papers on a stand-in of the hub: images, heads, prompts, seeds, models; and as a user
runs them.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("pyarrow", reason="the suites of the papers read Parquet files")

import standin_hub as standin
import yaml
from PIL import Image
from standin_hub import images, table
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    T5ForConditionalGeneration,
)

import mingle
from mingle import suites
from mingle.cli import main
from mingle.io.files import CheckpointError
from mingle.io.safetensors import CheckpointReader
from mingle.merging.evaluate import accuracy
from mingle.options import OptionError
from mingle.suites.fusionbench import clip, prompts
from mingle.suites.fusionbench.datasets import CORRUPTIONS, IMAGE_SUITES, IMAGE_TASKS, ImageSuite
from mingle.suites.fusionbench.layout import DatasetError
from mingle.tasks import TaskData
from mingle.tasks.clip import ClipTask
from mingle.tasks.lazy import LazyInputs

BASE, EUROSAT, SVHN = "openai/clip-vit-base-patch32", "tanganke/eurosat", "ufldl-stanford/svhn"
TEST_FILE = "data/test-00000-of-00001.parquet"


@pytest.fixture
def image_hub(hub, tmp_path):
    """Base, sharded, and two tasks with their fine-tuned models."""
    base = standin.clip()
    hub.add(BASE, standin.clip_base(tmp_path / "models/base", base, shard="100KB"))
    for seed, task in enumerate(("eurosat", "svhn")):
        hub.add(
            f"tanganke/clip-vit-base-patch32_{task}",
            standin.clip_expert(tmp_path / "models" / task, base, seed),
        )
    shards = {
        f"data/test-{i:05d}-of-00002-ab.parquet": table(images(count, 3, first=first))
        for i, count, first in ((0, 14, 0), (1, 11, 14))
    }
    hub.add(EUROSAT, shards, "dataset")
    digits = {
        f"{config}/test-00000-of-00001.parquet": table(images(count, 3))
        for config, count in (("cropped_digits", 20), ("full", 2))
    }
    hub.add(SVHN, digits, "dataset")
    return hub


def test_orders_and_models_are_those_of_the_papers():
    names = [task.name for task in IMAGE_TASKS]
    for count in (8, 14, 20):
        for size in ("b32", "b16", "l14"):
            assert list(suites.load(f"clip-{size}-{count}")) == names[:count]
    domains = "aircraft caltech101 cifar100 dtd eurosat flowers food101 mnist pets cars sun397"
    assert list(suites.load("mtil-11")) == domains.split()
    assert (
        list(suites.load("glue-8"))
        == list(suites.load("glue-8-lora"))
        == ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]
    )
    assert IMAGE_SUITES["clip-l14-20"].base == "openai/clip-vit-large-patch14"
    for name in (
        "clip-b32-corrupted",
        "clip-b32-clean",
        *(f"clip-b32-{corruption}" for corruption in CORRUPTIONS),
    ):
        assert list(suites.load(name)) == ["stanford-cars", "eurosat", "resisc45", "gtsrb"]


@pytest.mark.parametrize(
    ("suite", "task", "model"),
    [
        ("clip-b32-8", "sun397", "tanganke/clip-vit-base-patch32_sun397"),
        ("clip-b16-14", "oxford-iiit-pet", "tanganke/clip-vit-base-patch16_oxford-iiit-pet"),
        ("clip-l14-20", "emnist_letters", "tanganke/clip-vit-large-patch14_emnist_letters"),
        ("mtil-11", "cars", "tanganke/clip-vit-base-patch16_stanford-cars"),
        ("glue-8", "stsb", "tanganke/flan-t5-base_glue-stsb"),
        ("glue-8-lora", "mnli", "tanganke/flan-t5-base_glue-mnli_lora-16"),
    ],
)
def test_fine_tuned_models_have_the_hub_s_names(hub, suite, task, model):
    with pytest.raises(CheckpointError, match=f"^{model}: not in the hub's cache.*hf download {model}"):
        suites.load(suite).expert(task)
    hub.add(model, {"adapter_model.safetensors": b"", "adapter_config.json": b"{}"})
    assert suites.load(suite).expert(task) == hub.snapshot(model)


def test_samples_are_the_images_through_the_base_s_own_processor(image_hub):
    data = suites.load("clip-b32-8", protocol="official")["eurosat"]
    assert isinstance(data.inputs, LazyInputs) and len(data) == 25
    assert data.labels.tolist() == [i % 3 for i in range(25)]
    processor = CLIPImageProcessorPil.from_pretrained(image_hub.snapshot(BASE))
    encoded = [row["bytes"] for row in images(25, 3)["image"]]
    expected = [
        processor(images=[Image.open(io.BytesIO(e)).convert("RGB")], return_tensors="pt")["pixel_values"]
        for e in encoded
    ]
    found = [batch.inputs["pixel_values"] for batch in data.batches(7)]
    assert [len(batch) for batch in found] == [7, 7, 7, 4]
    assert torch.equal(torch.cat(found), torch.cat(expected))


def test_images_are_decoded_batch_by_batch(image_hub, monkeypatch):
    decoded: list[int] = []
    made = clip._Pixels.__call__
    monkeypatch.setattr(
        clip._Pixels, "__call__", lambda self, rows: decoded.append(len(rows)) or made(self, rows)
    )
    suite = suites.load("clip-b32-8", samples_per_class=1)
    data = ClipTask().data(suite["eurosat"])
    assert max(decoded) <= 3  # the seeds, and one image to see its shape
    model = CLIPModel.from_pretrained(image_hub.snapshot(BASE)).eval()
    decoded.clear()
    accuracy(ClipTask(), model, data, 10)
    assert decoded == [10, 10, 2]
    whole = data.made()
    assert not isinstance(whole.inputs, LazyInputs)
    assert accuracy(ClipTask(), model, whole, 10) == accuracy(ClipTask(), model, data, 10)


def test_the_head_is_the_mean_of_the_templates(image_hub):
    found = suites.load("clip-b32-8")["eurosat"].shared["text_embeds"]
    folder = image_hub.snapshot(BASE)
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    for number, name in enumerate(("annual crop land", "forest", "river")):
        texts = [f"a photo of {name}.", f"a {name}."]
        with torch.no_grad():
            embeddings = [
                model.text_projection(model.text_model(**tokenizer([t], return_tensors="pt")).pooler_output)
                for t in texts
            ]
        expected = F.normalize(torch.stack([F.normalize(e, dim=-1) for e in embeddings]).mean(0), dim=-1)[0]
        torch.testing.assert_close(found[number], expected)


def test_heads_are_kept_by_the_content_of_the_base(image_hub, monkeypatch, tmp_path):
    calls = []
    make = clip.zero_shot_head
    monkeypatch.setattr(clip, "zero_shot_head", lambda *given: calls.append(1) or make(*given))
    first = [suites.load("clip-b32-8")["eurosat"].shared["text_embeds"] for _ in range(2)]
    assert torch.equal(*first) and len(calls) == 1
    suites.load("clip-b32-8")["svhn"]
    assert len(calls) == 2
    image_hub.add(BASE, standin.clip_base(tmp_path / "models/other", standin.clip(1)))
    assert not torch.equal(first[0], suites.load("clip-b32-8")["eurosat"].shared["text_embeds"])
    assert len(calls) == 3


@pytest.mark.parametrize("protocol", ["strict", "official"])
def test_seeds_come_from_the_test_images_as_the_protocol_says(image_hub, protocol):
    suite = suites.load("clip-b32-8", protocol=protocol, samples_per_class=2)
    seeds, test = suite.seeds("eurosat"), suite["eurosat"]
    assert seeds.labels is None and seeds.inputs["pixel_values"].shape == (6, 3, 16, 16)
    rows = test.inputs.rows.tolist()
    pixels = suites.load("clip-b32-8", protocol="official")["eurosat"].made().inputs["pixel_values"]
    chosen = [
        next(i for i in range(25) if torch.equal(pixels[i], seed)) for seed in seeds.inputs["pixel_values"]
    ]
    if protocol == "strict":
        assert sorted(rows + chosen) == list(range(25))
    else:
        assert rows == list(range(25)) and sorted(i % 3 for i in chosen) == [0, 0, 1, 1, 2, 2]


def test_the_config_of_a_data_set_with_several_is_the_published_one(image_hub):
    assert len(suites.load("clip-b32-8", protocol="official")["svhn"]) == 20


def test_corrupted_images_are_splits_of_the_same_data_sets(image_hub):
    files = {
        f"data/{split}-00000-of-00001.parquet": table(images(i + 3, 3)) for i, split in enumerate(CORRUPTIONS)
    }
    image_hub.add(EUROSAT, files | {TEST_FILE: table(images(2, 2))}, "dataset")
    for i, split in enumerate(CORRUPTIONS):
        assert (
            len(suites.load(f"clip-b32-{split}", protocol="official", samples_per_class=1)["eurosat"])
            == i + 3
        )
    everything = suites.load("clip-b32-corrupted", protocol="official")["eurosat"]
    assert everything.labels.tolist() == [row % 3 for i in range(len(CORRUPTIONS)) for row in range(i + 3)]
    assert everything.select(torch.tensor([0, 41])).made().inputs["pixel_values"].shape == (2, 3, 16, 16)
    assert len(suites.load("clip-b32-clean", protocol="official")["eurosat"]) == 2


@pytest.mark.parametrize(
    ("suite", "task", "repo", "file", "columns"),
    [
        (
            "clip-b32-14",
            "fer2013",
            "clip-benchmark/wds_fer2013",
            "default/test/0000.parquet",
            images(4, 2, "jpg", "cls"),
        ),
        (
            "clip-b32-14",
            "cifar100",
            "tanganke/cifar100",
            TEST_FILE,
            images(4, 2, label="fine_label") | {"coarse_label": [9] * 4},
        ),
        ("clip-b32-20", "food101", "ethz/food101", "data/validation-00000-of-00001.parquet", images(4, 2)),
    ],
)
def test_columns_and_splits_that_are_called_otherwise(image_hub, suite, task, repo, file, columns):
    image_hub.add(repo, {file: table(columns)}, "dataset")
    data = suites.load(suite, protocol="official")[task]
    assert data.labels.tolist() == [0, 1, 0, 1] and data.made().inputs["pixel_values"].shape == (4, 3, 16, 16)


def test_tasks_outside_the_package_take_the_class_names_of_the_data_set(image_hub, tmp_path):
    image_hub.add("openai/clip-vit-base-patch16", standin.clip_base(tmp_path / "models/b16", standin.clip()))
    image_hub.add(
        "tanganke/aircraft", {TEST_FILE: table(images(4, 2), {"label": ["707", "A380"]})}, "dataset"
    )
    data = suites.load("mtil-11", protocol="official")["aircraft"]
    assert data.shared["text_embeds"].shape == (2, 16)


def test_every_commit_that_was_used_is_noted_and_kept(image_hub):
    revisions: dict[str, str] = {}
    suite = suites.load("clip-b32-8", revisions=revisions)
    assert revisions == {}
    suite.check("eurosat")
    suite.expert("eurosat")
    repos = {
        BASE: "model",
        "tanganke/clip-vit-base-patch32_eurosat": "model",
        f"datasets/{EUROSAT}": "dataset",
    }
    assert revisions == {
        repo: image_hub.snapshot(repo.removeprefix("datasets/"), kind).name for repo, kind in repos.items()
    }
    before = len(suite["eurosat"])
    image_hub.add(EUROSAT, {TEST_FILE: table(images(90, 3))}, "dataset")
    assert len(suites.load("clip-b32-8", revisions=revisions)["eurosat"]) == before


def test_defects_are_found_before_models_are_loaded(image_hub, monkeypatch):
    monkeypatch.setattr(ClipTask, "load", lambda *_: pytest.fail("a model was loaded"))
    for columns, message in (
        ({"picture": images(3, 3)["image"], "label": [0, 1, 2]}, "no column 'image'.*it has picture, label"),
        (images(5, 5), "row 3 has label 3, but there are 3 classes"),
    ):
        image_hub.add(EUROSAT, {TEST_FILE: table(columns)}, "dataset")
        with pytest.raises(DatasetError, match=f"{EUROSAT}, split 'test': {message}"):
            suites.load("clip-b32-8").check("eurosat")


@pytest.mark.parametrize("broken", [b"not an image", b"", None, standin.picture(0)[:200]])
def test_an_image_that_cannot_be_decoded_is_named_with_file_and_row(image_hub, broken):
    columns = images(9, 3)
    columns["image"][6] = {"bytes": broken, "path": "6.png"}
    image_hub.add(EUROSAT, {TEST_FILE: table(columns)}, "dataset")
    with pytest.raises(
        DatasetError, match=rf"{EUROSAT}, split 'test': not a readable image: .*{TEST_FILE}, row 6"
    ):
        suites.load("clip-b32-8", protocol="official")["eurosat"].made()


def test_a_base_without_an_image_processor_is_refused_at_the_check(image_hub, tmp_path):
    files = standin.clip_base(tmp_path / "models/again", standin.clip())
    del files["preprocessor_config.json"]
    image_hub.add(BASE, files)
    with pytest.raises(CheckpointError, match="no image processor .preprocessor_config.json"):
        suites.load("clip-b32-8").check("eurosat")


def test_a_missing_package_is_named_with_the_extra(image_hub, monkeypatch):
    monkeypatch.setattr(prompts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"fusion-bench: pip install 'mingle-merge\[suites\]'"):
        suites.load("clip-b32-8").check("eurosat")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(OptionError, match=r"Parquet files: pip install 'mingle-merge\[suites\]'"):
        suites.load("clip-b32-8").check("eurosat")


@pytest.mark.parametrize(
    ("task", "texts", "answers", "metric"),
    [
        (
            "cola",
            ['Correct: "Bark dogs the."?', 'Correct: "Dogs bark."?'],
            ["unacceptable", "acceptable"],
            "accuracy",
        ),
        ("mnli", ["B b implies D?", "A implies C?"], ["entailment", "contradiction"], "accuracy"),
        ("stsb", ["b and d?", "a and c?"], ["0.0", "5.0"], "spearman"),
    ],
)
def test_glue_samples_are_prompts_and_answers(glue_hub, task, texts, answers, metric):
    data = suites.load("glue-8", protocol="official")[task].select(torch.tensor([1, 0])).made()
    tokenizer = AutoTokenizer.from_pretrained(glue_hub.snapshot("google/flan-t5-base"))
    expected = tokenizer(texts, padding=True, return_tensors="pt")
    assert data.metric == metric
    assert torch.equal(data.inputs["input_ids"], expected["input_ids"])
    assert torch.equal(data.inputs["attention_mask"], expected["attention_mask"])
    assert data.labels.dtype == torch.int64
    assert data.decode(data.labels) == answers
    ended = [row[row != tokenizer.pad_token_id].tolist() for row in data.labels]
    assert all(row[-1] == tokenizer.eos_token_id for row in ended)


def test_glue_prompts_are_padded_per_batch(glue_hub):
    data = suites.load("glue-8", protocol="official")["qqp"]
    assert isinstance(data.inputs, LazyInputs)
    assert [batch.inputs["input_ids"].shape[1] for batch in data.batches(130)] == [
        len("Is 100? or Or??") + 1
    ] * 2
    assert data.select(slice(0, 10)).made().inputs["input_ids"].shape[1] == len("Is 1? or Or??") + 1


def test_a_hundred_seeds_of_every_glue_task(glue_hub):
    for protocol, left in (("strict", 160), ("official", 260)):
        suite = suites.load("glue-8", protocol=protocol)
        assert (suite.task_type, len(suite.seeds("qqp")), len(suite["qqp"])) == ("t5", 100, left)
        assert suite.seeds("qqp").labels is None
    assert [len(part) for part in (suites.load("glue-8").seeds("cola"), suites.load("glue-8")["cola"])] == [
        1,
        2,
    ]


def test_glue_labels_and_texts_are_checked(glue_hub):
    def add(**changes):
        glue_hub.add(
            "glue",
            {"cola/validation-00000-of-00001.parquet": table(standin.GLUE["cola"] | changes)},
            "dataset",
        )

    add(label=[1, -1, 0])
    with pytest.raises(
        DatasetError, match=r"glue .cola., split 'validation': row 1 has label -1, expected one of 0, 1"
    ):
        suites.load("glue-8").check("cola")
    add(sentence=["a", None, "b"])
    with pytest.raises(DatasetError, match="row 1 has no text in the column 'sentence'"):
        suites.load("glue-8", protocol="official")["cola"].made()


@pytest.mark.parametrize("suite", ["glue-8", "glue-8-lora"])
def test_glue_is_merged_and_evaluated(glue_hub, tmp_path, suite):
    """With whole fine-tuned models, and with adapters."""
    peft = (
        pytest.importorskip("peft", reason="adapters are made with PEFT") if suite == "glue-8-lora" else None
    )
    for task in ("cola", "stsb"):
        model = T5ForConditionalGeneration.from_pretrained(glue_hub.snapshot("google/flan-t5-base"))
        if peft is not None:
            model = peft.get_peft_model(
                model, peft.LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False)
            )
        model.save_pretrained(tmp_path / task)
        name = f"tanganke/flan-t5-base_glue-{task}{'' if peft is None else '_lora-16'}"
        glue_hub.add(name, standin.contents(tmp_path / task))
    loaded = suites.load(suite)
    merger = mingle.Merger(loaded.base, "mingle", loaded.task_type, rank=2, steps=2)
    for task in ("cola", "stsb"):
        merger.add(task, loaded.expert(task), loaded.seeds(task))
    result = merger.evaluate(loaded)
    assert result.tasks == ["cola", "stsb"] and all(-100 <= value <= 100 for value in result.matrix[-1])


def user(hub, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command as a user runs it, offline, with nothing but the environment to say where the hub's cache is."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {
        "HF_HOME": str(hub.home),
        "PYTHONPATH": str(tmp_path / "packages"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    return subprocess.run(
        [sys.executable, "-m", "mingle", *arguments],
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


def test_check_merge_and_eval_as_a_user_runs_them(image_hub, tmp_path):
    config, out = write_config(tmp_path), tmp_path / "merged"
    for arguments in (["check", config], ["merge", config, "--out", str(out)], ["eval", str(out)]):
        done = user(image_hub, tmp_path, *arguments, "--offline")
        assert done.returncode == 0, done.stdout + done.stderr
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
    assert f"begun with {model} at commit {first}, not {second}" in capsys.readouterr().out
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
            f"{BASE}: not in the hub's cache .* and offline; fetch it where there is a network: hf download {BASE}",
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


def test_adapters_of_the_lora_suite_are_folders_as_they_are(hub, tmp_path):
    peft = pytest.importorskip("peft", reason="adapters are made with PEFT")
    hub.add("google/flan-t5-base", standin.t5_base(tmp_path / "t5"))
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5")
    peft.get_peft_model(
        model, peft.LoraConfig(r=16, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    ).save_pretrained(tmp_path / "lora")
    hub.add("tanganke/flan-t5-base_glue-cola_lora-16", standin.contents(tmp_path / "lora"))
    folder = suites.load("glue-8-lora").expert("cola")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 16
    assert all("lora_" in name for name in CheckpointReader(folder))


def test_lazy_inputs_are_a_mapping():
    lazy = LazyInputs(
        ("a", "b"), lambda rows: {"a": torch.tensor(rows), "b": -torch.tensor(rows)}, torch.arange(9)
    )
    data = TaskData(lazy, {}, torch.arange(9) * 10, metric="spearman").select(torch.tensor([8, 2, 5]))
    assert len(data) == 3 and list(data.inputs) == ["a", "b"] and len(data.inputs) == 2
    assert data.inputs["b"].tolist() == [-8, -2, -5]
    moved = data.to(torch.device("cpu"))
    assert (moved.inputs["a"].tolist(), moved.labels.tolist(), moved.metric) == (
        [8, 2, 5],
        [80, 20, 50],
        "spearman",
    )
    assert [batch.inputs["a"].tolist() for batch in data.batches(2)] == [[8, 2], [5]]
