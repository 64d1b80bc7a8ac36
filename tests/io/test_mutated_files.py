"""Edited files of every kind are read, or refused with an error that is promised, soon and in little memory.

The same with more files: python tests/fuzz/run.py.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
from raw_files import refusal, write_index, write_raw, write_sharded
from targets import TARGETS
from trials import MEMORY, Report, run

import mingle
from mingle.io.files import CheckpointError
from mingle.io.patterns import Ending
from mingle.options import OptionError
from mingle.runs import config

COUNTS = {
    "headers": 3000,
    "indexes": 1500,
    "manifests": 100,
    "journals": 200,
    "adapters": 1500,
    "routers": 100,
    "configs": 400,
    "bases": 100,
}


def check(report: Report) -> None:
    assert report.defects == {}
    assert report.growth < MEMORY
    assert 0.02 < report.outcomes["read"] / report.outcomes.total() < 0.7


@pytest.mark.parametrize("target", TARGETS)
def test_edited_files_are_read_or_refused(target: str) -> None:
    check(run(target, range(COUNTS[target])))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_many_edited_files_are_read_or_refused(target: str) -> None:
    check(run(target, range(10 * COUNTS[target]), seed=1))


def test_the_fuzzer_finds_a_reader_that_crashes_hangs_or_fills_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = []
    actions = itertools.cycle(
        [lambda: 1, lambda: {}["x"], lambda: time.sleep(3), lambda: held.append(b"x" * (300 << 20))]
    )
    monkeypatch.setitem(TARGETS, "broken", lambda folder: lambda chance: next(actions))
    monkeypatch.setattr("trials.LIMIT", 1)
    monkeypatch.setattr("trials._WARM_UP", 0)
    found = run("broken", range(4))
    assert list(found.defects) == [1, 2, 3]
    assert found.outcomes == {"read": 2, "KeyError": 1, "Hung": 1}
    assert found.growth > MEMORY


# What was found, or could have been


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(9 * [f'*{old}'])}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
START = "base: b\nexperts: [{name: a, model: m}]\n"
YAML = {
    "aliases for gigabytes": (BOMB + "base: *i\n", "expected at most"),
    "an alias inside itself": ("base: &a [*a]\n", "the alias 'a' stands for nothing, or for what it is in"),
    "an alias for nothing": ("base: *a\n", "the alias 'a' stands for nothing"),
    "a tag": ("base: !!python/name:os.system\n", "tags are not read"),
    "a local tag": ("base: !x y\n", "tags are not read"),
    "nested deeply": ("[" * 100_000, "nested more than 20 deep"),
    "blocks nested deeply": ("- " * 100_000, "nested more than 20 deep"),
    "many values": ("[" + "x," * 100_000 + "x]", "expected at most 1000000 characters and 20000 values"),
    "many equal keys": ("{" + "x: 1," * 9000 + "}", "'x' appears twice"),
    "a long value": (f"base: {'x' * 10_000}\n", "a value of 10000 characters"),
    "a large file": ("#" * 1_000_001, "expected at most 1000000 bytes"),
    "a day that is none": ("base: 2024-99-99\n", "month must be in 1..12"),
    "a number that is none": ("base: 0x_\n", "invalid literal"),
    "half a surrogate pair": ('base: "\\ud800"\n', "surrogates not allowed"),
    "a list as a key": ("? [a]\n: b\n", "a key is a list or a mapping"),
    "a float too large": (START + f"adapt: {{lr: {'9' * 400}}}\n", "is not of type float"),
    "NaN": (START + "adapt: {lr: .nan}\n", "lr: nan is not of type float"),
    "a whole number too large to show": (START + f"rank: -0x{'f' * 2900}\n", "expected a positive integer"),
    "revisions of another type": (START + "revisions: {org/m: 3}\n", "revisions: 3 is not of type str"),
    "control characters": ("base: \0\n", "special characters are not allowed"),
}


@pytest.mark.parametrize(("text", "part"), YAML.values(), ids=YAML.keys())
def test_hostile_yaml_is_refused_soon_and_by_name(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text(text)
    begun = time.perf_counter()
    with pytest.raises(OptionError) as caught:
        config.load(path)
    assert str(path) in str(caught.value) and part in str(caught.value) and len(str(caught.value)) < 1000
    assert time.perf_counter() - begun < 5
    path.write_bytes(b"base: \xff\n")
    with pytest.raises(OptionError, match=f"{path}: .*utf-8"):
        config.load(path)


def test_anchors_and_merged_keys_of_a_sane_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    text = "base: &m models/base\nexperts: [&a {name: a, model: *m}, {<<: *a, name: b}]\n"
    path.write_text(text)
    assert config.load(path).experts == (config.Expert("a", "models/base"), config.Expert("b", "models/base"))


SLOW = [
    "(a+)+$",
    "(a|a)*b",
    "a?" * 25 + "a" * 25,
    "(.*)*x",
    "((((a*)*)*)*)*b",
    ".*" * 50 + "b",
    "(a?){1000}" * 3,
]


@pytest.mark.parametrize("pattern", SLOW, ids=range(len(SLOW)))
def test_patterns_that_explode_are_matched_at_once(pattern: str) -> None:
    begun = time.perf_counter()
    assert not Ending(pattern).matches("a" * 300 + "!")
    assert time.perf_counter() - begun < 1


HEADERS = {
    "length of 2⁶⁴ − 1": (b"\xff" * 8 + b"{}", f"expected at least {2**64 + 7} bytes"),
    "a dimension of 2⁶³": ({"w": {"dtype": "F32", "shape": [2**63], "data_offsets": [0, 4]}}, "malformed"),
    "an empty tensor of 2⁶²": (
        {"w": {"dtype": "U8", "shape": [0, 2**62, 4], "data_offsets": [0, 0]}},
        "absurd shape",
    ),
    "overlapping data": (
        {k: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for k in "ab"},
        "expected its data at offset 4, found 0",
    ),
    "a million tensors": (
        {str(i): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)},
        "expected at most 600000 JSON values",
    ),
    "a name of a megabyte": (
        {"w" * 1_000_000: {"dtype": "F33", "shape": [], "data_offsets": [0, 4]}},
        "unknown dtype",
    ),
}


@pytest.mark.parametrize(("header", "part"), HEADERS.values(), ids=HEADERS.keys())
def test_hostile_headers_are_refused_in_few_words(tmp_path: Path, header: object, part: str) -> None:
    path = tmp_path / "model.safetensors"
    if isinstance(header, bytes):
        path.write_bytes(header)
    else:
        write_raw(path, header, bytes(4))
    assert len(refusal(path, str(path), part)) < 1000


def test_a_shard_s_long_name_is_shortened(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    assert len(refusal(write_index(tmp_path, {"a": "x" * 100_000}), "is missing")) < 1000


#: of the fuzzer's: numbers of cases that were defects once
FOUND = {"manifests": [84, 7247, 83197], "bases": [1308, 1494], "indexes": [509]}


@pytest.mark.parametrize("target", FOUND)
def test_what_the_fuzzer_found_is_refused(target: str) -> None:
    for case in FOUND[target]:
        report = run(target, range(case, case + 1))
        assert report.defects == {} and report.outcomes["read"] == 0


HOSTILE_CONFIGS = {
    "layers without end": ({"num_hidden_layers": 10**9}, "the checkpoint has .* tensors"),
    "labels without end": ({"num_labels": 10**9}, "num_labels=1000000000: expected at most 100000"),
    "code from the hub": (
        {"attn_implementation": "someone/kernel"},
        "only 'eager' and 'sdpa' come without code",
    ),
    "weights elsewhere": ({"transformers_weights": "../x.safetensors"}, "the usual files only"),
    "no patches": ({"patch_size": 0}, "no CLIPModel can be made of it"),
    "text for a number": ({"hidden_size": "16"}, "hidden_size"),
    "an unknown activation": ({"hidden_act": "x" * 5000}, "no CLIPModel can be made of it"),
}


@pytest.mark.parametrize(("changes", "part"), HOSTILE_CONFIGS.values(), ids=HOSTILE_CONFIGS.keys())
def test_hostile_model_configurations_are_refused_before_they_cost_anything(
    base_folder: Path, tmp_path: Path, changes: dict[str, object], part: str
) -> None:
    content = json.loads((base_folder / "config.json").read_text())
    content["vision_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes((base_folder / "model.safetensors").read_bytes())
    begun = time.perf_counter()
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'config.json'}: .*{part}") as caught:
        mingle.Merger(tmp_path, "average")
    assert time.perf_counter() - begun < 5 and len(str(caught.value)) < 1000


def test_a_base_of_terabytes_is_compared_with_its_file_before_memory_is_taken(
    base_folder: Path, tmp_path: Path
) -> None:
    content = json.loads((base_folder / "config.json").read_text())
    content["vision_config"] |= {"hidden_size": 2**20, "intermediate_size": 2**20}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes((base_folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"has shape \[32\], config.json says \[1048576\]"):
        mingle.Merger(tmp_path, "average")
