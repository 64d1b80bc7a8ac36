"""Answers of many positions: losses over states are those over whole logits, and take far less memory."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import transformers
from live_memory import peak_bytes
from tiny_decoders import CONFIGS, built, prompts, tuned

import mingle
from mingle import tasks
from mingle.adaptation import answers
from mingle.adaptation.answers import Compact
from mingle.adaptation.losses import distillation, distillation_loss, entropy, entropy_loss
from mingle.adaptation.teacher import teacher_answers
from mingle.nn.early_stop import run_until
from mingle.tasks.vocabulary import find_vocabulary


@pytest.fixture
def always(monkeypatch):
    """Whole logits of any size are too large, and only a few positions fit at a time."""
    monkeypatch.setattr(answers, "BUDGET", 0)
    monkeypatch.setattr(answers, "CHUNK", 4 * 96 * 3)


def model_of(name):
    config = CONFIGS[name]()
    if name == "gemma2":
        config.final_logit_softcapping = 3.0
    model = built(config)
    if name == "bart":
        with torch.no_grad():
            model.final_logits_bias.normal_()
    return model


HEADS = {
    "llama": lambda: model_of("llama"),
    "a cap": lambda: model_of("gemma2"),
    "a bias": lambda: model_of("bart"),
    "an encoder": lambda: model_of("mt5"),
    "a scale before": lambda: built(
        transformers.T5Config(
            vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=2,
        )
    ),
    "a scale": lambda: built(
        transformers.CohereConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            logit_scale=0.25, pad_token_id=0, eos_token_id=2, bos_token_id=1,
        )
    ),
    "a divisor": lambda: built(
        transformers.GraniteConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            logits_scaling=4.0, pad_token_id=0,
        )
    ),
    "a projection": lambda: built(
        transformers.OPTConfig(
            vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4,
            word_embed_proj_dim=16, pad_token_id=0,
        )
    ),
}  # fmt: skip


def seeds_of(model, n=5):
    """A task type, a fine-tuned model and samples with its answers."""
    task, teacher = tasks.of(model), tuned(model, 1)
    seeds = task.data(prompts("bart" if model.config.is_encoder_decoder else "llama", 0, n))
    return task, teacher, task.prepared(lambda: teacher, seeds)


@pytest.mark.parametrize("kind", HEADS)
def test_losses_and_gradients_are_those_of_whole_logits(kind, always):
    model = HEADS[kind]()
    task, teacher, seeds = seeds_of(model)
    index, valid = torch.tensor([3, 0, 4]), task.valid(seeds)[[3, 0, 4]]
    batch, learning = seeds.select(index), [p for p in model.parameters() if p.requires_grad]
    compact = Compact.of(task, model, seeds)
    learnt = distillation(lambda samples: teacher_answers(task, teacher, samples, 2), 2.0)(seeds)
    wanted = task.logits(teacher, batch).detach()
    for loss, expected in (
        (learnt, lambda logits: distillation_loss(logits, wanted, 2.0, valid)),
        (entropy(seeds), lambda logits: entropy_loss(logits, valid)),
    ):
        found = loss(compact.states(batch), index, valid)
        whole = expected(task.logits(model, batch))
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
        one, other = (
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(value, learning, allow_unused=True)
                    if g is not None
                ]
            )
            for value in (found, whole)
        )
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.abs().max()))


def test_the_head_sees_only_what_counts_and_never_much(always):
    model = HEADS["llama"]()
    task, teacher, seeds = seeds_of(model)
    seen = []
    head = model.get_output_embeddings()
    loss = distillation(lambda samples: teacher_answers(task, teacher, samples, 2), 2.0)(seeds)
    compact = Compact.of(task, model, seeds)
    head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:-1].numel()))
    loss(compact.states(seeds), torch.arange(5), task.valid(seeds))
    assert sum(seen) == task.valid(seeds).sum() < task.valid(seeds).numel()
    assert max(seen) <= 5 * 32 * 32 // 96


@pytest.mark.parametrize("method", ["mingle", "wemoe", "adamerging"])
@pytest.mark.parametrize("name", ["llama", "mt5"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_merges_are_those_of_whole_logits(name, method, precision, monkeypatch):
    if method == "adamerging" and precision == "bf16":
        pytest.skip("it computes in the base's own precision")
    losses, settings = [], {} if method == "adamerging" else {"rank": 4, "precision": precision}
    base = built(CONFIGS[name]())
    for budget in (2**40, 0):
        monkeypatch.setattr(answers, "BUDGET", budget)
        monkeypatch.setattr(answers, "CHUNK", 4 * 96 * 3)
        merger = mingle.Merger(base, method, steps=3, lr=1e-2, batch_size=4, **settings)
        report = merger.add("a", tuned(base, 1), prompts(name, 0))
        assert report.trace.loss[-1] != report.trace.loss[0]
        losses.append(report.trace.loss if precision == "fp32" else report.trace.loss[:1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if precision == "bf16" else 1e-4)


def test_small_vocabularies_have_whole_logits():
    model = HEADS["llama"]()
    task, teacher, seeds = seeds_of(model)
    assert Compact.of(task, model, seeds) is None
    assert isinstance(teacher_answers(task, teacher, seeds, 2), torch.Tensor)


def test_of_the_teacher_only_the_head_is_kept(always):
    model = HEADS["a bias"]()
    task, teacher, seeds = seeds_of(model)
    states = teacher_answers(task, teacher, seeds, 2)
    parts = [weakref.ref(module) for module in teacher.modules() if module is not teacher.lm_head]
    head = weakref.ref(teacher.lm_head)
    del teacher
    gc.collect()
    assert not any(part() is not None for part in parts)
    assert head() is not None
    assert states.head(states.hidden[0]).shape[-1] == 96


def test_a_head_that_is_not_all_of_it_is_not_used():
    class Doubled(transformers.LlamaForCausalLM):
        """Its logits depend on more than the last hidden states."""

        def forward(self, input_ids=None, **given):
            result = super().forward(input_ids=input_ids, **given)
            result.logits = result.logits + input_ids.unsqueeze(2)
            return result

    with torch.random.fork_rng():
        model = Doubled(CONFIGS["llama"]()).eval()
    ids = torch.tensor([[5, 6, 7]])
    assert find_vocabulary(model, lambda: model(input_ids=ids, use_cache=False).logits) is not None
    several = torch.tensor([[5, 6, 7, 8]])
    calls = iter([ids, several])
    assert find_vocabulary(model, lambda: model(input_ids=next(calls), use_cache=False).logits) is None


def test_a_pass_that_ends_early_within_another_leaves_the_other_its_end():
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    inner = []

    def run():
        inner.append(run_until([layers[1]], lambda: layers(torch.zeros(2))))

    assert run_until([layers[0]], run)
    assert not inner
    assert run_until([layers[1]], lambda: run_until([layers[1]], lambda: layers(torch.zeros(2)))) is False


@pytest.mark.parametrize("method", ["mingle", "adamerging"])
def test_a_step_takes_less_memory_than_whole_logits(method):
    vocabulary, length = 40_000, 96
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0, max_position_embeddings=128,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 500, (20, length), generator=torch.Generator().manual_seed(0))
    seeds = {"input_ids": ids, "answer_mask": torch.ones_like(ids)}
    teacher = tuned(base, 1)
    task = tasks.of(base)

    def whole():
        model = copy.deepcopy(base).requires_grad_(False)
        model.model.layers[0].requires_grad_(True)
        data = task.data(seeds).select(slice(0, 16))
        task.logits(model, data).logsumexp(-1).mean().backward()

    settings = {"mingle": {"rank": 4, "k": 1}, "adamerging": {}}[method]

    def merge():
        mingle.Merger(base, method, steps=2, batch_size=16, **settings).add("a", teacher, seeds)

    assert 4 * vocabulary * length * 20 > answers.BUDGET
    assert peak_bytes(merge) < 0.7 * peak_bytes(whole)
