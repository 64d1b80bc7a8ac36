"""What is fuzzed: each target writes an edited file into a folder, and reads it as a user's would be read."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from mutations import edit_bytes, edit_value, to_json

from mingle import tasks
from mingle.io import journal
from mingle.io.files import CheckpointError
from mingle.io.safetensors import CheckpointReader, write_tensors
from mingle.io.state_dicts import IncompatibleModel
from mingle.merging.merger import Merger
from mingle.nn.peft import read_adapter
from mingle.options import OptionError
from mingle.runs import config

#: the errors that readers promise; anything else that is raised is a defect
REFUSALS = (CheckpointError, OptionError, IncompatibleModel)
SAVED = Path(__file__).parents[1] / "regression" / "saved_by_0.1.0"
_RARE = 0.02

#: writes an edited file, and returns what reads it
Target = Callable[[random.Random], Callable[[], object]]


def headers(folder: Path) -> Target:
    """Safetensors files: of all dtypes, of few and of many tensors, each read whole."""
    tensors = {
        "w": torch.ones(4, 5),
        "h": torch.ones(3).bfloat16(),
        "n": torch.arange(4),
        "s": torch.tensor(True),
    }
    files = [{"w": torch.ones(2)}, tensors, {f"blocks.{i}.weight": torch.ones(2, 3) for i in range(12)}, {}]
    seeds = []
    for i, file in enumerate(files):
        write_tensors(folder / f"{i}.safetensors", file, {"step": "7"} if i == 1 else None)
        data = (folder / f"{i}.safetensors").read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        seeds.append((data, json.loads(data[8:start]), data[start:]))
    path = folder / "edited.safetensors"

    def target(chance: random.Random) -> Callable[[], object]:
        data, header, body = chance.choice(seeds)
        if chance.random() < 0.4:
            path.write_bytes(edit_bytes(data, chance))
        else:
            text = to_json(edit_value(header, chance), chance)
            length = chance.choice([0, 1, 2**32, 2**63, 2**64 - 1]) if chance.random() < _RARE else len(text)
            path.write_bytes(length.to_bytes(8, "little") + text + body)
        return lambda: CheckpointReader(path).state_dict(check_finite=False)

    return target


def indexes(folder: Path) -> Target:
    """Indexes of shards."""
    names = ["one.safetensors", "two.safetensors"]
    for i, name in enumerate(names):
        write_tensors(folder / name, {f"{i}.{part}": torch.ones(2) for part in "abc"})
    weight_map = {f"{i}.{part}": name for i, name in enumerate(names) for part in "abc"}
    (folder / "outside").mkdir()
    write_tensors(folder / "outside" / "x", {"0.a": torch.zeros(2)})
    inside = folder / "inside"
    inside.mkdir()
    for name in names:
        shutil.move(folder / name, inside / name)
    (inside / "link").symlink_to("../outside/x")
    whole = {"metadata": {"total_size": 48}, "weight_map": weight_map}
    path = inside / "model.safetensors.index.json"

    def target(chance: random.Random) -> Callable[[], object]:
        value = edit_value(whole, chance)
        if chance.random() < 0.1 and isinstance(value, dict) and isinstance(value.get("weight_map"), dict):
            value["weight_map"]["0.a"] = chance.choice(
                ["../outside/x", "link", "C:\\x", str(folder / "outside" / "x")]
            )
        path.write_bytes(to_json(value, chance))
        return lambda: CheckpointReader(inside).state_dict(check_finite=False)

    return target


def manifests(folder: Path) -> Target:
    """Manifests of two merges; an accepted one is loaded as a merger."""
    shutil.copytree(SAVED, folder / "saved")
    kinds = [path for path in sorted((folder / "saved").iterdir()) if path.is_dir()]
    values = {kind: json.loads((kind / "manifest.json").read_text()) for kind in kinds}

    def target(chance: random.Random) -> Callable[[], object]:
        kind = chance.choice(kinds)
        (kind / "manifest.json").write_bytes(to_json(edit_value(values[kind], chance), chance))
        return lambda: Merger.from_pretrained(kind)

    return target


def journals(folder: Path) -> Target:
    """Journals that two processes left, and parts: what is taken over is as it was noted, or nothing is."""
    step, names = journal.identity({}), (journal.JOURNAL, ".journal-1.json")
    texts, inside = [], folder / "inside"
    for rank in range(2):
        (own := folder / f"{rank}").mkdir()
        notes = journal.Journal(own, step)
        for place in (2 * rank, 2 * rank + 1):
            notes.write(0, place, {f"w{place}": torch.full((2,), place / 3)}, [[place / 7, 0.5]], aside=True)
        notes.conclude(0, {"norm": 1.5})
        texts.append((own / journal.JOURNAL).read_bytes())
        shutil.copytree(own, inside, dirs_exist_ok=True)
    parts = {path: path.read_bytes() for path in sorted(inside.glob(".aside-*"))}
    noted = [part for text in texts for part in json.loads(text)["passes"][0]["parts"]]

    def take_over() -> None:
        passes = journal.Journal(inside, step).passes
        found = [part for each in passes for part in each["parts"]]
        assert all(part in noted for part in found)
        assert all(each["found"] in (None, {"norm": 1.5}) for each in passes)
        if not found:
            raise CheckpointError("nothing is left")

    def target(chance: random.Random) -> Callable[[], object]:
        both = chance.random() < 0.7
        for name, text in zip(names, texts, strict=True):
            edited = text
            if both or name != names[0]:
                by_value = chance.random() < 0.5
                value = json.loads(text)
                edited = to_json(edit_value(value, chance), chance) if by_value else edit_bytes(text, chance)
            (inside / name).write_bytes(edited)
        for path, data in parts.items():
            path.write_bytes(edit_bytes(data, chance) if chance.random() < 0.1 else data)
        return take_over

    return target


def adapters(folder: Path) -> Target:
    """LoRA adapters: their configuration, the header of their weights, or both."""
    factors = {}
    for layer in ("embed", "blocks.0.fc1", "blocks.0.fc2"):
        factors |= {f"base_model.model.{layer}.lora_A.weight": torch.ones(2, 4)}
        factors |= {f"base_model.model.{layer}.lora_B.weight": torch.ones(3, 2)}
    write_tensors(folder / "adapter_model.safetensors", factors)
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    options = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
        "target_modules": ["embed", "fc1"],
        "rank_pattern": {r"blocks\.\d+\.fc1": 2, ".*fc2": 2, "embed": 2},
        "alpha_pattern": {"^(blocks|layers).0.fc[12]$": 8.0, "embed": 2},
        "use_dora": False,
        "modules_to_save": None,
    }

    def target(chance: random.Random) -> Callable[[], object]:
        both = chance.random()
        edited = options if both < 0.1 else edit_value(options, chance)
        (folder / "adapter_config.json").write_bytes(to_json(edited, chance))
        if both < 0.3:
            text = to_json(edit_value(json.loads(data[8:start]), chance), chance)
            weights.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
        else:
            weights.write_bytes(data)
        return lambda: read_adapter(folder)

    return target


def routers(folder: Path) -> Target:
    """Descriptions of exported adapters; an accepted one is loaded as a merger."""
    (base,) = (SAVED / "clip-mingle").glob("base-*")
    Merger.from_pretrained(SAVED / "clip-mingle").export(folder / "adapters", format="peft")
    path = folder / "adapters" / "router.json"
    value = json.loads(path.read_text())

    def target(chance: random.Random) -> Callable[[], object]:
        path.write_bytes(to_json(edit_value(value, chance), chance))
        return lambda: Merger.from_adapters(base, folder / "adapters")

    return target


_YAML = """\
base: &base models/clip
method: mingle
experts:
  - {name: a, model: models/a}
  - &b {name: b, model: org/b, revision: abc}
order: {shuffle: true, seeds: [42, 43]}
layers: [self_attn.q_proj, mlp.fc1]
rank: 8
gate: {k: 2, gamma: 1.0, beta: 0.99, reduce: sample}
adapt: {steps: 5, lr: 1e-3, batch_size: 4, samples_per_class: 5, temperature: 2.0, protocol: strict}
eval: {suite: images/, every_step: true, batch_size: 128}
options: {constraint: hard}
revisions: {datasets/ylecun/mnist: 4d5}
"""
_BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(i + 1)}: &{chr(i + 1)} [{', '.join(9 * [f'*{chr(i)}'])}]\n" for i in range(ord("a"), ord("j"))
)


def configs(folder: Path) -> Target:
    """YAML files, as text and as values; bombs of aliases among them."""
    path, value = folder / "merge.yaml", yaml.safe_load(_YAML)
    places = [
        "base",
        "method",
        "experts",
        "order",
        "gate",
        "options",
        "rank",
        "layers",
        "eval",
        "? x\n? k",
        "<<",
    ]

    def target(chance: random.Random) -> Callable[[], object]:
        kind = chance.random()
        if kind < _RARE:
            bomb = _BOMB + "".join(_YAML.splitlines(keepends=True)[:3]) + "  - *j\n"
            text = (_BOMB + f"{chance.choice(places)}: *j\n" if kind < _RARE / 2 else bomb).encode()
        elif kind < 0.5:
            text = edit_bytes(_YAML.encode(), chance)
        else:
            text = to_json(edit_value(value, chance), chance)
        path.write_bytes(text)
        return lambda: config.load(path)

    return target


def bases(folder: Path) -> Target:
    """Configurations of base models."""
    shutil.copytree(SAVED, folder / "saved")
    kinds = [path.parent for path in sorted((folder / "saved").glob("*/base-*/config.json"))]
    values = {kind: json.loads((kind / "config.json").read_text()) for kind in kinds}

    def read(kind: Path) -> Any:
        return tasks.of(kind).skeleton(kind)

    def target(chance: random.Random) -> Callable[[], object]:
        kind = chance.choice(kinds)
        (kind / "config.json").write_bytes(to_json(edit_value(values[kind], chance), chance))
        return functools.partial(read, kind)

    return target


TARGETS: dict[str, Callable[[Path], Target]] = {
    target.__name__: target
    for target in (headers, indexes, manifests, journals, adapters, routers, configs, bases)
}
