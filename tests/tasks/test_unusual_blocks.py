"""Architectures whose layers read samples in another form, or are Linears in all but their class."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from architectures import moved, options, samples
from torch import nn

import mingle
from mingle import tasks
from mingle.merging.evaluate import gate_activation
from mingle.merging.streamed import streams
from mingle.tasks import TaskData

_TEXT = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=48,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_STAGES = dict(image_size=32, hidden_sizes=[8, 16])


def _decoder(config, **more):
    return lambda: transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**_TEXT | more)
    )


def _classifier(name, **settings):
    return lambda: getattr(transformers, f"{name}ForImageClassification")(
        getattr(transformers, f"{name}Config")(**settings)
    )


MADE = {
    # a Linear of its own class
    "falcon": _decoder("FalconConfig"),
    # the tokens of all samples in one dimension: of its MLPs; of a shared expert; latents read once more
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**_TEXT | dict(ffn_dim=24, word_embed_proj_dim=16))
    ),
    "qwen2_moe": _decoder(
        "Qwen2MoeConfig",
        num_key_value_heads=1, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    ),
    "deepseek_v3": _decoder(
        "DeepseekV3Config",
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=8,
        first_k_dense_replace=1, num_key_value_heads=2,
    ),
    # samples filled up to whole windows
    "longformer": lambda: transformers.LongformerForSequenceClassification(
        transformers.LongformerConfig(**_TEXT, attention_window=[4, 4])
    ),
    # images whose places are in two dimensions; blocks in lists of lists
    "convnext": _classifier("ConvNext", **_STAGES, depths=[2, 2], num_stages=2),
    "pvt": _classifier(
        "Pvt",
        image_size=64, hidden_sizes=[8, 16, 16, 16], depths=[2, 1, 1, 1], num_attention_heads=[1, 2, 2, 2],
        sequence_reduction_ratios=[2, 2, 1, 1], mlp_ratios=[2, 2, 2, 2],
    ),
    # one block for all layers; samples taken apart; kernels that read weights; no tokens that end or pad
    "albert": lambda: transformers.AlbertForSequenceClassification(
        transformers.AlbertConfig(**_TEXT, embedding_size=8)
    ),
    "mobilevit": _classifier(
        "MobileViT",
        image_size=64, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
        num_attention_heads=2,
    ),
    "mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    ),
    "codegen": lambda: transformers.CodeGenForCausalLM(
        transformers.CodeGenConfig(
            vocab_size=64, n_embd=16, n_layer=2, n_head=4, n_positions=48, rotary_dim=4
        )
    ),
}  # fmt: skip
TAKE_EXPERTS = ("falcon", "opt", "longformer", "qwen2_moe", "deepseek_v3", "convnext", "pvt")


def built(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MADE[kind]().eval()


def merged(kind, method):
    base = built(kind)
    merger = mingle.Merger(base, method, **options(method))
    for seed, name in enumerate(("one", "two")):
        merger.add(name, moved(base, seed), samples(merger.task, base))
    return merger


def answers(merger, inputs):
    given = {key: tensor for key, tensor in inputs.items() if key != "labels"}
    with torch.no_grad():
        return merger.model_for("two")(**given).logits


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        pytest.param(kind, method, marks=[pytest.mark.slow] * (kind in ("qwen2_moe", "deepseek_v3", "pvt")))
        for kind in TAKE_EXPERTS
        for method in ("mingle", "routed", *(["mass"] if kind in ("opt", "qwen2_moe") else []))
    ],
)
def test_experts_answer_each_sample_by_itself(kind, method):
    merger = merged(kind, method)
    inputs = samples(merger.task, merger.base)
    together = answers(merger, inputs)
    assert not torch.allclose(together, merger.base(**inputs).logits, atol=1e-4)
    for row in range(len(together)):
        # padding is at the end, where it changes nothing
        own = inputs["attention_mask"][row].bool() if "attention_mask" in inputs else ...
        one = {
            key: tensor[row : row + 1] if own is ... else tensor[row : row + 1, own]
            for key, tensor in inputs.items()
        }
        wanted = together[row][own] if together.dim() == 3 else together[row]
        torch.testing.assert_close(answers(merger, one)[0], wanted, rtol=1e-4, atol=1e-5)
    if merger.task.name == "causal-lm":
        given = {key: tensor.flip(1) for key, tensor in inputs.items()}  # prompts are padded on the left
        how = dict(max_new_tokens=4, do_sample=False)
        with_cache, without = (
            merger.model.generate(**given, **how, use_cache=use_cache) for use_cache in (True, False)
        )
        assert torch.equal(with_cache, without)


def test_layers_of_a_shared_expert_are_told_which_tokens_are_padding():
    merger = merged("qwen2_moe", "mingle")
    layers = merger.method.layers
    inputs = samples(merger.task, merger.base)
    shared = next(name for name in layers if "shared_expert" in name)
    assert any(name.endswith("q_proj") for name in layers)
    padded = gate_activation(merger.task, merger.model, layers, merger.task.data(inputs))
    odd = dict(inputs, input_ids=inputs["input_ids"] + 7 * (1 - inputs["attention_mask"]))  # other padding
    assert torch.allclose(padded, gate_activation(merger.task, merger.model, layers, merger.task.data(odd)))
    means = {}
    counted = inputs["attention_mask"].flatten().bool()

    def note(layer, args):
        means[shared] = layer.gates(args[0])[counted].mean(0)

    handle = layers[shared].register_forward_pre_hook(note)
    merger.task.logits(merger.model, TaskData(inputs))
    handle.remove()
    torch.testing.assert_close(padded[list(layers).index(shared)], means[shared].detach())


@pytest.mark.parametrize(
    ("kind", "method", "reason"),
    [
        (
            "albert",
            "mingle",
            "AlbertModel has no linear layers in the set 'full' that can take experts: "
            ".*query' is called more than once in a forward pass",
        ),
        ("mobilevit", "routed", "passes 16 rows .* for 4 samples, .* take a method without a router"),
    ],
)
def test_what_cannot_take_part_says_why(kind, method, reason):
    with pytest.raises(ValueError, match=reason):
        merged(kind, method)


@pytest.mark.parametrize(
    ("kind", "layer", "layers"),
    [
        ("mamba", "out_proj", ("in_proj", "x_proj")),
        ("deepseek_v3", "gate_proj", ("o_proj",)),  # of a layer without experts: PEFT looks for them in it
    ],
)
def test_adapters_that_peft_would_not_load_are_not_exported(kind, layer, layers, tmp_path):
    merger = merged(kind, "routed")
    with pytest.raises(ValueError, match=rf"{layer}': PEFT loads no adapter of it .* kind '{kind}'"):
        merger.export(tmp_path / "adapters", format="peft")
    base = built(kind)
    merger = mingle.Merger(base, "routed", rank=2, layers=layers)
    merger.add("one", moved(base, 1), samples(merger.task, base))
    merger.export(tmp_path / "adapters", format="peft")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapters/one")
    state = {name: tensor for name, tensor in loaded.state_dict().items() if "lora_" in name}
    assert state and all(tensor.abs().max() > 0 for tensor in state.values())


def test_a_model_whose_configuration_has_no_pad_token_answers():
    base = built("codegen")
    merger = mingle.Merger(base, "average")
    merger.add("one", moved(base, 1))
    labelled = samples(merger.task, base, labelled=True)
    assert 0 <= merger.evaluate({"one": labelled}).acc <= 100


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_configurations_inside_a_configuration_are_compared_setting_by_setting(part, tmp_path):
    tower = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.CLIPConfig(
        text_config=tower | dict(vocab_size=64), vision_config=tower | dict(image_size=16, patch_size=8)
    )
    base = transformers.CLIPForImageClassification(config)
    base.save_pretrained(tmp_path / "base")
    tuned = copy.deepcopy(base)
    getattr(tuned.config, part).attention_dropout = 0.5  # which only training knows
    tuned.save_pretrained(tmp_path / "same")
    getattr(tuned.config, part).hidden_act = "relu"
    tuned.save_pretrained(tmp_path / "other")
    merger = mingle.Merger(tmp_path / "base", "average")
    merger.add("same", tmp_path / "same")
    assert set(merger.merged[0].head.tensors) == {"classifier.weight", "classifier.bias"}
    with pytest.raises(ValueError, match=rf"{part}\.hidden_act is 'relu' and in the base 'quick_gelu'"):
        merger.add("other", tmp_path / "other")


def test_a_configuration_with_infinity_in_it_is_read(tmp_path):
    config = transformers.Mamba2Config(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=8, num_heads=4, head_dim=8, n_groups=1
    )
    base = transformers.Mamba2ForCausalLM(config)
    base.save_pretrained(tmp_path)
    assert '"__float__": "Infinity"' in (tmp_path / "config.json").read_text()
    assert tasks.of(tmp_path).skeleton(tmp_path).config.time_step_limit[1] == float("inf")


def test_blocks_are_those_that_are_called():
    model = built("pvt")
    tower = tasks.of(model).structure(model)
    blocks = [block for stack in tower.stacks for block in stack.blocks]
    assert len(tower.stacks) == 4
    assert not any(isinstance(model.pvt.get_submodule(block), nn.ModuleList) for block in blocks)


def test_answers_begin_with_the_token_that_generation_begins_with():
    inner = _TEXT | dict(num_key_value_heads=1, head_dim=8)
    settings = dict(
        encoder=inner, decoder=inner, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = transformers.T5GemmaForConditionalGeneration(transformers.T5GemmaConfig(**settings)).eval()
    assert not hasattr(base.config, "decoder_start_token_id")
    merger = mingle.Merger(base, "routed", rank=2)  # its router looks at prompts alone
    merger.add("one", moved(base, 1), samples(merger.task, base))
    given = merger.task.data(samples(merger.task, base))
    first = merger.task.logits(merger.model, given)[:, 0].argmax(-1)
    inputs = {key: tensor for key, tensor in given.inputs.items() if not key.startswith("decoder")}
    assert torch.equal(merger.model.generate(**inputs, max_new_tokens=1, do_sample=False)[:, 1], first)


def test_the_scores_of_align_are_its_own():
    tower = dict(image_size=32, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=16)
    config = transformers.AlignConfig(
        text_config=_TEXT,
        vision_config=tower,
        projection_dim=80,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = moved(transformers.AlignModel(config).eval(), 1)
        base.temperature.data.fill_(0.5)
    merger = mingle.Merger(base, "average")
    pixels, ids = torch.randn(2, 3, 32, 32), torch.randint(3, 64, (3, 5))
    with torch.no_grad():
        whole = base(input_ids=ids, pixel_values=pixels)
        data = merger.task.data({"pixel_values": pixels, "text_embeds": whole.text_embeds})
        torch.testing.assert_close(merger.task.logits(base, data), whole.logits_per_image)


@pytest.mark.parametrize("method", ["opcm", "mingle"])
def test_positions_that_are_in_no_file_are_those_that_the_model_computes(method, tmp_path):
    layers = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    config = transformers.MarianConfig(
        vocab_size=64, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=48,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, **layers,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = transformers.MarianMTModel(config).eval()
    for seed, name in enumerate(("base", "one", "two")):
        (moved(base, seed) if seed else base).save_pretrained(tmp_path / name)
    merger = mingle.Merger(tmp_path / "base", method, **options(method))
    positions = "model.encoder.embed_positions.weight"
    assert torch.equal(merger.model.state_dict()[positions], base.state_dict()[positions])
    for name in ("one", "two"):
        merger.add(name, tmp_path / name, samples(merger.task, base))
    merger.save_pretrained(tmp_path / "merged")
    again = mingle.Merger.from_pretrained(tmp_path / "merged")
    assert torch.equal(again.model.state_dict()[positions], base.state_dict()[positions])
    again.export(tmp_path / "plain", "two" if method == "mingle" else None)
    exported = transformers.MarianMTModel.from_pretrained(tmp_path / "plain").state_dict()
    assert torch.equal(exported[positions], base.state_dict()[positions])
    assert not streams(type(merger.method), merger.options, merger.task, merger.base)
