"""Every architecture and every method: its structure is found, and it merges, goes on, answers and leaves."""

from __future__ import annotations

import pytest
import torch
from architectures import ALIKE, ARCHITECTURES, UNLIKE, built, each_kind, moved, names_in, options, samples
from torch import nn

import mingle
from mingle import tasks
from mingle.methods import METHODS
from mingle.methods.gated import GatedMethod
from mingle.nn.inject import matches

#: kinds → task type, layers of attention, layers of MLPs, by what follows the block's name; those before the
#: stroke read the block's input
FOUND = {
    "llama qwen2 qwen3 mistral gemma2 gemma3 olmo2": (
        "causal-lm",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj / self_attn.o_proj",
        "mlp.gate_proj mlp.up_proj / mlp.down_proj",
    ),
    "mixtral qwen3_moe": (
        "causal-lm",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj / self_attn.o_proj",
        "/",
    ),
    "phi3": ("causal-lm", "self_attn.qkv_proj / self_attn.o_proj", "mlp.gate_up_proj / mlp.down_proj"),
    "gpt2": ("causal-lm", "attn.c_attn / attn.c_proj", "mlp.c_fc / mlp.c_proj"),
    "gpt_neox": (
        "causal-lm",
        "attention.query_key_value / attention.dense",
        "mlp.dense_h_to_4h / mlp.dense_4h_to_h",
    ),
    "vit dinov2": (
        "image-classification",
        "attention.q_proj attention.k_proj attention.v_proj / attention.o_proj",
        "mlp.fc1 / mlp.fc2",
    ),
    "bert roberta": (
        "text-classification",
        "attention.self.query attention.self.key attention.self.value / attention.output.dense",
        "intermediate.dense / output.dense",
    ),
    "deberta-v2": (
        "text-classification",
        "attention.self.query_proj attention.self.key_proj attention.self.value_proj"
        " / attention.output.dense",
        "intermediate.dense / output.dense",
    ),
    "distilbert": (
        "text-classification",
        "attention.q_lin attention.k_lin attention.v_lin / attention.out_lin",
        "ffn.lin1 / ffn.lin2",
    ),
    "clip siglip": (
        "clip",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj / self_attn.out_proj",
        "mlp.fc1 / mlp.fc2",
    ),
}
#: the layers that papers name, by what follows the block's name, however many blocks there are
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
T5 = [f"{kind}.{n}" for kind in ("SelfAttention", "EncDecAttention") for n in "qkv"]
T5_OUT = ["SelfAttention.o", "EncDecAttention.o"]


def of_t5(*inner):
    """The sets of a T5 whose MLP begins with these layers."""
    wi = [f"DenseReluDense.{name}" for name in inner]
    wo = ["DenseReluDense.wo"]
    return {
        "full": [*T5, *T5_OUT, *wi],
        "light": [*T5, *wi],
        "nufilt": [*T5, *T5_OUT, *wi, *wo],
        "mlp": [*wi, *wo],
    }


PUBLISHED = {
    "clip": {
        "full": [*QKV, "self_attn.out_proj", "mlp.fc1", "mlp.fc2"],
        "light": [*QKV, "mlp.fc1"],
        "nufilt": [*QKV, "self_attn.out_proj", "mlp.fc1"],
        "mlp": ["mlp.fc1", "mlp.fc2"],
    },
    "t5": of_t5("wi"),
    "mt5": of_t5("wi_0", "wi_1"),
}


def in_blocks(structure, name):
    """The layers of a set, each by its name inside its block, once for all blocks."""
    return {layer.removeprefix(structure.block_of(layer) + ".") for layer in structure.layers[name]}


@pytest.mark.parametrize(
    ("kind", "expected"), [(kind, expected) for kinds, expected in FOUND.items() for kind in kinds.split()]
)
def test_blocks_and_sets_of_layers_are_found(kind, expected):
    model, (task, *parts) = built(kind), expected
    first, last = zip(*(part.split("/") for part in parts), strict=True)
    attention, mlp = ({*a.split(), *b.split()} for a, b in zip(first, last, strict=True))
    found = tasks.of(model)
    assert found.name == task
    structure = found.structure(model)
    assert [len(stack.blocks) for stack in structure.stacks] == [2]
    assert in_blocks(structure, "attention") == attention
    assert in_blocks(structure, "mlp") == mlp
    assert in_blocks(structure, "full") == attention | mlp
    assert in_blocks(structure, "light") == set(" ".join(first).split())
    assert structure.unfit == {}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_sets_of_the_papers_are_as_published(kind):
    model = built(kind)
    structure = tasks.of(model).structure(model)
    for name, layers in PUBLISHED[kind].items():
        assert {suffix for suffix in layers if any(matches(n, suffix) for n in structure.layers[name])} == {
            *layers
        }
        assert all(any(matches(n, suffix) for suffix in layers) for n in structure.layers[name]), name
    if kind == "clip":
        assert len(structure.layers["full"]) == 2 * 6 and len(structure.layers["nufilt"]) == 2 * 5
    else:  # the encoder has no attention to an encoder
        assert len(structure.stacks) == 2 and len(structure.memory) == 2 * 2


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_suffixes_of_a_set_select_its_layers_and_no_others(kind):
    model = built(kind)
    task = tasks.of(model)
    structure = task.structure(model)
    tower = model.get_submodule(task.tower(model))
    linear = [
        n
        for n, module in tower.named_modules()
        if isinstance(module, nn.Linear) or "Conv1D" in type(module).__name__
    ]
    for name, suffixes in structure.sets.items():
        chosen = {n for n in linear if any(matches(n, suffix) for suffix in suffixes)}
        assert chosen == set(structure.layers[name]), name


def test_swin_has_blocks_in_stages_and_bart_a_decoder_that_sees_its_encoder():
    model = built("swin")
    structure = tasks.of(model).structure(model)
    layers = structure.layers["attention"]
    assert len(layers) == 2 * 2 * 4 and all(".attention." in layer for layer in layers)
    model = built("bart")
    structure = tasks.of(model).structure(model)
    assert [stack.parent for stack in structure.stacks] == ["model.encoder", "model.decoder"]
    assert {layer.rpartition(".")[2] for layer in structure.memory} == {"k_proj", "v_proj"}
    assert all("encoder_attn" in layer for layer in structure.memory)


def without(kind, method):
    """Whether a method has nothing to work on in this kind of model."""
    return method == "wemoe" and kind in ("mixtral", "qwen3_moe")


def cases():
    """Kinds with blocks of their own with all methods, those alike with every third in turn, so that each
    method meets a third of them; one kind with all methods, and one method with unlike kinds, in the plain
    run.
    """
    for kind in ARCHITECTURES:
        for place, method in enumerate(METHODS):
            if kind in ALIKE and (place + ALIKE.index(kind)) % 3:
                continue
            plain = kind == "llama" or (method == "mingle" and kind in UNLIKE)
            yield pytest.param(kind, method, marks=[] if plain else pytest.mark.slow, id=f"{kind}-{method}")


@pytest.mark.parametrize(("kind", "method"), list(cases()))
def test_a_method_merges_goes_on_after_loading_answers_and_leaves(kind, method, tmp_path):
    base = built(kind)
    base.save_pretrained(tmp_path / "base")
    tuned = [moved(base, seed) for seed in (1, 2, 3)]
    tuned[0].save_pretrained(tmp_path / "one")
    if without(kind, method):
        with pytest.raises(ValueError, match="no linear layers in the set 'mlp' that can take experts"):
            mingle.Merger(tmp_path / "base", method)
        return
    merger = mingle.Merger(tmp_path / "base", method, **options(method))
    given = samples(merger.task, base)
    merger.add("one", tmp_path / "one", given)
    merger.add("two", tuned[1], given)
    merger.save_pretrained(tmp_path / "merged")
    again = mingle.Merger.from_pretrained(tmp_path / "merged")
    for each in (merger, again):
        each.add("three", tuned[2].state_dict(), given)
    state = again.model.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in merger.model.state_dict().items())
    labelled = samples(merger.task, base, labelled=True)
    assert 0 <= again.evaluate(dict.fromkeys(again.task_names, labelled)).acc <= 100
    plain = not isinstance(again.method, GatedMethod)
    again.export(
        tmp_path / "exported",
        None if plain and not again.method.per_task and not again.task.heads(base) else "two",
    )
    assert names_in(tmp_path / "exported") == names_in(tmp_path / "base")
    exported = type(base).from_pretrained(tmp_path / "exported").state_dict()
    if plain:
        wanted = again.model_for("two").state_dict()
        assert all(torch.equal(tensor, exported[name]) for name, tensor in wanted.items())


@each_kind
def test_plain_formulas_give_the_merged_weights(kind):
    base = built(kind)
    tuned = [moved(base, seed) for seed in (1, 2)]
    task = tasks.of(base)
    tower = [model.get_submodule(task.tower(model)).state_dict() for model in (base, *tuned)]
    heads = set(task.heads(base))
    expected = {
        "average": lambda zero, one, two: (one + two) / 2,
        "task-arithmetic": lambda zero, one, two: zero + 0.3 * ((one - zero) + (two - zero)),
    }
    for method, formula in expected.items():
        merger = mingle.Merger(base, method)
        for i, model in enumerate(tuned):
            merger.add(str(i), model)
        for name, merged in merger.method.tower.state_dict().items():
            if f"{task.tower(base)}.{name}".removeprefix(".") not in heads and merged.is_floating_point():
                torch.testing.assert_close(merged, formula(*(state[name] for state in tower)))
