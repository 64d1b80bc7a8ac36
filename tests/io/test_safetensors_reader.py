"""What CheckpointReader accepts and how it reads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from raw_files import write_sharded
from safetensors.torch import save_file

from mingle.io.files import CheckpointError
from mingle.io.safetensors import CheckpointReader
from mingle.io.state_dicts import non_finite

FLOATS = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
]


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_reads_a_file_by_itself_and_through_its_folder(tmp_path: Path, name: str) -> None:
    tensors = {"w": torch.randn(2, 3), "b": torch.tensor(7)}
    save_file(tensors, tmp_path / name)
    for source in (tmp_path, str(tmp_path), tmp_path / name):
        reader = CheckpointReader(source)
        assert reader.keys() == list(reader) == ["b", "w"]
        assert len(reader) == 2 and "w" in reader and "x" not in reader
        assert (reader.shape("w"), reader.dtype("w")) == ((2, 3), torch.float32)
        assert (reader.shape("b"), reader.dtype("b")) == ((), torch.int64)
        assert torch.equal(reader.tensor("w"), tensors["w"]) and torch.equal(
            reader.state_dict()["b"], tensors["b"]
        )


def test_reads_shards_and_only_what_the_index_lists(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    reader = CheckpointReader(tmp_path)
    assert reader.keys() == ["a", "b"]
    assert torch.equal(reader.tensor("a"), torch.arange(3.0)) and torch.equal(
        reader.tensor("b"), torch.arange(4)
    )


@pytest.mark.parametrize("other", ["model.safetensors", "adapter_model.safetensors", "adapter_config.json"])
def test_a_folder_with_two_models_is_refused_with_both_names(tmp_path: Path, other: str) -> None:
    write_sharded(tmp_path)
    assert CheckpointReader(tmp_path).keys() == ["a", "b"]
    save_file({"other": torch.ones(1)}, tmp_path / other)
    with pytest.raises(CheckpointError, match=f"two models, .*{other}") as caught:
        CheckpointReader(tmp_path)
    assert "model.safetensors.index.json" in str(caught.value)


def test_a_single_file_with_an_index_of_itself_is_one_model(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    index = {"weight_map": {"w": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert CheckpointReader(tmp_path).keys() == ["w"]


def test_every_read_is_a_fresh_tensor(tmp_path: Path) -> None:
    save_file({"w": torch.ones(5)}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    reader.tensor("w").zero_()
    assert torch.equal(reader.tensor("w"), torch.ones(5))


def test_a_rename_over_the_file_does_not_change_an_open_reader(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(5)}, path)
    reader = CheckpointReader(path)
    save_file({"w": torch.zeros(5)}, tmp_path / "next")
    os.replace(tmp_path / "next", path)
    assert torch.equal(reader.tensor("w"), torch.ones(5))
    assert torch.equal(CheckpointReader(path).tensor("w"), torch.zeros(5))


def test_a_file_truncated_while_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(5000)}, path)
    reader = CheckpointReader(path)
    os.truncate(path, 200)
    with pytest.raises(CheckpointError, match=f"{path}.* w "):
        reader.tensor("w")


def test_an_unknown_tensor_is_named_with_the_closest_one(tmp_path: Path) -> None:
    save_file(
        {"layers.0.weight": torch.ones(1), "layers.0.bias": torch.ones(1)}, tmp_path / "model.safetensors"
    )
    reader = CheckpointReader(tmp_path)
    for ask in (reader.tensor, reader.shape, reader.dtype):
        with pytest.raises(
            CheckpointError,
            match=r"model\.safetensors: no tensor 'layer\.0\.wieght'; did you mean 'layers\.0\.weight'",
        ):
            ask("layer.0.wieght")
    with pytest.raises(CheckpointError, match=r"no tensor '%%%'$"):
        reader.tensor("%%%")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_non_finite_values_are_counted_and_located(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.ones(3, 4)
    values[1, 2] = values[2, 0] = float("nan")
    tensors = {
        "bad": values.to(dtype),
        "scalar": torch.tensor(float("nan")).to(dtype),
        "good": torch.ones(3).to(dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        reader.tensor("bad")
    assert (
        str(caught.value)
        == f"{tmp_path}/model.safetensors: tensor 'bad': 2 of 12 values are not finite, the first at (1, 2)"
    )
    with pytest.raises(CheckpointError, match=r"'scalar': 1 of 1 values are not finite, the first at \(\)"):
        reader.tensor("scalar")
    with pytest.raises(CheckpointError, match="'bad'"):
        reader.state_dict()
    assert reader.tensor("good").dtype == dtype
    assert reader.tensor("bad", check_finite=False).dtype == dtype
    assert set(reader.state_dict(check_finite=False)) == set(tensors)


def test_what_no_sum_tells_is_found_all_the_same() -> None:
    largest = torch.finfo(torch.float32).max
    assert non_finite(torch.full((5, 5), largest)) == ""
    assert non_finite(torch.full((5, 5), -6e4, dtype=torch.float16)) == ""
    opposed = torch.tensor([0.0, float("inf"), -float("inf")])
    assert non_finite(opposed) == "2 of 3 values are not finite, the first at (1,)"
    assert non_finite(torch.tensor([1 + 1j, complex(0, float("nan"))])).startswith("1 of 2 values")
    assert non_finite(torch.ones(3, dtype=torch.uint16)) == non_finite(torch.ones(0)) == ""


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinities_are_not_finite(tmp_path: Path, value: float) -> None:
    save_file({"w": torch.tensor([0.0, value])}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 of 2 .* \(1,\)"):
        CheckpointReader(tmp_path).tensor("w")
