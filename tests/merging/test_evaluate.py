"""What is measured: accuracy, rank correlation, and which tokens count in the gates' means."""

from __future__ import annotations

import pytest
import torch

from mingle.merging.evaluate import score, spearman


def test_accuracy_is_the_mean_of_right_answers():
    assert score(torch.tensor([1.0, 0.0, 1.0, 1.0]), "accuracy") == 75


def test_spearman_by_hand():
    x, y = torch.tensor([3.0, 1.0, 2.0, 2.0, 9.0]), torch.tensor([30.0, -1.0, 7.0, 5.0, 31.0])
    ranks_x, ranks_y = torch.tensor([3.0, 0.0, 1.5, 1.5, 4.0]), torch.tensor([3.0, 0.0, 2.0, 1.0, 4.0])
    expected = torch.corrcoef(torch.stack([ranks_x, ranks_y]))[0, 1].item()
    assert spearman(x, y) == pytest.approx(expected, abs=1e-7)
    assert score(torch.stack([x, y], 1), "spearman") == pytest.approx(100 * expected, abs=1e-5)
    assert spearman(x, -x) == pytest.approx(-1)


def test_spearman_of_answers_that_never_vary_is_zero():
    assert spearman(torch.zeros(4), torch.arange(4.0)) == 0


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="metric='f1': expected accuracy, .* or perplexity"):
        score(torch.ones(2), "f1")
