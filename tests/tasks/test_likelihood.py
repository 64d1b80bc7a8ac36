"""What causal language models are measured by: choices by likelihood, perplexity, exact answers."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_decoders import DECODERS, merged, mixed

from mingle import tasks
from mingle.merging.evaluate import accuracy, score
from mingle.tasks import likelihood
from mingle.tasks.likelihood import choice_likelihoods

TASK = tasks.get("causal-lm")


def choices(n=4, count=3, longest=4):
    """Choices of one to four tokens, filled up with −100."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 96, (n, count, longest), generator=generator)
    lengths = torch.randint(1, longest + 1, (n, count, 1), generator=generator)
    return tokens.where(torch.arange(longest) < lengths, -100)


def one_by_one(model, inputs, options):
    """Log-likelihoods of choices [n, K] from the model's own logits, without batches, padding or a cache."""
    rows = []
    for ids, mask, row in zip(inputs["input_ids"], inputs["attention_mask"], options, strict=True):
        prompt, values = ids[mask.bool()], []
        for tokens in row:
            tokens = tokens[tokens >= 0]
            whole = torch.cat([prompt, tokens])[None]
            data = TASK.data(
                {"input_ids": whole, "answer_mask": (torch.arange(whole.shape[1]) >= len(prompt))[None]}
            )
            with torch.no_grad():
                logits = TASK.logits(model, data)[0, len(prompt) - 1 :]
            values.append(logits.log_softmax(-1).gather(1, tokens[:, None]).sum())
        rows.append(torch.stack(values))
    return torch.stack(rows).double()


@pytest.mark.parametrize("method", ["mingle", "routed"])
@pytest.mark.parametrize("name", DECODERS)
def test_choices_have_the_likelihood_that_they_have_alone(name, method, monkeypatch):
    model, inputs, options = merged(name, method).model, mixed(name), choices()
    expected = one_by_one(model, inputs, options)
    data = TASK.data({**inputs, "choices": options})
    for _ in range(2):
        sums, lengths = choice_likelihoods(TASK, model, data)
        torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-3)
        assert torch.equal(lengths, (options >= 0).sum(2).double())
        monkeypatch.setattr(likelihood, "_from_cache", lambda *_: None)


def test_the_likeliest_choice_counts_with_or_without_its_length():
    merger, inputs, options = merged("llama", "mingle"), mixed("llama"), choices()
    sums = one_by_one(merger.model, inputs, options)
    best, best_per_token = sums.argmax(1), (sums / (options >= 0).sum(2)).argmax(1)
    assert not torch.equal(best, best_per_token)
    for metric, right in (("accuracy", best), ("accuracy-per-token", best_per_token)):
        data = TASK.data({**inputs, "choices": options, "labels": right, "metric": metric})
        assert accuracy(TASK, merger.model, data) == 100
        wrong = TASK.data({**inputs, "choices": options, "labels": (right + 1) % 3, "metric": metric})
        assert accuracy(TASK, merger.model, wrong) == 0


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("method", ["mingle", "routed"])
def test_perplexity_is_that_of_the_tokens_that_count(marked, method, monkeypatch):
    model, inputs = merged("gemma2", method).model, mixed("gemma2")
    if marked:
        inputs["answer_mask"] = (torch.arange(9) >= 6).expand(4, -1)
    data, total, count = TASK.data({**inputs, "metric": "perplexity"}), 0.0, 0
    for row in range(4):
        own = inputs["attention_mask"][row].bool()
        alone = TASK.data({key: tensor[row : row + 1, own] for key, tensor in inputs.items()})
        with torch.no_grad():
            logs = TASK.logits(model, alone)[0].log_softmax(-1)
        values = logs.gather(1, alone.inputs["input_ids"][0, 1:, None])[:, 0][TASK.valid(alone)[0]]
        total, count = total + values.sum().item(), count + len(values)
    perplexity = math.exp(-total / count)
    assert accuracy(TASK, model, data) == pytest.approx(100 / perplexity, rel=1e-4)
    monkeypatch.setattr(TASK.__class__, "vocabulary", lambda *_: None)
    assert accuracy(TASK, model, data) == pytest.approx(100 / perplexity, rel=1e-4)


def test_a_perplexity_that_rises_is_a_score_that_falls():
    before, after = (torch.tensor([[-2.0 * factor, 2.0], [-4.0 * factor, 4.0]]) for factor in (1, 2))
    assert score(before, "perplexity") == pytest.approx(100 / math.e)
    assert score(after, "perplexity") < score(before, "perplexity")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(metric="perplexety"), "metric='perplexety'; did you mean 'perplexity'"),
        (dict(metric="accuracy-per-token"), "compares 'choices', and these samples have none"),
        (dict(choices=torch.ones(4, 2)), "choices \\[4, 2\\] of torch.float32: expected token ids"),
        (dict(choices=torch.full((4, 2, 3), -100)), "expected one token or more in each"),
        (dict(choices=torch.tensor([[[5, -100, 6]]]).expand(4, 2, 3)), "and −100 behind them"),
        (dict(choices=torch.ones(4, 2, 3).long(), labels=torch.tensor([0, 1, 2, 0])), "which of 2 choices"),
    ],
)
def test_samples_that_cannot_be_measured_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        TASK.data({**mixed("llama"), **given})
