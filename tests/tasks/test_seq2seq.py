"""Flan-T5: padding counts nowhere, decoders see no future, answers are generated, and every method merges."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from few_methods import each_method
from small_merges import SETTINGS, same_bits
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

import mingle
from mingle.adaptation import input_directions
from mingle.adaptation.losses import distillation_loss
from mingle.io.files import CheckpointError
from mingle.io.state_dicts import IncompatibleModel
from mingle.merging.evaluate import accuracy
from mingle.merging.finetuned import FineTuned
from mingle.methods import METHODS
from mingle.nn.linear import MingleLinear
from mingle.tasks import TaskData
from mingle.tasks.seq2seq import Seq2SeqTask

PAD, EOS = 0, 1
CHEAP = dict(steps=2, rank=4, later_rank=2, batch_size=4, r_p=4, r_v=2, r_l=4, depths=(0, 1), lr=1e-2)
TASK = Seq2SeqTask()


@pytest.fixture(scope="module")
def base():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
            decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=EOS,
        )  # fmt: skip
        model = T5ForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        return model


@pytest.fixture(scope="module")
def tuned(base):
    generator, models = torch.Generator().manual_seed(1), []
    for _ in range(3):
        model = copy.deepcopy(base)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2 and "shared" not in name and "embed" not in name:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        models.append(model)
    return models


def prompts(n, seed=3, width=9):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 60, (n, width), generator=generator)
    lengths = torch.randint(3, width + 1, (n,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]).long()
    return TaskData({"input_ids": ids * mask, "attention_mask": mask})


def wider(data, extra):
    """The same samples with more padding."""
    inputs = {
        name: torch.nn.functional.pad(tensor, (0, extra))
        for name, tensor in data.inputs.items()
        if not name.startswith("decoder")
    }
    for name in ("decoder_input_ids", "decoder_attention_mask"):
        if name in data.inputs:
            inputs[name] = torch.nn.functional.pad(data.inputs[name], (0, 2))
    return TaskData(inputs)


def merge(base, tuned, method="mingle", count=2, **options):
    known = {
        name: value
        for name, value in (CHEAP | options).items()
        if name in METHODS[method].Options.__dataclass_fields__
    }
    merger = mingle.Merger(base, method, "t5", **known)
    for i in range(count):
        merger.add(f"task{i}", tuned[i], prompts(8, seed=10 + i))
    return merger


def test_padding_changes_neither_logits_nor_gradients_nor_directions(base, tuned):
    merger = merge(base, tuned)
    seeds = TASK.prepared(lambda: tuned[1], prompts(6))
    runs = []
    for data in (seeds, wider(seeds, 5)):
        merger.model.zero_grad()
        with input_directions.collected(merger.method.layers) as seen:
            logits = TASK.logits(merger.model, data)
        valid, length = TASK.valid(data), seeds.inputs["decoder_input_ids"].shape[1]
        distillation_loss(logits, torch.zeros_like(logits), 2.0, valid).backward()
        gradients = {name: layer.gate_weight.grad.clone() for name, layer in merger.method.layers.items()}
        statistics = {
            name: directions.statistic / directions.statistic.norm() for name, directions in seen.items()
        }
        runs.append((torch.where(valid.unsqueeze(2), logits, 0)[:, :length], gradients, statistics))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-3, atol=1e-5)


def test_what_is_injected_sees_tokens_in_decoders_and_samples_in_encoders(base, tuned):
    layers = merge(base, tuned, count=1).method.layers
    assert len(layers) == 2 * 6 + 2 * 10
    for name, layer in layers.items():
        encoder = name.startswith("encoder") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        assert layer.reduce == ("sample" if encoder else "token"), name


@pytest.mark.parametrize("method", ["mingle", "mingle-light", "routed", "wemoe", "nufilt"])
def test_the_first_t5_has_one_inner_matrix(method):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=PAD
        )
        base = T5ForConditionalGeneration(config).eval()
    tuned, inner = copy.deepcopy(base), "decoder.block.0.layer.2.DenseReluDense.wi"
    with torch.no_grad():
        tuned.get_submodule(inner).weight.add_(0.05)
    merger = merge(base, [tuned], method, count=1)
    if method == "nufilt":  # the first task is just added
        torch.testing.assert_close(
            merger.model.get_submodule(inner).weight, tuned.get_submodule(inner).weight
        )
    else:
        expert = merger.method.layers[inner].experts()[0].delta()
        torch.testing.assert_close(expert, torch.full_like(expert, 0.05), rtol=1e-3, atol=1e-5)


def test_later_tokens_of_an_answer_change_nothing_before_them(base, tuned):
    merger, data = merge(base, tuned), TASK.prepared(lambda: tuned[0], prompts(4))
    changed = data.inputs["decoder_input_ids"].clone()
    changed[:, 4:] = 7
    with torch.no_grad():
        before = TASK.logits(merger.model, data)
        after = TASK.logits(merger.model, TaskData({**data.inputs, "decoder_input_ids": changed}))
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("method", ["mingle", "routed"])
def test_generation_does_not_depend_on_the_cache_nor_on_the_batch(base, tuned, method):
    merger, data = merge(base, tuned, method), prompts(5)
    inputs = dict(input_ids=data.inputs["input_ids"], attention_mask=data.inputs["attention_mask"])
    whole = TASK._answers(merger.model, data)
    assert len(whole.unique()) > 3
    merger.model.generation_config.use_cache = False
    uncached = TASK._answers(merger.model, data)
    assert torch.equal(whole, uncached)
    merger.model.generation_config.use_cache = True
    for i in range(5):
        one = TASK._answers(merger.model, wider(TaskData({k: v[i : i + 1] for k, v in inputs.items()}), 3))[0]
        expected = whole[i]
        assert torch.equal(one[one != PAD], expected[expected != PAD])


def test_prepared_seeds_follow_the_teachers_answers(tuned):
    seeds = TaskData(prompts(6).inputs, {}, torch.full((6, 3), 5))
    data = TASK.prepared(lambda: tuned[0], seeds)
    assert data.labels is None
    answers = TASK._answers(tuned[0], seeds)
    given, valid = data.inputs["decoder_input_ids"], TASK.valid(data)
    assert torch.equal(given, answers[:, :-1])
    with torch.no_grad():
        greedy = TASK.logits(tuned[0], data).argmax(-1)
    assert torch.equal(greedy[valid], answers[:, 1:][valid])
    for row, mask in zip(answers, valid, strict=True):
        ended = (row[1:] == EOS).nonzero()
        assert mask.sum() == (ended[0, 0] + 1 if len(ended) else len(row) - 1)


def test_distillation_averages_over_valid_tokens():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    total = 0.0
    for i, j in valid.nonzero().tolist():
        p = (teacher[i, j] / 2).exp() / (teacher[i, j] / 2).exp().sum()
        q = (student[i, j] / 2).exp() / (student[i, j] / 2).exp().sum()
        total -= (p * q.log()).sum()
    torch.testing.assert_close(distillation_loss(student, teacher, 2.0, valid), total / 3)


def test_answers_are_compared_up_to_their_end(tuned):
    data = prompts(6)
    answers = TASK._answers(tuned[0], data)[:, 1:]
    ended = (answers == EOS).cumsum(1) > 0
    behind = torch.where(ended & (answers != EOS), 9, answers)  # whatever follows the end
    right = TaskData(data.inputs, {}, behind)
    assert torch.equal(TASK.outcomes(tuned[0], right), torch.ones(6, dtype=torch.float64))
    wrong = right.labels.clone()
    wrong[0, 0] = (wrong[0, 0] + 1) % 60 + 2
    assert TASK.outcomes(tuned[0], TaskData(data.inputs, {}, wrong)).tolist()[0] == 0
    assert accuracy(TASK, tuned[0], right, batch_size=4) == 100


def test_numbers_are_correlated_and_other_text_counts_as_zero(tuned):
    data = prompts(4)
    texts = {False: ["1.5", "nonsense", "3", "nan"], True: ["1", "0.5", "2", "0.1"]}
    calls = iter([False, True])
    labelled = TaskData(
        data.inputs, {}, torch.full((4, 2), 5), metric="spearman", decode=lambda tokens: texts[next(calls)]
    )
    outcomes = TASK.outcomes(tuned[0], labelled)
    assert outcomes.tolist() == [[1.5, 1.0], [0.0, 0.5], [3.0, 2.0], [0.0, 0.1]]
    with pytest.raises(ValueError, match="need `decode`"):
        TASK.outcomes(tuned[0], TaskData(data.inputs, {}, labelled.labels, metric="spearman"))


@each_method([name for name in METHODS if name != "individual"])
def test_every_method_merges_saves_and_resumes(base, tuned, method, tmp_path):
    whole = merge(base, tuned, method)
    merge(base, tuned, method, count=1).save_pretrained(tmp_path / "one")
    resumed = mingle.Merger.from_pretrained(tmp_path / "one")
    resumed.add("task1", tuned[1], prompts(8, seed=11))
    same_bits(whole.model.state_dict(), resumed.model.state_dict())
    with torch.no_grad():
        data = TASK.prepared(lambda: tuned[0], prompts(4))
        assert torch.equal(TASK.logits(whole.model, data), TASK.logits(resumed.model, data))
    if method not in ("pre-trained", "routed"):
        assert any(
            not torch.equal(v, base.state_dict()[k])
            for k, v in whole.model.state_dict().items()
            if k in base.state_dict()
        ) or any(isinstance(m, MingleLinear) and m.num_experts == 2 for m in whole.model.modules())


def test_methods_that_only_read_prompts_have_no_answers_generated(base, tuned, monkeypatch):
    asked, answers = [], Seq2SeqTask._answers
    monkeypatch.setattr(
        Seq2SeqTask,
        "_answers",
        lambda self, model, data: (asked.append(len(data)), answers(self, model, data))[1],
    )
    merge(base, tuned, "routed")
    assert asked == []
    merge(base, tuned, "mingle")
    assert len(asked) == 2


def test_a_lora_adapter_is_a_fine_tuned_model(base, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(base), config)
    adapted.save_pretrained(tmp_path / "lora")
    merger = mingle.Merger(base, "average", "t5")
    merger.add("lora", tmp_path / "lora")
    expected = adapted.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(
            TASK.logits(merger.model, prompts(3)), TASK.logits(expected, prompts(3)), rtol=1e-4, atol=1e-4
        )
    expert = mingle.Merger(base, "mingle", "t5", rank=4, gates="static", static_coefficient=1.0)
    expert.add("lora", tmp_path / "lora", prompts(4))
    with torch.no_grad():
        torch.testing.assert_close(
            TASK.logits(expert.model, prompts(3)), TASK.logits(expected, prompts(3)), rtol=1e-3, atol=1e-3
        )


def test_a_lora_adapter_of_other_layers_is_refused(base, base_model, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(base_model), config).save_pretrained(tmp_path / "lora")
    with pytest.raises(
        IncompatibleModel, match=r"task 'x': .*the adapter's layer '.*fc1' is not in the base"
    ):
        mingle.Merger(base, "average", "t5").add("x", tmp_path / "lora")
    with pytest.raises(IncompatibleModel, match="is not in the base"):
        FineTuned(tmp_path / "lora", base, TASK)


def test_folders_in_hub_format(base, tuned, tmp_path):
    base.save_pretrained(tmp_path / "base")
    tuned[0].save_pretrained(tmp_path / "tuned")
    FineTuned(tmp_path / "tuned", TASK.skeleton(tmp_path / "base"), TASK)
    merger = mingle.Merger(tmp_path / "base", "average", "t5")
    merger.add("one", tmp_path / "tuned")
    same_bits(merger.model.state_dict(), tuned[0].state_dict())
    with pytest.raises(
        CheckpointError, match="config.json: model_type: transformers has no 't5' with two towers"
    ):
        mingle.Merger(tmp_path / "base", "average", "clip")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": torch.ones(2, 3)}, "need 'attention_mask'"),
        ({"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 4)}, "expected \\[n, S\\] for both"),
        (
            {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3), "labels": torch.ones(2)},
            "tokens of 2 answers",
        ),
    ],
)
def test_bad_samples_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        TASK.data(given)


def test_an_answer_may_start_with_the_token_that_ends_it():
    """As in BART."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, d_model=32, max_position_embeddings=40, forced_eos_token_id=None)
    layers = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))
    }
    base = BartForConditionalGeneration(BartConfig(**sizes, **layers)).eval()
    assert base.config.decoder_start_token_id == base.config.eos_token_id
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    seeds = {"input_ids": torch.randint(4, 60, (6, 5)), "attention_mask": torch.ones(6, 5).long()}
    prepared = TASK.prepared(lambda: tuned, TaskData(seeds))
    counted, given = TASK.valid(prepared), prepared.inputs["decoder_input_ids"]
    assert counted[:, 0].all()
    assert not counted[:, 1:][given[:, 1:] == base.config.eos_token_id].any()
    merger = mingle.Merger(base, "mingle", **SETTINGS)
    trace = merger.add("one", tuned, seeds).trace
    assert all(math.isfinite(loss) for loss in trace.loss)
