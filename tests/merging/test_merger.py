"""Whole small merges: the order of things, what is frozen, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from small_merges import NAMES, add, everything, merge, same_bits
from transformers import CLIPModel

import mingle
from mingle.adaptation.divergence import AdaptationDiverged
from mingle.io.merger_folder import state_hash
from mingle.nn.linear import MingleLinear
from mingle.tasks import TaskData


def test_older_gates_experts_and_base_stay_bitwise(base_model, tuned_states, samples):
    merger = merge(base_model, tuned_states, samples, count=2)
    before = {
        n: (layer.A.clone(), layer.B.clone(), *layer.all_gates()) for n, layer in merger.method.layers.items()
    }
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


@pytest.mark.parametrize("options", [{}, {"energy": 0.6}, {"gates": "all"}])
def test_a_failed_task_leaves_the_merger_as_it_was(base_model, tuned_states, samples, options):
    merger = merge(base_model, tuned_states, samples, count=1, **options)
    before = {k: v.clone() for k, v in everything(merger).items()}
    broken = {k: torch.full_like(v, 1e30) for k, v in tuned_states[1].items()}
    with pytest.raises(RuntimeError):
        merger.add("two", broken, TaskData(samples[1].inputs, samples[1].shared))
    same_bits(before, everything(merger))
    add(merger, 1, tuned_states, samples)
    same_bits(everything(merger), everything(merge(base_model, tuned_states, samples, count=2, **options)))


def test_an_absurd_learning_rate_is_told_as_divergence_and_changes_nothing(base_model, tuned_states, samples):
    merger = merge(base_model, tuned_states, samples, count=0, lr=1e35, steps=1)
    before = {k: v.clone() for k, v in everything(merger).items()}
    with pytest.raises(AdaptationDiverged, match="not finite"):
        add(merger, 0, tuned_states, samples)
    same_bits(before, everything(merger))


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
    # lr = 0 and a first expert with random gates: the inputs of the first layer are the very same, so its
    # basis must not grow
    first = "encoder.layers.0.self_attn.q_proj"
    assert merger.method.bases[first].shape[1] == 3


def test_a_saturated_layer_is_told_in_the_report(base_model, tuned_states, samples, caplog):
    merger = merge(base_model, tuned_states, samples, count=0, k=30)
    report = add(merger, 0, tuned_states, samples)
    told = "few input directions are left to later tasks in encoder.layers.0.self_attn.q_proj (2 of 32 left)"
    assert any(note.startswith(told) for note in report.notes)
    assert told in caplog.text
    add(merger, 1, tuned_states, samples)
    assert all(basis.shape[1] <= len(basis) for basis in merger.method.bases.values())


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

    from mingle.nn.inject import inject
    from mingle.tasks.structure import find_structure

    with torch.device("meta"):
        tower = CLIPVisionModel(
            CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, patch_size=32)
        )
        tower.requires_grad_(False)
        layers = inject(tower, find_structure(tower, None).sets["full"])
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
        expected.append(
            100
            * (((image @ samples[i].shared["text_embeds"].T).argmax(1)) == samples[i].labels)
            .double()
            .mean()
            .item()
        )
    assert result.matrix[1] == pytest.approx(expected)
    assert result.acc == pytest.approx(sum(expected) / 2)
    from mingle.merging.evaluate import Result

    assert Result(["a", "b", "c"], [[80.0], [70.0, 60.0], [65.0, 62.0, 50.0]]).bwt == pytest.approx(
        (-15 + 2) / 2
    )
    with pytest.raises(ValueError, match="no samples for the merged tasks two"):
        merger.evaluate({"one": samples[0]})


def test_bad_tasks_are_refused_before_anything_happens(base_model, tuned_states, samples):
    merger = merge(base_model, tuned_states, samples, count=1)
    seeds = TaskData(samples[1].inputs, samples[1].shared)
    with pytest.raises(ValueError, match="'one' is already merged"):
        merger.add("one", tuned_states[1], seeds)
    with pytest.raises(ValueError, match="'two': method 'mingle' needs seed samples"):
        merger.add("two", tuned_states[1])
    with pytest.raises(ValueError, match="need 'text_embeds'"):
        merger.add("two", tuned_states[1], {"pixel_values": samples[1].inputs["pixel_values"]})
    renamed = {k.replace("q_proj", "query"): v for k, v in tuned_states[1].items()}
    with pytest.raises(
        ValueError, match=r"(?s)'two'.*4 missing.*4 extra.*may be 'encoder.layers.0.self_attn.query"
    ):
        merger.add("two", renamed, seeds)
    cut = dict(tuned_states[1])
    cut["post_layernorm.weight"] = torch.zeros(31)
    with pytest.raises(ValueError, match=r"post_layernorm.weight \[31\] instead of \[32\]"):
        merger.add("two", cut, seeds)
    poisoned = dict(tuned_states[1])
    poisoned["post_layernorm.weight"] = torch.full((32,), float("inf"))
    with pytest.raises(
        ValueError, match=r"'two': post_layernorm.weight: 32 of 32 values are not finite, the first at \(0,\)"
    ):
        merger.add("two", poisoned, seeds)
    assert merger.task_names == ["one"]


def test_models_come_as_modules_states_or_folders(base_model, tuned_states, tuned_folders, samples):
    whole = CLIPModel(base_model.config)
    whole.load_state_dict(base_model.state_dict())
    whole.vision_model.load_state_dict(tuned_states[0])
    given = [
        whole,
        whole.vision_model,
        tuned_states[0],
        {f"vision_model.{k}": v for k, v in tuned_states[0].items()},
        tuned_folders[0],
    ]
    hashes = set()
    for model in given:
        merger = mingle.Merger(base_model, "average")
        merger.add("one", model)
        hashes.add(state_hash(merger.model))
    assert len(hashes) == 1
