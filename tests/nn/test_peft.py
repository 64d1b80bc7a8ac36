"""Experts from saved PEFT adapters and from dense updates."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import mingle
from mingle import LowRankExpert, MingleLinear
from mingle.io.files import CheckpointError

peft = pytest.importorskip("peft")

# peft warns about most of what is tried here.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning"
)

LAYERS = ["embed", "blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(self.norm(self.fc1(x)).relu())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 6)
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.conv = nn.Conv1d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.conv(x.mT).mT


def randomize(model: nn.Module, adapter: str = "default", seed: int = 5) -> None:
    """An adapter that does something, as if it were trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name and f".{adapter}" in name:
                parameter.copy_(
                    parameter + 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                )


def adapted(base: nn.Module, folder: Path, **options: Any) -> nn.Module:
    """PEFT's model on a copy of `base`, with its adapter saved in `folder`."""
    options = {"target_modules": ["embed", "fc1", "fc2"], "r": 4, "lora_alpha": 6, **options}
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)).eval()
    randomize(model)
    model.save_pretrained(folder)
    return model


def snapshot(model: nn.Module) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Which objects a model is made of, and their values."""
    parts = {name: id(part) for name, part in [*model.named_modules(), *model.named_parameters()]}
    return parts, {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: tuple[dict[str, int], dict[str, torch.Tensor]]) -> None:
    parts, values = snapshot(model)
    assert parts == before[0]
    assert all(torch.equal(values[name], value) for name, value in before[1].items())


@pytest.fixture
def base() -> Net:
    return Net().double().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 5, 6, dtype=torch.float64)


@pytest.fixture
def saved(base: Net, tmp_path: Path) -> Path:
    adapted(base, tmp_path / "adapter")
    return tmp_path / "adapter"


def configure(folder: Path, **options: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


PATTERNS: dict[str, Any] = dict(
    rank_pattern={r"blocks\.1\.fc.": 2, "bed": 7, "fc1": 3, "^embed": 5},
    alpha_pattern={"0.fc1": 2, "c1": 50, "fc1": 4, "fc2|embed": 3},
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(r=1, lora_alpha=-0.5),
        dict(r=20),  # above every layer's width
        dict(use_rslora=True),
        dict(target_modules=["blocks.1.fc2"]),
        PATTERNS,
        dict(PATTERNS, use_rslora=True),
        dict(init_lora_weights="gaussian"),
        dict(init_lora_weights="eva"),
        dict(init_lora_weights="orthogonal"),
        dict(init_lora_weights=False, lora_dropout=0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("reduce", ["sample", "token"])
def test_computes_what_peft_computes(base, x, tmp_path, options, reduce):
    model = adapted(base, tmp_path, **options)
    expected, plain = model(x), base(x)
    layers = mingle.add_adapter(base, tmp_path, reduce=reduce)
    assert list(layers) == [name for name in LAYERS if name in layers]
    assert len(layers) == (1 if options.get("target_modules") else len(LAYERS))
    assert all(base.get_submodule(name) is layer and layer.reduce == reduce for name, layer in layers.items())
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(base(x), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(base(x), model.merge_and_unload()(x), rtol=0, atol=1e-6)


def test_mica_leaves_the_base_as_it_is(tmp_path):
    base, x = Net().eval(), torch.randn(3, 5, 6)
    expected = adapted(base, tmp_path, init_lora_weights="mica")(x)
    mingle.add_adapter(base, tmp_path)
    torch.testing.assert_close(base(x), expected, rtol=1e-6, atol=1e-6)


def test_on_a_transformers_model(tmp_path):
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
    )
    base, tokens = LlamaForCausalLM(config).eval(), torch.randint(32, (2, 7))
    model = adapted(
        base, tmp_path, target_modules="all-linear", task_type="CAUSAL_LM", rank_pattern={"q_proj": 2}
    )
    expected = model(tokens).logits
    experts = mingle.read_adapter(tmp_path)
    assert len(experts) == 14
    assert experts["model.layers.1.self_attn.q_proj"].A.shape == (2, 16)
    mingle.add_adapter(base, experts)
    torch.testing.assert_close(base(tokens).logits, expected, rtol=1e-6, atol=1e-6)


def test_adapters_of_different_ranks_one_after_another(base, x, tmp_path):
    model = adapted(base, tmp_path, r=2, target_modules=["fc1", "embed"])
    model.add_adapter(
        "second", peft.LoraConfig(r=5, lora_alpha=3, target_modules=["fc1", "fc2"], use_rslora=True)
    )
    randomize(model, "second", seed=6)
    model.base_model.set_adapter(["default", "second"])
    model.save_pretrained(tmp_path)
    expected = model(x)
    first = mingle.add_adapter(base, tmp_path)
    second = mingle.add_adapter(base, tmp_path / "second", reduce="token")
    torch.testing.assert_close(base(x), expected, rtol=0, atol=1e-6)
    shared = second["blocks.0.fc1"]
    assert shared is first["blocks.0.fc1"]
    assert shared.reduce == "sample" and second["blocks.0.fc2"].reduce == "token"
    assert (shared.num_experts, shared.rank) == (2, 5)
    assert shared.gate_weight.shape == (1, 8) and shared.gate_weight.requires_grad
    assert shared.frozen_gate_bias.tolist() == [1.0]


def test_factors_are_used_as_they_are(base, tmp_path):
    adapted(base, tmp_path, use_rslora=True)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for name, expert in mingle.read_adapter(tmp_path).items():
        assert torch.equal(expert.A, stored[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(expert.B, stored[f"base_model.model.{name}.lora_B.weight"] * 3)  # 6 / √4


def test_half_precision_is_widened_before_it_is_scaled(base, tmp_path):
    adapted(base, tmp_path, r=3, lora_alpha=1)
    edit_tensors(
        tmp_path,
        lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}),
    )
    expert = mingle.read_adapter(tmp_path)["embed"]
    stored = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.embed.lora_B.weight"]
    assert expert.A.dtype == expert.B.dtype == torch.float32
    assert torch.equal(expert.B, stored.float() * (1 / 3))


def test_gate_bias(base, x, saved):
    plain, full = base(x), copy.deepcopy(base)
    mingle.add_adapter(full, saved)
    layers = mingle.add_adapter(base, saved, gate_bias=0.0)
    torch.testing.assert_close(base(x), plain)
    for layer in layers.values():
        layer.gate_bias.data.fill_(1.0)
    assert torch.equal(base(x), full(x))


def test_names_with_the_adapter_inside(base, saved):
    experts = mingle.read_adapter(saved)
    rename = lambda name: name.replace(".weight", ".default.weight")  # noqa: E731
    edit_tensors(
        saved, lambda tensors: [tensors.update({rename(name): tensors.pop(name)}) for name in list(tensors)]
    )
    assert all(torch.equal(expert.B, experts[name].B) for name, expert in mingle.read_adapter(saved).items())


def test_a_converted_pissa_adapter(base, x, tmp_path):
    base, x = base.float(), x.float()
    model = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(r=2, lora_alpha=3, target_modules=["fc1", "fc2"], init_lora_weights="pissa"),
    ).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    randomize(model)
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    with pytest.raises(
        CheckpointError, match="init_lora_weights='pissa'.*path_initial_model_for_weight_conversion"
    ):
        mingle.read_adapter(tmp_path / "plain")
    mingle.add_adapter(base, tmp_path / "converted")
    torch.testing.assert_close(base(x), model(x), rtol=1e-5, atol=1e-5)


def test_fan_in_fan_out_describes_the_base_only(tmp_path):
    base = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8))
    model = adapted(base, tmp_path, target_modules=["c_attn"], fan_in_fan_out=True)
    name = "transformer.h.0.attn.c_attn"
    expert = mingle.read_adapter(tmp_path)[name]
    torch.testing.assert_close(
        expert.delta().T, model.base_model.model.get_submodule(name).get_delta_weight("default")
    )
    with pytest.raises(ValueError, match=f"'{name}' is a Conv1D, not a torch.nn.Linear"):
        mingle.add_adapter(base, tmp_path)


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
        (dict(alpha_pattern={"fc(1": 3}), r"alpha_pattern: 'fc\(1' is no regular expression"),
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
        CheckpointError, match=r"tensor '.*lora_(magnitude_vector|B.bias)' is no factor of a linear layer"
    ):
        mingle.read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(target_modules=["tokens", "fc1"]), "tokens.lora_embedding_A' is no factor"),
        (dict(modules_to_save=["conv"]), "modules_to_save is set"),
        (dict(bias="lora_only"), "bias='lora_only'"),
        (dict(target_modules=["fc1", "conv"]), r"conv.lora_A.weight' \[4, 8, 1\]"),
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
            "tensor 'blocks.0.fc1.weight' is no factor",
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
    (saved / "model.safetensors").write_bytes(
        outside.read_bytes()
    )  # other weights beside it are not looked at
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


def expert(d_out: int, d_in: int, rank: int = 2) -> LowRankExpert:
    return LowRankExpert(A=torch.randn(rank, d_in), B=torch.randn(d_out, rank))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"blocks.0.fc3": expert(12, 8)},
            "in 1 of 2 layers: 'blocks.0.fc3' is not in the model; did you mean 'blocks.0.fc[12]'",
        ),
        ({"fc1": expert(12, 8)}, "'fc1' is not in the model"),
        ({"": expert(12, 8)}, "'' is not in the model"),
        ({"conv": expert(8, 8)}, "'conv' is a Conv1d, not a torch.nn.Linear"),
        ({"blocks": expert(8, 8)}, "'blocks' is a ModuleList"),
        (
            {"embed": expert(6, 8)},
            r"'embed': A has shape \[2, 8\] and B \[6, 2\], expected \[r, 6\] and \[8, r\]",
        ),
        (
            {"embed": LowRankExpert(torch.randn(2, 6), torch.randn(8, 3))},
            r"'embed': A has shape \[2, 6\] and B \[8, 3\]",
        ),
        ({"embed": LowRankExpert(torch.randn(6), torch.randn(8, 6))}, r"'embed': A has shape \[6\]"),
        (
            {"embed": LowRankExpert(torch.randn(2, 6), torch.full((8, 2), torch.inf))},
            "'embed': B is not finite",
        ),
        ({f"blocks.{i}.fc1": expert(12, 8) for i in range(2, 10)}, "in 8 of 9 layers: .*; and 3 more"),
    ],
)
def test_an_adapter_that_does_not_fit_changes_nothing(base, extra, message):
    mingle.add_adapter(base, {"blocks.1.fc1": expert(12, 8)})
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        mingle.add_adapter(base, {"blocks.0.fc1": expert(12, 8)} | extra)
    assert_unchanged(base, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(reduce="mean"), "reduce='mean'"),
        (dict(gate_bias=float("inf")), "gate_bias=inf"),
        (dict(adapter={}), "no experts"),
    ],
    ids=str,
)
def test_wrong_arguments_change_nothing(base, options, message):
    mingle.add_adapter(base, {"blocks.0.fc1": expert(12, 8)})
    before = snapshot(base)
    adapter = {"blocks.0.fc1": expert(12, 8), "blocks.0.fc2": expert(8, 12)}
    with pytest.raises(ValueError, match=message):
        mingle.add_adapter(base, **{"adapter": adapter, **options})
    assert_unchanged(base, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_on_the_way_changes_nothing(base, x, monkeypatch, error):
    adapter = {name: expert(*base.get_submodule(name).weight.shape) for name in LAYERS}
    mingle.add_adapter(base, {name: adapter[name] for name in LAYERS[:3]})
    before, output, add = snapshot(base), base(x), MingleLinear.add_expert
    calls = []

    def fails_late(layer: MingleLinear, *args: Any, **options: Any) -> None:
        add(layer, *args, **options)
        calls.append(layer)
        if len(calls) == 4:
            raise error("out of memory")

    monkeypatch.setattr(MingleLinear, "add_expert", fails_late)
    with pytest.raises(error):
        mingle.add_adapter(base, adapter)
    assert_unchanged(base, before)
    assert torch.equal(base(x), output)


def test_overflow_in_the_layers_dtype(saved):
    experts = {name: LowRankExpert(A=A, B=B * 1e6) for name, (A, B) in mingle.read_adapter(saved).items()}
    with pytest.raises(ValueError, match="B is not finite in the layer's torch.float16"):
        mingle.add_adapter(Net().half(), experts)


def test_layers_whose_owner_reads_their_weight_are_refused():
    class Special(nn.Linear):
        pass

    with pytest.raises(ValueError, match="'0' is a Special, not a torch.nn.Linear"):
        mingle.add_adapter(nn.Sequential(Special(4, 4)), {"0": expert(4, 4)})
    encoder = nn.TransformerEncoderLayer(4, 2, 8)
    with pytest.raises(
        ValueError, match="'linear1' cannot take experts: torch.nn.TransformerEncoderLayer reads its weight"
    ):
        mingle.add_adapter(encoder, {"linear1": expert(8, 4)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 3, 6, 100])
def test_from_dense_is_the_truncated_svd(rank, dtype):
    delta = torch.randn(6, 9).to(dtype)
    factors = LowRankExpert.from_dense(delta, rank)
    kept = min(rank, 6)
    assert factors.A.shape == (kept, 9) and factors.B.shape == (6, kept)
    assert factors.A.dtype == factors.B.dtype == dtype
    U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    best = (U[:, :kept] * S[:kept]) @ Vh[:kept]
    torch.testing.assert_close(
        factors.B.double() @ factors.A.double(), best, rtol=0, atol=20 * torch.finfo(dtype).eps
    )


def test_from_dense_in_a_layer():
    base, tuned, x = nn.Linear(8, 6), nn.Linear(8, 6), torch.randn(4, 8)
    tuned.bias = base.bias
    model = nn.Sequential(base)
    mingle.add_adapter(model, {"0": LowRankExpert.from_dense(tuned.weight - base.weight, 6)})
    torch.testing.assert_close(model(x), tuned(x))


@pytest.mark.parametrize(
    ("delta", "rank", "message"),
    [
        (torch.zeros(3, 4, 5), 2, r"delta has shape \[3, 4, 5\]"),
        (torch.zeros(4), 2, r"delta has shape \[4\]"),
        (torch.zeros(3, 4).long(), 2, "torch.int64"),
        (torch.full((3, 4), torch.nan), 2, r"\[3, 4\] has non-finite entries"),
        (torch.zeros(3, 4), 0, "rank=0"),
    ],
)
def test_from_dense_refuses(delta, rank, message):
    with pytest.raises(ValueError, match=message):
        LowRankExpert.from_dense(delta, rank)
