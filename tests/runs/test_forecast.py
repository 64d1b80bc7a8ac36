"""What merges from files were to take, against what they took."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bare_methods import tuned_states
from merge_files import merge_file
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from mingle.io import journal
from mingle.merging import streamed
from mingle.options import OptionError
from mingle.runs import config, forecast
from mingle.runs.check import check

TASKS = ("one", "two", "three")
SIZES = dict(vocab_size=200, num_hidden_layers=2, num_attention_heads=4)
METHODS = {
    "average": {},
    "ties": {},
    "opcm": {},
    "consensus-ta": {"masks": "all"},
    "tsv-m": {},
    "nufilt": {"steps": 2},
    "mingle": {"steps": 0, "rank": 16},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A bf16 base of 1.5 MB with tied embeddings, and models in fp32."""
    place = tmp_path_factory.mktemp("forecast")
    model = LlamaForCausalLM(
        LlamaConfig(**SIZES, hidden_size=192, intermediate_size=512, tie_word_embeddings=True)
    )
    copy.deepcopy(model).bfloat16().save_pretrained(place / "base", max_shard_size="1MB")
    for name, state in zip(TASKS, tuned_states(model), strict=True):
        model.load_state_dict(state)
        model.save_pretrained(place / name)
    return place


def moved():
    """How many bytes this process has read and written so far, of whatever file."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"]), int(lines["wchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts what a process reads")
@pytest.mark.parametrize(
    ("method", "more"),
    [
        *((name, {}) for name in METHODS),
        ("average", {"keep": 1}),
        ("ties", {"keep": 1}),
        ("mingle", {"dtype": "bfloat16"}),
    ],
)
def test_what_is_read_and_written_and_the_disk_are_foreseen(folders, method, more, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "PART_BYTES", 1 << 20)
    file = merge_file(
        tmp_path,
        folders / "base",
        {name: folders / name for name in TASKS},
        method,
        options=METHODS[method],
        **more,
    )
    plan = check(config.load(file), tmp_path / "merged")
    there, write = [], journal.write_tensors

    def look():
        files = (each for each in (tmp_path / "merged").rglob("*") if each.is_file())
        there.append(sum(each.stat().st_size for each in files))

    def writing(path, tensors):
        digest = write(path, tensors)
        look()
        return digest

    monkeypatch.setattr(journal, "write_tensors", writing)
    before = moved()
    list(plan.run())
    look()
    read, written = (now - then for now, then in zip(moved(), before, strict=True))
    assert plan.forecast.read == pytest.approx(read, rel=0.25)
    assert plan.forecast.written == pytest.approx(written, rel=0.25)
    assert plan.forecast.disk == pytest.approx(max(there), rel=0.25)


def test_of_a_tower_only_its_own_part_of_the_file_counts(tmp_path):
    layers = dict(num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    text, vision = (dict(layers, hidden_size=size) for size in (128, 16))
    vision |= dict(image_size=8, patch_size=4)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    for name in ("base", "one"):
        model.save_pretrained(tmp_path / name)
    file = merge_file(tmp_path, tmp_path / "base", {"one": tmp_path / "one"}, "average")
    weights = (tmp_path / "base/model.safetensors").stat().st_size
    found = check(config.load(file)).forecast
    assert 3 * weights < found.read < 3.2 * weights  # each hashed, the base copied; and two small towers


def test_what_cannot_fit_is_refused_with_both_numbers(folders, tmp_path, monkeypatch):
    file = merge_file(tmp_path, folders / "base", {"one": folders / "one"}, "average")
    monkeypatch.setattr(forecast, "available", lambda: 12345678)
    with pytest.raises(OptionError, match=r"merging takes \d{9,} bytes of memory, and there are 12345678"):
        check(config.load(file), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_limit_of_the_container_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "_CGROUP", tmp_path / "memory.max")
    machine = forecast.available()
    (tmp_path / "memory.max").write_text("max\n")
    assert forecast.available() == machine > 1 << 28
    (tmp_path / "memory.max").write_text("4096\n")
    assert forecast.available() == 4096


_RUN = """
import sys
from mingle.cli import main
main(sys.argv[1:])
print(open("/proc/self/status").read())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what a process had at most")
@pytest.mark.parametrize("method", ["average", "ties", "opcm", "iso-c", "nufilt", "mingle"])
def test_memory_is_foreseen(method, tmp_path):
    """With tensors of 64 MB in fp32, whatever the process that starts the merge holds."""
    ballast = torch.ones(1 << 29)  # 2 GB
    sizes = SIZES | dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=1)
    if method in ("opcm", "iso-c", "nufilt", "mingle"):
        sizes |= dict(hidden_size=1024, intermediate_size=4096)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16()
    for name in ("base", *TASKS[:2]):
        model.save_pretrained(tmp_path / name)
        model.model.layers[0].mlp.up_proj.weight.data *= 1.25
    more = {"nufilt": {"adapt": {"steps": 2}}, "mingle": {"adapt": {"steps": 0}}}.get(method, {})
    file = merge_file(tmp_path, tmp_path / "base", {n: tmp_path / n for n in TASKS[:2]}, method, **more)

    def said(*words):
        command = [sys.executable, "-c", _RUN, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    foreseen = json.JSONDecoder().raw_decode(said("check", file, "--json"))[0]["forecast"]["memory"]
    taken = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", said("merge", file, "--out", tmp_path / "merged"))[1])
    assert ballast.nbytes > foreseen == pytest.approx(taken, rel=0.25)
