"""LoRA-WEMoE against a plain second implementation, and what its routers do to the model that holds them."""

from __future__ import annotations

import copy
import pickle
import zlib

import pytest
import torch
from small_merges import NAMES, add
from transformers import CLIPModel

import mingle
from mingle.methods.wemoe import route_by_module
from mingle.nn.linear import MingleLinear
from mingle.nn.low_rank_expert import LowRankExpert
from mingle.tasks import TaskData
from mingle.tasks.clip import ClipTask

OPTIONS = dict(rank=6, later_rank=3, steps=5, lr=5e-3, batch_size=24)


class Plain:
    """Every forward pass merges each sample's own MLP; Adam by torch on all routers."""

    def __init__(self, base, seed, reduce):
        self.origin = {k: v.clone() for k, v in base.vision_model.state_dict().items()}
        self.model, self.seed, self.reduce = copy.deepcopy(base).requires_grad_(False), seed, reduce
        self.mlps = {n: m for n, m in self.model.vision_model.named_modules() if n.endswith(".mlp")}
        self.experts = {n: [] for n in self.mlps}
        self.routers = {n: (torch.zeros(0, m.fc1.in_features), torch.zeros(0)) for n, m in self.mlps.items()}
        for name, mlp in self.mlps.items():
            mlp.forward = lambda x, name=name: self.forward(name, x)

    def forward(self, name, x):
        mlp, (weight, bias) = self.mlps[name], self.routers[name]
        gates = (
            x.mean(1) if self.reduce == "sample" else x.mean((0, 1)).expand(len(x), -1)
        ) @ weight.T + bias
        rows = []
        for tokens, row in zip(x, gates, strict=True):
            fc1 = mlp.fc1.weight + sum(g * D1 for g, (D1, _) in zip(row, self.experts[name], strict=True))
            fc2 = mlp.fc2.weight + sum(g * D2 for g, (_, D2) in zip(row, self.experts[name], strict=True))
            rows.append(mlp.activation_fn(tokens @ fc1.T + mlp.fc1.bias) @ fc2.T + mlp.fc2.bias)
        return torch.stack(rows)

    def add(self, index, tuned, data):
        for key, tensor in self.model.vision_model.state_dict().items():
            if "self_attn" in key:
                tensor += 0.3 * (tuned[key] - self.origin[key])
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{index}".encode()))
        for name, (weight, bias) in self.routers.items():
            pair = []
            for layer in ("fc1", "fc2"):
                key = f"{name}.{layer}.weight"
                U, S, Vh = torch.linalg.svd(tuned[key] - self.origin[key], full_matrices=False)
                r = OPTIONS["rank"] if index == 0 else OPTIONS["later_rank"]
                pair.append(U[:, :r] * S[:r] @ Vh[:r])
            self.experts[name].append(pair)
            new = torch.zeros(weight.shape[1]).normal_(std=0.01, generator=generator)
            self.routers[name] = torch.cat([weight, new[None]]), torch.cat([bias, torch.tensor([0.3])])
        parameters = [p.requires_grad_() for router in self.routers.values() for p in router]
        optimizer = torch.optim.Adam(parameters, lr=OPTIONS["lr"], foreach=False)
        for _ in range(OPTIONS["steps"]):
            p = torch.softmax(ClipTask().logits(self.model, data), -1)
            optimizer.zero_grad()
            (-(p * p.log()).sum(-1).mean()).backward()
            optimizer.step()
        self.routers = {n: tuple(p.detach() for p in router) for n, router in self.routers.items()}


@pytest.mark.parametrize("reduce", ["sample", "batch"])
def test_a_whole_merge_by_a_plain_second_implementation(base_model, tuned_states, samples, reduce):
    torch.set_default_dtype(torch.float64)
    try:
        base = CLIPModel(base_model.config).double().eval()
        base.load_state_dict(base_model.state_dict())
        data = [
            TaskData(
                {k: v.double() for k, v in s.inputs.items()}, {k: v.double() for k, v in s.shared.items()}
            )
            for s in samples
        ]
        merger = mingle.Merger(base, "wemoe", seed=4, reduce=reduce, **OPTIONS)
        plain = Plain(base, 4, reduce)
        for i in range(3):
            tuned = {k: v.double() for k, v in tuned_states[i].items()}
            merger.add(NAMES[i], tuned, data[i])
            plain.add(i, tuned, data[i])
        for sample in data:
            torch.testing.assert_close(
                ClipTask().logits(merger.model, sample),
                ClipTask().logits(plain.model, sample),
                rtol=1e-6,
                atol=1e-9,
            )
    finally:
        torch.set_default_dtype(torch.float32)
    for name, router in merger.method.routers.items():
        for found, expected in zip(router.all_gates(), plain.routers[name.removesuffix(".fc1")], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_what_trains_and_what_stays(base_model, tuned_states, samples):
    merger = mingle.Merger(base_model, "wemoe", **OPTIONS)
    base = base_model.vision_model.state_dict()
    gates = []
    for i in range(2):
        report = add(merger, i, tuned_states, samples)
        assert len(report.trace.loss) == OPTIONS["steps"]
        gates.append(
            {name: [p.clone() for p in router.all_gates()] for name, router in merger.method.routers.items()}
        )
    assert len(merger.method.layers) == 4 and [name[-3:] for name in merger.method.routers] == ["fc1", "fc1"]
    for name, (weight, bias) in gates[1].items():
        older_weight, older_bias = gates[0][name]
        assert (weight[0] != older_weight[0]).any() and bias[0] != older_bias[0], "older gates train on"
    trainable = {name for name, p in merger.model.named_parameters() if p.requires_grad}
    routers = ("mlp.fc1.gate_weight", "mlp.fc1.gate_bias")
    assert len(trainable) == 4 and all(name.endswith(routers) for name in trainable)
    ranks = [
        [int((expert.A.abs().sum(1) > 0).sum()) for expert in layer.experts()]
        for layer in merger.method.layers.values()
    ]
    assert ranks == [[6, 3]] * 4
    for name, tensor in merger.model.vision_model.state_dict().items():
        if "self_attn" in name:
            expected = base[name] + sum(0.3 * (state[name] - base[name]) for state in tuned_states[:2])
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
        elif name in base:
            assert torch.equal(tensor, base[name]), name


@pytest.mark.parametrize("reduce", ["sample", "batch", "token"])
def test_a_saved_merge_goes_on_bit_for_bit(base_model, tuned_states, samples, tmp_path, reduce):
    whole = mingle.Merger(base_model, "wemoe", reduce=reduce, **OPTIONS)
    for i in range(2):
        add(whole, i, tuned_states, samples)
    whole.save_pretrained(tmp_path)
    resumed = mingle.Merger.from_pretrained(tmp_path)
    for merger in (whole, resumed):
        add(merger, 2, tuned_states, samples)
    found = resumed.model.state_dict()
    assert found.keys() == whole.model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.model.state_dict().items())


def test_a_failed_task_leaves_everything_as_it_was(base_model, tuned_states, samples):
    merger = mingle.Merger(base_model, "wemoe", **OPTIONS)
    add(merger, 0, tuned_states, samples)
    before = {name: tensor.clone() for name, tensor in merger.model.state_dict().items()}
    broken = {name: torch.full_like(tensor, 1e30) for name, tensor in tuned_states[1].items()}
    with pytest.raises(RuntimeError):
        add(merger, 1, [None, broken], samples)
    after = merger.model.state_dict()
    assert after.keys() == before.keys() and all(
        torch.equal(after[name], tensor) for name, tensor in before.items()
    )
    add(merger, 1, tuned_states, samples)


def test_a_model_whose_mlps_are_the_base_adds_its_attention_alone(base_model, tuned_states, samples):
    merger = mingle.Merger(base_model, "wemoe", **OPTIONS)
    base = base_model.vision_model.state_dict()
    half = {name: tuned_states[0][name] if "self_attn" in name else tensor for name, tensor in base.items()}
    assert "no expert was added" in add(merger, 0, [half], samples).skipped
    assert add(merger, 1, tuned_states, samples).skipped is None
    # the rank of a first expert
    assert all(layer.rank == OPTIONS["rank"] for layer in merger.method.layers.values())
    name = "encoder.layers.0.self_attn.q_proj.weight"
    expected = base[name] + 0.3 * (half[name] - base[name]) + 0.3 * (tuned_states[1][name] - base[name])
    torch.testing.assert_close(merger.model.vision_model.state_dict()[name], expected)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (
            MingleLinear.from_linear(torch.nn.Linear(*shape)) for shape in ((6, 4), (4, 6))
        )
        for layer in (self.first, self.second):
            for _ in range(2):
                layer.add_expert(
                    *LowRankExpert.from_dense(torch.randn(layer.out_features, layer.in_features), 2)
                )
            layer.set_trainable_gates(2)

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))], ids=["deepcopy", "pickle"]
)
def test_routers_follow_their_copies(copied):
    block = Block()
    assert list(route_by_module({"mlp.first": block.first, "mlp.second": block.second})) == ["mlp.first"]
    twin, x = copied(block), torch.randn(3, 5, 6)
    torch.testing.assert_close(twin(x), block(x))
    with torch.no_grad():
        twin.first.gate_bias += 1
    assert not torch.allclose(twin(x), block(x))
    gates = (x.mean(1) @ block.first.gate_weight.T + block.first.gate_bias)[:, None]
    hidden = block.first(x)
    expected = hidden @ block.second.weight.T + block.second.bias
    for i, expert in enumerate(block.second.experts()):
        expected = expected + gates[..., i : i + 1] * (hidden @ expert.delta().T)
    torch.testing.assert_close(block(x), expected)
    assert block.second.given_gates is None  # nothing of the graph stays behind


def test_options(base_model):
    for wrong in (dict(rank=0), dict(later_rank=0), dict(batch_size=0), dict(lr=-1.0), dict(steps=-1)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            mingle.Merger(base_model, "wemoe", **wrong)
    with pytest.raises(ValueError, match="needs seed samples"):
        mingle.Merger(base_model, "wemoe").add("one", base_model)
