"""Flan-T5 as a user merges it, on a stand-in of the hub: folders, adapters, and the metrics of GLUE."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("pyarrow", reason="the suites of the papers read Parquet files")

import standin_hub as standin
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5ForConditionalGeneration

from mingle import suites
from mingle.cli import main
from mingle.suites import fusionbench, glyphs
from mingle.tasks.seq2seq import Seq2SeqTask

BASE = "google/flan-t5-base"
QQP, STSB, COLA = (f"tanganke/flan-t5-base_glue-{name}" for name in ("qqp", "stsb", "cola_lora-16"))
ROWS = {
    "qqp": {
        "question1": [f"Is {i}?" for i in range(40)],
        "question2": ["Or?"] * 40,
        "label": [0, 1] * 20,
        "idx": list(range(40)),
    },
    "stsb": {
        "sentence1": ["a", "b", "c", "d"] * 3,
        "sentence2": ["x"] * 4 + ["y"] * 4 + ["z"] * 4,
        "label": [0.2, 1.4, 3.0, 5.0] * 3,
        "idx": list(range(12)),
    },
}  # fmt: skip


def taught(base: Path, folder: Path, lines: dict[str, str]) -> Path:
    """A model that has learned to answer these lines."""
    torch.manual_seed(1)
    tokenizer, model = AutoTokenizer.from_pretrained(base), T5ForConditionalGeneration.from_pretrained(base)
    prompts, answers = (
        tokenizer(list(texts), padding=True, return_tensors="pt") for texts in (lines, lines.values())
    )
    labels = answers.input_ids.masked_fill(answers.attention_mask == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        loss = model(**prompts, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def adapter(
    folder: Path,
    base: Path,
    suffixes: tuple[str, ...] = ("SelfAttention.q", "EncDecAttention.v"),
    seed: int = 0,
) -> Path:
    """A LoRA adapter of rank 2 as PEFT writes it."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name.removesuffix(".weight"): tensor for name, tensor in load_file(base / "model.safetensors").items()
    }
    factors = {}
    for name, tensor in weights.items():
        if name.endswith(suffixes):
            for half, shape in (("A", (2, tensor.shape[1])), ("B", (tensor.shape[0], 2))):
                factors[f"base_model.model.{name}.lora_{half}.weight"] = torch.randn(
                    shape, generator=generator
                )
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"})
    )
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """What the hub holds: the base, two models that have learned their tasks, and an adapter that has learned
    nothing.
    """
    folder = tmp_path_factory.mktemp("models")
    base = folder / "base"
    files = {BASE: standin.t5_base(base)}
    paraphrases = {f"Is {i}? or Or??": ("no", "yes")[i % 2] for i in range(40)}
    scores = {
        f"{a} and {b}?": score
        for b in "xyz"
        for a, score in zip("abcd", ("0.2", "1.4", "3.0", "5.0"), strict=True)
    }
    files[QQP] = standin.contents(taught(base, folder / "qqp", paraphrases))
    files[STSB] = standin.contents(taught(base, folder / "stsb", scores))
    files[COLA] = standin.contents(adapter(folder / "cola", base))
    return files


@pytest.fixture
def taught_hub(hub, models):
    for name, files in models.items():
        hub.add(name, files)
    hub.add("glue", standin.glue_files(**ROWS), "dataset")
    return hub


def write_config(tmp_path: Path, experts: dict[str, str], **changes) -> str:
    content = {
        "base": BASE,
        "method": "mingle",
        "experts": [{"name": name, "model": model} for name, model in experts.items()],
        "adapt": {"steps": 3},
        "rank": 4,
        "eval": {"suite": "glue-8"},
    } | changes
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return str(path)


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def fails(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main([*arguments]) == 2
    return " ".join(capsys.readouterr().out.split())


def test_check_merge_resume_eval_and_add(taught_hub, tmp_path, capsys):
    begun, out = tmp_path / "begun", tmp_path / "merged"
    two = {"qqp": QQP, "cola": COLA}
    assert main(["check", write_config(tmp_path, two)]) == 0
    assert main(["merge", write_config(tmp_path, two), "--out", str(out)]) == 0
    assert main(["merge", write_config(tmp_path, {"qqp": QQP}), "--out", str(begun)]) == 0
    assert main(["merge", write_config(tmp_path, two), "--out", str(begun)]) == 0
    assert manifest(begun)["tasks"] == manifest(out)["tasks"]
    assert main(["add", str(out), "--name", "stsb", "--model", STSB]) == 0
    merged = manifest(out)
    assert (merged["task_type"], [task["name"] for task in merged["tasks"]]) == (
        "seq2seq",
        ["qqp", "cola", "stsb"],
    )
    assert [task["seed_samples"] for task in merged["tasks"]] == [20, 1, 6]
    assert {name: merged["options"][name] for name in ("lr", "batch_size", "steps", "reduce")} == dict(
        lr=1e-3, batch_size=8, steps=3, reduce="sample"
    )
    assert set(merged["metadata"]["revisions"]) == {BASE, QQP, STSB, COLA, "datasets/glue"}
    before = (out / "manifest.json").read_bytes()
    capsys.readouterr()
    assert main(["eval", str(out)]) == 0
    assert f"ACC {sum(merged['matrix'][-1]) / 3:.1f} %" in capsys.readouterr().out
    assert (out / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("protocol", ["strict", "official"])
def test_answers_are_generated_and_scored(taught_hub, tmp_path, protocol):
    """Models that have learned their tasks are right, exactly or in their order; their average is not."""
    matrices = {}
    for method in ("individual", "average"):
        out, config = tmp_path / method, {"rank": None, "method": method, "adapt": {"protocol": protocol}}
        assert (
            main(["merge", write_config(tmp_path, {"qqp": QQP, "stsb": STSB}, **config), "--out", str(out)])
            == 0
        )
        matrices[method] = manifest(out)["matrix"]
    assert matrices["individual"] == [[100.0], [100.0, pytest.approx(100.0)]]
    assert matrices["average"][0] == [100.0]
    assert max(matrices["average"][1]) < 100


def test_the_demo_measures_gates_along_the_answers(taught_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(fusionbench, "GLUE_TASKS", {name: fusionbench.GLUE_TASKS[name] for name in ROWS})
    arguments = [
        "--suite",
        "glue-8",
        "--methods",
        "individual,mingle",
        "--set",
        "steps=2",
        "--set",
        "rank=4",
        "--offline",
    ]
    assert main(["demo", *arguments, "--out", str(tmp_path / "demo")]) == 0
    results = json.loads((tmp_path / "demo/results.json").read_text())
    assert results["methods"]["individual"]["acc"] == [pytest.approx(100)]
    trace = json.loads((tmp_path / "demo/traces.json").read_text())["mingle"]
    gates = torch.tensor(trace["gates"])
    assert gates.shape == (2, len(trace["layers"]), 2) and gates.isfinite().all()
    assert any(name.startswith("decoder") for name in trace["layers"])


def test_what_folds_is_exported_as_a_plain_model(taught_hub, tmp_path):
    out = tmp_path / "merged"
    config = write_config(
        tmp_path, {"cola": COLA}, method="task-arithmetic", rank=None, adapt=None, options={"scaling": 1.0}
    )
    assert main(["merge", config, "--out", str(out)]) == 0
    assert main(["export", str(out), "--out", str(tmp_path / "plain")]) == 0
    plain = T5ForConditionalGeneration.from_pretrained(tmp_path / "plain").state_dict()
    base = load_file(taught_hub.snapshot(BASE) / "model.safetensors")
    factors = load_file(taught_hub.snapshot(COLA) / "adapter_model.safetensors")
    for name, weight in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        if key.format("A") in factors:
            weight = weight + 2 * factors[key.format("B")] @ factors[key.format("A")]
        torch.testing.assert_close(plain[name], weight)
    assert (tmp_path / "plain/tokenizer.json").exists()


def test_models_and_samples_of_another_kind_are_refused(taught_hub, tmp_path, capsys, base_folder):
    def message(**changes) -> str:
        return fails(capsys, "check", write_config(tmp_path, changes.pop("experts", {"qqp": QQP}), **changes))

    images = tmp_path / "images/qqp/cat"
    images.mkdir(parents=True)
    (images / "1.png").touch()
    assert "suite 'glyphs4' is for clip models, but" in message(eval={"suite": "glyphs4"})
    assert "images' is for clip models, but" in message(eval={"suite": str(images.parents[1])})
    other = glyphs.DATA / "experts" / "greek-inverted"
    assert "suite 'glue-8' is for seq2seq models, but" in message(
        base=str(glyphs.BASE), experts={"qqp": str(other)}
    )
    assert f"expert 'qqp' ({other}): not a fine-tuned version of the base" in message(
        experts={"qqp": str(other)}
    )
    base = taught_hub.snapshot(BASE)
    wrong = adapter(tmp_path / "wrong", base, ("DenseReluDense.wi_0",))
    renamed = {
        name.replace("wi_0", "wi"): tensor
        for name, tensor in load_file(wrong / "adapter_model.safetensors").items()
    }
    save_file(renamed, wrong / "adapter_model.safetensors", {"format": "pt"})
    text = message(experts={"qqp": str(wrong)})
    assert (
        "the adapter's layer 'decoder.block.0.layer.2.DenseReluDense.wi' is not in the base; did you mean"
        in text
    )
    (tmp_path / "encodec").mkdir()
    (tmp_path / "encodec/config.json").write_text('{"model_type": "encodec"}')
    assert "encodec/config.json: encodec: mingle has no task type for it" in message(
        base=str(tmp_path / "encodec")
    )
    assert "method 'mingle': no Linear layer's name ends in 'fc1'" in message(layers=["fc1"])


def test_the_suite_s_numbers_are_read_from_words(taught_hub):
    data = suites.load("glue-8", protocol="official")["stsb"]
    model = Seq2SeqTask().load(taught_hub.snapshot(STSB))
    outcomes = Seq2SeqTask().outcomes(model, data.made())
    assert outcomes.tolist() == [[score, score] for score in ROWS["stsb"]["label"]]
