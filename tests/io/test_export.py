"""Merged models as plain hub folders: transformers loads them, and they answer as the merger does."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from few_methods import each_method
from small_merges import NAMES, SETTINGS, add
from transformers import CLIPModel, T5Config, T5ForConditionalGeneration

import mingle
from mingle.cli import main
from mingle.io import export
from mingle.io.files import CheckpointError
from mingle.io.locks import lock
from mingle.methods import METHODS
from mingle.tasks.clip import ClipTask

PLAIN = {
    "pre-trained": {},
    "average": {},
    "task-arithmetic": {},
    "ties": {},
    "magmax": {},
    "consensus-ta": {},
    "opcm": {},
    "tsv-m": {},
    "iso-c": {},
    "wudi": {"steps": 2},
    "adamerging": {"steps": 2},
    "nufilt": {"steps": 2},
    "mingle": SETTINGS | {"gates": "static"},
    "mingle-light": SETTINGS | {"gates": "static"},
}

#: what an export writes itself
WRITTEN = {"README.md", "config.json", "model.safetensors"}


def merger_of(base, method, tuned, samples, count=2, **options):
    merger = mingle.Merger(base, method, **options)
    for i in range(count):
        add(merger, i, tuned, samples)
    return merger


def logits(model, samples):
    with torch.no_grad():
        return ClipTask().logits(model, samples[0])


@each_method(PLAIN)
def test_transformers_loads_it_and_gets_the_same_logits(base_folder, tuned_states, samples, tmp_path, method):
    merger = merger_of(base_folder, method, tuned_states, samples, **PLAIN[method])
    merger.export(tmp_path / "plain")
    model, report = CLIPModel.from_pretrained(
        tmp_path / "plain", local_files_only=True, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    got, expected = logits(model.eval(), samples), logits(merger.model, samples)
    if method.startswith("mingle"):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(got, logits(merger.base, samples), atol=1e-3)
    else:
        assert torch.equal(got, expected)
    assert not [path for path in tmp_path.iterdir() if path.name != "plain"]
    again = mingle.Merger(tmp_path / "plain", "average")  # and it is a base to go on from
    assert torch.equal(logits(again.model, samples), got)


def test_every_method_exports_or_says_why_not(base_model, tuned_states, samples, tmp_path):
    for method in METHODS.keys() - PLAIN.keys() - {"individual"}:
        merger = mingle.Merger(base_model, method, **({"depths": (0,)} if method == "routed" else {}))
        with pytest.raises(
            ValueError, match=f"method '{method}': how much .* load it with mingle.Merger.from_pretrained"
        ):
            merger.export(tmp_path / "plain")
    merger = merger_of(base_model, "mingle", tuned_states, samples, count=1, **SETTINGS)
    with pytest.raises(ValueError, match="gates='static'"):
        merger.export(tmp_path / "plain")
    assert not list(tmp_path.iterdir())


def test_individual_models_are_exported_by_task(base_model, tuned_states, samples, tmp_path):
    merger = merger_of(base_model, "individual", tuned_states, samples)
    with pytest.raises(ValueError, match="name one of one, two"):
        merger.export(tmp_path / "plain")
    with pytest.raises(ValueError, match="'three' is not among the merged ones"):
        merger.export(tmp_path / "plain", "three")
    merger.export(tmp_path / "plain", "one")
    state = CLIPModel.from_pretrained(tmp_path / "plain", local_files_only=True).vision_model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tuned_states[0].items())
    with pytest.raises(ValueError, match="one model serves all tasks"):
        merger_of(base_model, "average", tuned_states, samples).export(tmp_path / "other", "one")


def test_what_else_the_base_s_folder_holds(base_folder, tuned_states, samples, tmp_path):
    """Tokenizer and processor go along, code and weights do not; the dtype in the configuration is that of
    the weights.
    """
    base = tmp_path / "base"
    shutil.copytree(base_folder, base)
    config = json.loads((base / "config.json").read_text())
    config.pop("dtype", None)
    config["vision_config"]["dtype"] = config["text_config"]["torch_dtype"] = "float16"
    (base / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    for name in (
        "tokenizer.json",
        "merges.txt",
        "spiece.model",
        "modeling.py",
        "pytorch_model.bin",
        "model.safetensors.index.json.bak",
    ):
        (base / name).write_text("{}")
    merger = merger_of(base, "average", tuned_states, samples)
    merger.save_pretrained(tmp_path / "merged")
    merger.export(tmp_path / "plain")
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert names == {"tokenizer.json", "merges.txt", "spiece.model"} | WRITTEN
    model = CLIPModel.from_pretrained(tmp_path / "plain", local_files_only=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(logits(model.eval(), samples), logits(merger.model, samples))


def test_half_precision_stays(base_model, tuned_states, samples, tmp_path):
    merger = merger_of(CLIPModel(base_model.config).to(torch.bfloat16), "average", tuned_states, samples)
    merger.export(tmp_path / "plain")
    model = CLIPModel.from_pretrained(tmp_path / "plain", local_files_only=True)
    assert model.dtype == torch.bfloat16
    assert all(
        torch.equal(tensor, merger.model.state_dict()[name]) for name, tensor in model.state_dict().items()
    )


def test_large_models_are_sharded_and_tied_tensors_written_once(tmp_path):
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    ).eval()
    tuned = {name: tensor + 0.1 for name, tensor in base.state_dict().items()}
    state = export.whole_model(base, "", tuned)
    assert "encoder.embed_tokens.weight" not in state
    export.write_model(
        tmp_path / "plain",
        state,
        {"config.json": export.hub_config(base, None, torch.float32)},
        None,
        "",
        shard_bytes=4000,
    )
    shards = sorted((tmp_path / "plain").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 6000 for path in shards)
    model, report = T5ForConditionalGeneration.from_pretrained(
        tmp_path / "plain", local_files_only=True, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in model.state_dict().items())
    assert model.shared.weight is model.decoder.embed_tokens.weight
    inputs = torch.randint(40, (2, 5))
    base.load_state_dict(tuned)
    with torch.no_grad():
        assert torch.equal(
            *(m.eval()(input_ids=inputs, decoder_input_ids=inputs).logits for m in (model, base))
        )


def test_a_folder_in_use_is_refused(base_model, tuned_states, samples, tmp_path):
    merger = merger_of(base_model, "average", tuned_states, samples, count=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="overwrites nothing"):
        merger.export(tmp_path / "full")
    with pytest.raises(CheckpointError, match="overwrites nothing"):
        merger.export(tmp_path / "full" / "notes.txt")
    (tmp_path / "empty").mkdir()
    merger.export(tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()
    with pytest.raises(CheckpointError, match="no config"):
        export.hub_config(torch.nn.Linear(2, 2), None, torch.float32)


def test_an_interrupted_export_leaves_nothing_and_the_next_clears_up(
    base_model, tuned_states, samples, tmp_path, monkeypatch
):
    merger = merger_of(base_model, "average", tuned_states, samples, count=1)
    staging = tmp_path / ".mingle-export-plain"
    with monkeypatch.context() as patch:
        patch.setattr(
            export, "write_tensors", lambda *args: (_ for _ in ()).throw(CheckpointError("disk full"))
        )
        with pytest.raises(CheckpointError, match="disk full"):
            merger.export(tmp_path / "plain")
    assert not list(tmp_path.iterdir())
    staging.mkdir()  # as a killed export leaves it
    (staging / "model.safetensors").write_text("half")
    (staging / "stray.json").write_text("{}")
    with lock(staging), pytest.raises(CheckpointError, match="being written by pid"):
        merger.export(tmp_path / "plain")
    merger.export(tmp_path / "plain")
    assert {path.name for path in tmp_path.iterdir()} == {"plain"}
    assert {path.name for path in (tmp_path / "plain").iterdir()} == WRITTEN


def test_on_the_command_line(base_folder, tuned_states, samples, tmp_path, capsys):
    merger = merger_of(base_folder, "individual", tuned_states, samples)
    merger.save_pretrained(tmp_path / "merged")
    assert main(["export", str(tmp_path / "merged"), "--out", str(tmp_path / "plain")]) == 2
    assert f"name one of {NAMES[0]}, {NAMES[1]}" in capsys.readouterr().out
    assert (
        main(["export", str(tmp_path / "merged"), "--out", str(tmp_path / "plain"), "--task", NAMES[1]]) == 0
    )
    state = CLIPModel.from_pretrained(tmp_path / "plain", local_files_only=True).vision_model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tuned_states[1].items())
