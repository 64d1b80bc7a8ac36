"""Fine-tuned models in other dtypes: floats are widened or rounded, codes and quantised weights refused."""

from __future__ import annotations

import json

import pytest
import torch
from fine_tuned_folders import config_file, refused, written
from safetensors.torch import load_file

import mingle
from mingle.cli import main
from mingle.io.files import CheckpointError
from mingle.io.safetensors import CheckpointReader
from mingle.io.state_dicts import IncompatibleModel
from mingle.runs.check import check
from mingle.runs.config import load

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_weights_are_widened(dtype, base, tuned, clip_config, tmp_path):
    narrow = {name: tensor.to(dtype) for name, tensor in tuned.items()}
    expert = written(tmp_path / "a", narrow, clip_config)
    path = config_file(tmp_path, base, {"a": expert}, "individual")
    assert main(["merge", str(path), "--out", str(tmp_path / "out")]) == 0
    got = mingle.Merger.from_pretrained(tmp_path / "out").model.vision_model.state_dict()
    for name, tensor in got.items():
        assert torch.equal(tensor, narrow[f"vision_model.{name}"].float())
    merger = mingle.Merger(base, "individual")
    merger.add("a", narrow)
    assert torch.equal(merger.model.vision_model.state_dict()[name], tensor)


def test_a_float8_base_is_widened(base_model, clip_config, tuned, tmp_path):
    narrow = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in base_model.state_dict().items()}
    base = written(tmp_path / "base", narrow, clip_config)
    merger = mingle.Merger(base, "task-arithmetic", scaling=1.0)
    for name, tensor in merger.base.state_dict().items():
        assert torch.equal(tensor, narrow[name].float())
    merger.add("a", tuned)
    got = merger.model.vision_model.state_dict()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, tuned[f"vision_model.{name}"])


def test_float64_weights_are_rounded_to_float32(base, tuned, clip_config, tmp_path):
    expert = written(tmp_path / "a", {name: t.double() for name, t in tuned.items()}, clip_config)
    merger = mingle.Merger(base, "individual")
    merger.add("a", expert)
    got = merger.model.vision_model.state_dict()
    assert all(torch.equal(tensor, tuned[f"vision_model.{name}"]) for name, tensor in got.items())


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.complex64], ids=str
)
def test_integers_and_other_codes_are_refused(dtype, base, tuned, clip_config, tmp_path):
    codes = {
        name: (100 * t).round().to(dtype) if name.endswith("fc1.weight") else t for name, t in tuned.items()
    }
    expert = written(tmp_path / "a", codes, clip_config)
    refused(base, expert, rf"fc1.weight holds {dtype}, and so do 1 others; .*dequantise", tmp_path)
    state = mingle.Merger(base, "average")
    with pytest.raises(IncompatibleModel, match="dequantise"):
        state.add("a", codes)


def test_a_base_of_integers_is_refused(base_model, tuned, clip_config, tmp_path):
    codes = {name: (100 * t).round().to(torch.int8) for name, t in base_model.state_dict().items()}
    base = written(tmp_path / "base", codes, clip_config)
    expert = written(tmp_path / "a", tuned, clip_config)
    refused_with = r"holds torch.int8; .*dequantise"
    with pytest.raises(CheckpointError, match=refused_with):
        check(load(config_file(tmp_path, base, {"a": expert})))
    with pytest.raises(CheckpointError, match=refused_with):
        mingle.Merger(base, "average")


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"])
def test_packed_codes_and_scales_are_refused_by_name(code, tmp_path):
    header = json.dumps({"w": {"dtype": code, "shape": [4], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=f"tensor 'w': {code} holds .* quantised .*dequantise"):
        CheckpointReader(path)


def test_a_quantised_model_is_refused_by_its_configuration(base, tuned, clip_config, tmp_path):
    quantised = clip_config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    expert = written(tmp_path / "a", tuned, quantised)
    refused(
        base, expert, "config.json: quantization_config is set, by 'bitsandbytes'; .*dequantise", tmp_path
    )
    whole = written(tmp_path / "base", load_file(base / "model.safetensors"), quantised)
    with pytest.raises(CheckpointError, match="quantization_config"):
        mingle.Merger(whole, "average")


def test_packed_weights_with_scales_are_called_quantised(base, tuned, clip_config, tmp_path):
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    packed = tuned | {name: torch.zeros(1024, 1, dtype=torch.uint8), f"{name}.absmax": torch.ones(32)}
    expert = written(tmp_path / "a", packed, clip_config)
    refused(base, expert, "absmax.*dequantise", tmp_path)
