"""Whole small merges: the order of things, what is frozen, what is refused, and that stopping changes no bit."""

from __future__ import annotations

import contextlib
import json
import math
import os

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

import mingle
from mingle.files import CheckpointError
from mingle.layers import MingleLinear
from mingle.storage import state_hash
from mingle.tasks import TaskData

SETTINGS = dict(rank=4, steps=6, lr=5e-3, batch_size=8)
NAMES = ["one", "two", "three"]


def add(merger, i, tuned, samples):
    seeds = TaskData(samples[i].inputs, samples[i].shared)
    return merger.add(NAMES[i], tuned[i], seeds)


def merge(base_model, tuned, samples, count=3, method="mingle", **options):
    merger = mingle.Merger(base_model, method, **(SETTINGS | options))
    for i in range(count):
        add(merger, i, tuned, samples)
    return merger


def everything(merger):
    return {f"model/{k}": v for k, v in merger.model.state_dict().items()} | {f"basis/{k}": v for k, v in merger.method.bases.items()}


def same_bits(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_a_whole_merge_by_a_plain_second_implementation(base_model, tuned_states, samples):
    """Projection, experts, gates, adaptation, relaxation and subspaces, written again without the library's parts."""
    torch.set_default_dtype(torch.float64)
    try:
        base = CLIPModel(base_model.config).double().eval()
        base.load_state_dict(base_model.state_dict())
        tuned = [{k: v.double() for k, v in state.items()} for state in tuned_states]
        data = [TaskData({k: v.double() for k, v in s.inputs.items()}, {k: v.double() for k, v in s.shared.items()}) for s in samples]
        merger = mingle.Merger(base, "mingle", **(SETTINGS | dict(gate_init="zeros", batch_size=24, layers=("mlp.fc1", "q_proj"))))
        plain = PlainMingle(base, ("mlp.fc1", "self_attn.q_proj"), rank=4, steps=6, lr=5e-3)
        for i in range(3):
            merger.add(NAMES[i], tuned[i], data[i])
            plain.add(tuned[i], data[i].inputs["pixel_values"], data[i].shared["text_embeds"])
    finally:
        torch.set_default_dtype(torch.float32)
    for name, layer in merger.method.layers.items():
        weight, bias = layer.all_gates()
        torch.testing.assert_close(weight, torch.stack([w for w, _ in plain.gates[name]]), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(bias, torch.stack([b for _, b in plain.gates[name]]), rtol=1e-6, atol=1e-9)
        U, V = merger.method.bases[name], plain.bases[name]
        torch.testing.assert_close(U @ U.T, V @ V.T, rtol=0, atol=1e-7)


class PlainMingle:
    """The method as the paper's formulas read: dense experts, hooks for the gated sum, Adam and projection by hand."""

    def __init__(self, base, suffixes, rank, steps, lr, k=3, gamma=1.0, beta=0.99, temperature=2.0):
        self.base, self.rank, self.steps, self.lr = base, rank, steps, lr
        self.k, self.gamma, self.beta, self.temperature = k, gamma, beta, temperature
        self.linears = {n: m for n, m in base.vision_model.named_modules() if n.endswith(suffixes)}
        self.dense = {n: [] for n in self.linears}
        self.gates = {n: [] for n in self.linears}
        self.bases = {n: torch.zeros(m.in_features, 0) for n, m in self.linears.items()}

    def logits(self, pixels, head, inputs=None):
        def hook(name):
            def gated(module, args, output):
                x = args[0]
                if inputs is not None:
                    inputs.setdefault(name, []).append(x.detach().reshape(-1, x.shape[-1]))
                for (w, b), D in zip(self.gates[name], self.dense[name], strict=True):
                    output = output + (x.mean(1) @ w + b)[:, None, None] * (x @ D.T)
                return output

            return gated

        handles = [m.register_forward_hook(hook(n)) for n, m in self.linears.items()]
        image = self.base.visual_projection(self.base.vision_model(pixel_values=pixels).pooler_output)
        for handle in handles:
            handle.remove()
        return self.base.logit_scale.exp() * (image / image.norm(dim=-1, keepdim=True)) @ head.T

    def add(self, tuned, pixels, head):
        own = {k: v.clone() for k, v in self.base.vision_model.state_dict().items()}
        experts, old_gates = self.dense, self.gates
        self.dense, self.gates = {n: [] for n in self.linears}, {n: [] for n in self.linears}
        self.base.vision_model.load_state_dict(tuned)
        with torch.no_grad():
            target = torch.softmax(self.logits(pixels, head) / self.temperature, -1)
        self.base.vision_model.load_state_dict(own)
        self.dense, self.gates = experts, old_gates
        parameters = []
        for n, m in self.linears.items():
            delta = tuned[f"{n}.weight"] - own[f"{n}.weight"]
            if self.dense[n]:
                U, S, Vh = torch.linalg.svd(sum(self.dense[n]))
                p = S / S.sum()
                alpha = int(math.exp(-sum(v * math.log(v) for v in p.tolist() if v > 0)))
                core = U.T @ delta @ Vh.T
                core[:alpha, :alpha] = 0
                delta = U @ core @ Vh
            U, S, Vh = torch.linalg.svd(delta)
            self.dense[n].append(U[:, : self.rank] * S[: self.rank] @ Vh[: self.rank])
            gate = torch.zeros(m.in_features, requires_grad=True), torch.zeros((), requires_grad=True)
            self.gates[n].append(gate)
            parameters.append((n, gate))
        first = {id(p): torch.zeros_like(p) for _, gate in parameters for p in gate}
        second = {id(p): torch.zeros_like(p) for _, gate in parameters for p in gate}
        S_all = {n: torch.zeros(self.bases[n].shape[1]) for n in self.linears}
        for step in range(1, self.steps + 1):
            loss = -(target * torch.log_softmax(self.logits(pixels, head) / self.temperature, -1)).sum(-1).mean()
            grads = torch.autograd.grad(loss, [p for _, gate in parameters for p in gate])
            with torch.no_grad():
                for i, (n, gate) in enumerate(parameters):
                    g, U = grads[2 * i], self.bases[n]
                    S_all[n] = self.beta * S_all[n] + (1 - self.beta) * (g @ U).abs() / (g.norm() + 1e-12)
                    g = g - U @ (torch.exp(-self.gamma * S_all[n]) * (U.T @ g))
                    for p, gradient in zip(gate, (g, grads[2 * i + 1]), strict=True):
                        first[id(p)] = 0.9 * first[id(p)] + 0.1 * gradient
                        second[id(p)] = 0.999 * second[id(p)] + 0.001 * gradient**2
                        p -= self.lr * (first[id(p)] / (1 - 0.9**step)) / ((second[id(p)] / (1 - 0.999**step)).sqrt() + 1e-8)
        inputs = {}
        with torch.no_grad():
            for n, gate in parameters:
                self.gates[n][-1] = tuple(p.detach() for p in gate)
            self.logits(pixels, head, inputs)
            for n, chunks in inputs.items():
                new = torch.linalg.svd(torch.cat(chunks), full_matrices=False).Vh[: self.k].T
                self.bases[n] = torch.linalg.qr(torch.cat([self.bases[n], new], 1)).Q


def test_older_gates_experts_and_base_stay_bitwise(base_model, tuned_states, samples):
    merger = merge(base_model, tuned_states, samples, count=2)
    before = {n: (layer.A.clone(), layer.B.clone(), *layer.all_gates()) for n, layer in merger.method.layers.items()}
    add(merger, 2, tuned_states, samples)
    for name, (A, B, weight, bias) in before.items():
        layer = merger.method.layers[name]
        assert torch.equal(layer.A[:2], A)
        assert torch.equal(layer.B[:2], B)
        assert torch.equal(layer.frozen_gate_weight, weight)
        assert torch.equal(layer.frozen_gate_bias, bias)
        assert not layer.A[2].eq(0).all()
    trainable = {n for n, p in merger.model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(n.endswith(("gate_weight", "gate_bias")) and "frozen" not in n for n in trainable)


def test_the_given_base_is_never_changed(base_model, tuned_states, samples):
    before = state_hash(base_model)
    merge(base_model, tuned_states, samples, count=1)
    assert state_hash(base_model) == before
    assert not any(isinstance(m, MingleLinear) for m in base_model.modules())


@pytest.mark.parametrize("method", ["mingle", "mingle-light", "opcm", "average", "individual"])
@pytest.mark.parametrize("include_base", [True, False])
def test_stopping_and_going_on_gives_the_same_bits(base_model, tuned_states, samples, tmp_path, method, include_base):
    options = SETTINGS if method.startswith("mingle") else {}
    merger = mingle.Merger(base_model, method, seed=7, **options)
    for i in range(2):
        add(merger, i, tuned_states, samples)
        merger.evaluate(dict(zip(NAMES, samples, strict=True)))
    merger.save_pretrained(tmp_path, include_base=include_base)
    resumed = mingle.Merger.from_pretrained(tmp_path, base=None if include_base else base_model)
    assert resumed.matrix == merger.matrix
    assert resumed.task_names == NAMES[:2]
    for m in (merger, resumed):
        add(m, 2, tuned_states, samples)
    same_bits(merger.model.state_dict(), resumed.model.state_dict())
    merger.save_pretrained(tmp_path / "a")
    resumed.save_pretrained(tmp_path / "b")
    names = [sorted(str(p.relative_to(tmp_path / d)) for p in (tmp_path / d).rglob("*") if p.is_file()) for d in "ab"]
    assert names[0] == names[1]  # files are named by their content
    if method.startswith("mingle"):
        same_bits(everything(merger), everything(resumed))


def test_saving_again_writes_only_what_is_new(base_model, tuned_states, samples, tmp_path):
    merger = merge(base_model, tuned_states, samples, count=2)
    merger.save_pretrained(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert len(before) == 3
    add(merger, 2, tuned_states, samples)
    merger.save_pretrained(tmp_path)
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert {p: t for p, t in after.items() if p in before} == before
    assert len(after) == 4


def test_a_failed_task_leaves_the_merger_as_it_was(base_model, tuned_states, samples):
    merger = merge(base_model, tuned_states, samples, count=1)
    before = {k: v.clone() for k, v in everything(merger).items()}
    broken = {k: torch.full_like(v, 1e30) for k, v in tuned_states[1].items()}
    with pytest.raises(RuntimeError):
        merger.add("two", broken, TaskData(samples[1].inputs, samples[1].shared))
    same_bits(before, everything(merger))
    add(merger, 1, tuned_states, samples)
    same_bits(everything(merger), everything(merge(base_model, tuned_states, samples, count=2)))


def test_a_task_equal_to_the_base_is_skipped(base_model, tuned_states, samples, tmp_path):
    merger = merge(base_model, tuned_states, samples, count=1)
    report = merger.add("same", base_model, TaskData(samples[1].inputs, samples[1].shared))
    assert "no expert was added" in report.skipped
    add(merger, 2, tuned_states, samples)
    assert {layer.num_experts for layer in merger.method.layers.values()} == {2}
    merger.save_pretrained(tmp_path)
    same_bits(everything(merger), everything(mingle.Merger.from_pretrained(tmp_path)))


def test_the_same_task_twice_adds_no_junk_directions(base_model, tuned_states, samples):
    merger = merge(base_model, tuned_states, samples, count=1, lr=0.0)
    sizes = {n: b.shape[1] for n, b in merger.method.bases.items()}
    merger.add("again", tuned_states[0], TaskData(samples[0].inputs, samples[0].shared))
    assert set(sizes.values()) == {3}
    # lr = 0 and a first expert with random gates: the inputs of the first layer are the very same, so its basis must not grow
    first = "encoder.layers.0.self_attn.q_proj"
    assert merger.method.bases[first].shape[1] == 3


@pytest.mark.parametrize(
    ("options", "frozen", "projected"),
    [
        (dict(gates="static"), True, False),
        (dict(gates="all", constraint="none"), False, False),
        (dict(constraint="none"), True, False),
        (dict(constraint="hard"), True, True),
        (dict(), True, True),
    ],
)
def test_ablation_switches(base_model, tuned_states, samples, options, frozen, projected):
    merger = merge(base_model, tuned_states, samples, count=1, **options)
    layer = next(iter(merger.method.layers.values()))
    first = layer.all_gates()[0][0].clone()
    report = add(merger, 1, tuned_states, samples)
    assert torch.equal(layer.all_gates()[0][0], first) == frozen
    if options.get("gates") == "static":
        weight, bias = layer.all_gates()
        assert not weight.any()
        torch.testing.assert_close(bias, torch.full((2,), 0.3))
        assert report.trace is None
    else:
        strengths = [s for series in report.trace.strength.values() for s in series]
        assert bool(strengths) == projected
        assert all(s == 1 for s in strengths) == (options.get("constraint") == "hard" or not projected)


def test_sample_gates_predict_alike_whatever_shares_the_batch(base_model, tuned_states, samples):
    mixed = torch.cat([samples[0].inputs["pixel_values"][:4], samples[1].inputs["pixel_values"][:4]])
    for reduce, alike in (("sample", True), ("token", True), ("batch", False)):
        merger = merge(base_model, tuned_states, samples, count=2, reduce=reduce)
        with torch.no_grad():
            together = merger.model.vision_model(pixel_values=mixed).pooler_output[:4]
            alone = merger.model.vision_model(pixel_values=mixed[:4]).pooler_output
        assert torch.allclose(together, alone, atol=1e-6) == alike


def test_parameter_counts_of_the_paper():
    """83.0 K trainable and 173.1 M in total for ViT-B/32, 8 tasks, rank 64, all layers."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from mingle.inject import inject
    from mingle.tasks.clip import ClipTask

    with torch.device("meta"):
        tower = CLIPVisionModel(CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, patch_size=32))
        tower.requires_grad_(False)
        layers = inject(tower, ClipTask.layer_sets["full"])
        for layer in layers.values():
            for _ in range(8):
                layer.add_expert(torch.empty(64, layer.in_features), torch.empty(layer.out_features, 64))
    trainable, total = mingle.count_parameters(tower)
    assert len(layers) == 72
    assert f"{trainable / 1e3:.1f} K" == "83.0 K"
    assert f"{total / 1e6:.1f} M" == "173.1 M"


def test_evaluate_fills_the_matrix_and_computes_acc_and_bwt(base_model, tuned_states, samples):
    suite = dict(zip(NAMES, samples, strict=True))
    merger = mingle.Merger(base_model, "individual")
    for i in range(2):
        add(merger, i, tuned_states, samples)
    result = merger.evaluate(suite)
    assert result.matrix[0] == [None]
    assert math.isnan(result.bwt)
    expected = []
    for i in range(2):
        model = CLIPModel(base_model.config).eval()
        model.load_state_dict(base_model.state_dict())
        model.vision_model.load_state_dict(tuned_states[i])
        image = model.visual_projection(model.vision_model(**samples[i].inputs).pooler_output)
        expected.append(100 * (((image @ samples[i].shared["text_embeds"].T).argmax(1)) == samples[i].labels).double().mean().item())
    assert result.matrix[1] == pytest.approx(expected)
    assert result.acc == pytest.approx(sum(expected) / 2)
    from mingle.evaluate import Result

    assert Result(["a", "b", "c"], [[80.0], [70.0, 60.0], [65.0, 62.0, 50.0]]).bwt == pytest.approx((-15 + 2) / 2)
    with pytest.raises(ValueError, match="no samples for the merged tasks two"):
        merger.evaluate({"one": samples[0]})


def test_bad_tasks_are_refused_before_anything_happens(base_model, tuned_states, samples):
    merger = merge(base_model, tuned_states, samples, count=1)
    seeds = TaskData(samples[1].inputs, samples[1].shared)
    with pytest.raises(ValueError, match="'one' is merged already"):
        merger.add("one", tuned_states[1], seeds)
    with pytest.raises(ValueError, match="'two': method 'mingle' needs seed samples"):
        merger.add("two", tuned_states[1])
    with pytest.raises(ValueError, match="need 'text_embeds'"):
        merger.add("two", tuned_states[1], {"pixel_values": samples[1].inputs["pixel_values"]})
    renamed = {k.replace("q_proj", "query"): v for k, v in tuned_states[1].items()}
    with pytest.raises(ValueError, match=r"(?s)'two'.*4 missing.*4 extra.*may be 'encoder.layers.0.self_attn.query"):
        merger.add("two", renamed, seeds)
    cut = dict(tuned_states[1])
    cut["post_layernorm.weight"] = torch.zeros(31)
    with pytest.raises(ValueError, match=r"post_layernorm.weight \[31\] instead of \[32\]"):
        merger.add("two", cut, seeds)
    poisoned = dict(tuned_states[1])
    poisoned["post_layernorm.weight"] = torch.full((32,), float("inf"))
    with pytest.raises(ValueError, match="'two': post_layernorm.weight has NaN or infinite values"):
        merger.add("two", poisoned, seeds)
    assert merger.task_names == ["one"]


def test_models_come_as_modules_states_or_folders(base_model, tuned_states, tuned_folders, samples):
    whole = CLIPModel(base_model.config)
    whole.load_state_dict(base_model.state_dict())
    whole.vision_model.load_state_dict(tuned_states[0])
    given = [whole, whole.vision_model, tuned_states[0], {f"vision_model.{k}": v for k, v in tuned_states[0].items()}, tuned_folders[0]]
    hashes = set()
    for model in given:
        merger = mingle.Merger(base_model, "average")
        merger.add("one", model)
        hashes.add(state_hash(merger.model))
    assert len(hashes) == 1


@pytest.fixture
def saved(base_model, tuned_states, samples, tmp_path):
    merge(base_model, tuned_states, samples, count=2).save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


def test_nothing_is_pickled(saved):
    assert {p.suffix for p in saved.rglob("*") if p.is_file() and not p.name.startswith(".")} == {".json", ".safetensors"}


def test_another_base_is_refused(saved, base_model):
    other = CLIPModel(CLIPConfig.from_dict(base_model.config.to_dict()))
    with pytest.raises(CheckpointError, match="merged into another base model"):
        mingle.Merger.from_pretrained(saved, base=other)


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "manifest", "version", "outside"])
def test_damaged_folders_are_refused_with_the_file_named(saved, damage):
    victim = sorted((saved / "tasks").iterdir())[1]
    manifest = json.loads((saved / "manifest.json").read_text())
    message = victim.name
    if damage == "missing":
        victim.unlink()
    elif damage == "truncated":
        size = victim.stat().st_size
        victim.write_bytes(victim.read_bytes()[:-5])
        message = f"expected {size} bytes, found {size - 5}"
    elif damage == "flipped":
        data = bytearray(victim.read_bytes())
        data[-3] ^= 1
        victim.write_bytes(data)
    elif damage == "manifest":
        (saved / "manifest.json").write_text('{"format": "mingle-merge", ')
        message = "manifest.json"
    elif damage == "version":
        (saved / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
        message = "format version 99"
    else:
        manifest["tasks"][1]["tensors"]["file"] = "../elsewhere.safetensors"
        (saved / "manifest.json").write_text(json.dumps(manifest))
        message = "elsewhere"
    with pytest.raises(CheckpointError, match=message):
        mingle.Merger.from_pretrained(saved)


@pytest.mark.parametrize("stop", range(1, 9))
def test_an_interrupted_save_leaves_the_old_merge_or_the_new_one(base_model, tuned_states, samples, saved, monkeypatch, stop):
    """Whatever rename the save stops at, the folder loads, and going on gives the bits of the uninterrupted merge."""
    merger = mingle.Merger.from_pretrained(saved)
    add(merger, 2, tuned_states, samples)
    calls, replace = 0, os.replace

    def failing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        return replace(*args, **kwargs)

    monkeypatch.setattr(os, "replace", failing)
    with contextlib.suppress(KeyboardInterrupt):
        merger.save_pretrained(saved)
    monkeypatch.undo()
    resumed = mingle.Merger.from_pretrained(saved)
    assert resumed.task_names in (NAMES[:2], NAMES)
    if resumed.task_names == NAMES[:2]:
        add(resumed, 2, tuned_states, samples)
    same_bits(everything(merger), everything(resumed))
