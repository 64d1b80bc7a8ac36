"""Saved adapters that are not a sum of low-rank experts are refused with the reason."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_adapters import Net, adapted, edit_tensors, peft
from safetensors.torch import load_file

import mingle
from mingle.io.files import CheckpointError

# peft warns about most of what is tried here.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning"
)


def configure(folder: Path, **options: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def test_an_ambiguous_alpha_is_reported_and_resolved_as_peft_does(base, x, saved, caplog):
    configure(saved, alpha_pattern={"blocks.0.fc1": 8, "fc1": 4, "fc2": 4, ".*fc2": 4})
    with caplog.at_level(logging.WARNING, "mingle"):
        experts = mingle.read_adapter(saved)
    assert [record.getMessage().split("alpha_pattern: ")[1] for record in caplog.records] == [
        "layer 'blocks.0.fc1' matches 'blocks.0.fc1', 'fc1'; the first one counts"
    ]
    stored = load_file(saved / "adapter_model.safetensors")
    assert torch.equal(experts["blocks.0.fc1"].B, 2 * stored["base_model.model.blocks.0.fc1.lora_B.weight"])
    expected = peft.PeftModel.from_pretrained(copy.deepcopy(base), saved)(x)
    mingle.add_adapter(base, experts)
    torch.testing.assert_close(base(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(peft_type="ADALORA"), "peft_type='ADALORA'"),
        (dict(peft_type=None), "peft_type=None"),
        (dict(use_dora=True), "use_dora is set"),
        (dict(use_qalora=True), "use_qalora is set"),
        (dict(use_bdlora={"nblocks": 2}), "use_bdlora is set"),
        (dict(kasa_config={"beta": 0.1}), "kasa_config is set"),
        (dict(arrow_config={"top_k": 3}), "arrow_config is set"),
        (dict(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens is set"),
        (dict(lora_bias=True), "lora_bias is set"),
        (dict(modules_to_save=["conv"]), "modules_to_save is set"),
        (dict(trainable_token_indices=[0]), "trainable_token_indices is set"),
        (dict(target_parameters=["tokens.weight"]), "target_parameters is set"),
        (dict(layer_replication=[[0, 2]]), "layer_replication is set"),
        (dict(megatron_config={"a": 1}), "megatron_config is set"),
        (dict(bias="all"), "bias='all'"),
        (dict(bias="lora_only"), "bias='lora_only'"),
        *(
            (dict(init_lora_weights=init), f"init_lora_weights='{init}'.*save it with")
            for init in ("pissa_niter_4", "olora", "corda")
        ),
        *(
            (dict(init_lora_weights=init), f"init_lora_weights='?{init}'?.* as they are$")
            for init in ("loftq", "new", 3)
        ),
        (dict(r=None), "r=None: expected a positive integer"),
        (dict(r=0), "r=0"),
        (dict(r=True), "r=True"),
        (dict(rank_pattern={"fc1": 4.0}), r"rank_pattern: fc1=4\.0"),
        (dict(lora_alpha="6"), "lora_alpha='6': expected a finite number"),
        (dict(lora_alpha=10**400), "lora_alpha=1000"),
        (dict(lora_alpha=float("nan")), "lora_alpha=nan"),
        (dict(alpha_pattern={"fc1": None}), "alpha_pattern: fc1=None"),
        (dict(alpha_pattern={"fc(1": 3}), r"alpha_pattern: 'fc\(1' is not a regular expression"),
        (dict(alpha_pattern=[3]), "alpha_pattern: expected a JSON object"),
        (dict(r=3), r"blocks.0.fc1.lora_A.weight' \[4, 8\] .*: expected \[3, d_in\] and \[d_out, 3\]"),
        (dict(rank_pattern={"embed": 5}), r"embed.lora_A.weight' \[4, 6\] .*: expected \[5, d_in\]"),
        (dict(lora_alpha=1.7e308), r"embed.lora_B.weight' times its scaling 4.25e\+307 is not finite"),
    ],
    ids=str,
)
def test_refused_options(saved, options, message):
    if options.get("lora_alpha") == 1.7e308:
        edit_tensors(
            saved,
            lambda tensors: tensors.update({name: tensor.abs() + 10 for name, tensor in tensors.items()}),
        )
        edit_tensors(
            saved, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".embed." not in name]
        )
    configure(saved, **options)
    with pytest.raises(CheckpointError, match=message) as caught:
        mingle.read_adapter(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_variants_are_refused_by_their_tensors_too(base, tmp_path, option):
    adapted(base, tmp_path, **{option: True})
    configure(tmp_path, **{option: False})
    with pytest.raises(
        CheckpointError, match=r"tensor '.*lora_(magnitude_vector|B.bias)' is not a factor of a linear layer"
    ):
        mingle.read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(target_modules=["tokens", "fc1"]), "tokens.lora_embedding_A' is not a factor"),
        (dict(modules_to_save=["conv"]), "modules_to_save is set"),
        (dict(bias="lora_only"), "bias='lora_only'"),
        (dict(target_modules=["fc1", "conv"]), r"conv.lora_A.weight' is \[4, 8, 1\], of a convolution"),
        (dict(init_lora_weights="olora"), "init_lora_weights='olora'"),
    ],
    ids=str,
)
def test_what_peft_saves_is_refused(tmp_path, options, message):
    adapted(Net(), tmp_path, **options)
    with pytest.raises(CheckpointError, match=message):
        mingle.read_adapter(tmp_path)


FC1 = "base_model.model.blocks.1.fc1.lora_{}.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(FC1.format("B")), "layer 'blocks.1.fc1' has .*lora_A.weight' and no lora_B"),
        (lambda t: t.pop(FC1.format("A")), "layer 'blocks.1.fc1' has .*lora_B.weight' and no lora_A"),
        (lambda t: t.clear(), "no tensors"),
        (
            lambda t: t.update({FC1.format("A"): torch.zeros(3, 8)}),
            r"lora_A.weight' \[3, 8\] and .*lora_B.weight' \[12, 4\]: expected \[4",
        ),
        (
            lambda t: t.update({FC1.format("B"): torch.zeros(12, 3)}),
            r"lora_B.weight' \[12, 3\]: expected \[4, d_in\] and \[d_out, 4\]",
        ),
        (lambda t: t.update({FC1.format("B"): torch.zeros(12)}), r"lora_B.weight' \[12\]"),
        (
            lambda t: t.update({FC1.format("B"): torch.zeros(12, 4).int()}),
            "blocks.1.fc1.lora_B.weight' is of torch.int32",
        ),
        (
            lambda t: t[FC1.format("B")][2:4, 1].fill_(torch.nan),
            r"blocks.1.fc1.lora_B.weight': 2 of 48 values .* first at \(2, 1\)",
        ),
        (
            lambda t: t.update({"blocks.0.fc1.weight": torch.zeros(2)}),
            "tensor 'blocks.0.fc1.weight' is not a factor",
        ),
        (
            lambda t: t.update({FC1.format("A").replace("A.", "A.other."): torch.zeros(4, 8)}),
            "more than one adapter",
        ),
    ],
)
def test_refused_tensors(saved, edit, message):
    edit_tensors(saved, edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        mingle.read_adapter(saved)
    assert str(saved) in str(caught.value)


def test_refused_files(base, saved, tmp_path):
    weights, config = saved / "adapter_model.safetensors", saved / "adapter_config.json"
    with pytest.raises(CheckpointError, match=f"no adapter_config.json; there is one in {saved}"):
        mingle.read_adapter(tmp_path)
    outside = tmp_path / "outside.safetensors"
    weights.rename(outside)
    # other weights beside it are not looked at
    (saved / "other.safetensors").write_bytes(outside.read_bytes())
    with pytest.raises(CheckpointError, match=f"{saved}: no adapter_model.safetensors"):
        mingle.read_adapter(saved)
    (saved / "adapter_model.bin").write_bytes(b"never read")
    with pytest.raises(
        CheckpointError, match="(?s)pickle checkpoints are refused.*convert it.*adapter_model.safetensors"
    ):
        mingle.read_adapter(saved)
    weights.symlink_to(outside)
    with pytest.raises(CheckpointError, match="refusing a symlink"):
        mingle.read_adapter(saved)
    weights.unlink()
    weights.write_bytes(outside.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        mingle.read_adapter(saved)
    config.write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        mingle.read_adapter(saved)
    config.write_text('{"r": 1, "r": 2}')
    with pytest.raises(CheckpointError, match="duplicate key 'r'"):
        mingle.read_adapter(saved)
    with pytest.raises(CheckpointError, match=r"nowhere: no adapter_config\.json$"):
        mingle.read_adapter(tmp_path / "nowhere")
