"""Heads made of class names, and labels, that cannot tell classes apart."""

from __future__ import annotations

import pytest
import torch
from image_folders import clip_copy
from transformers import CLIPModel, CLIPTokenizer

from mingle.tasks.clip import ClipTask, zero_shot_head
from mingle.tasks.tokenizer import clip_tokenizer


@pytest.fixture
def base(tmp_path):
    return clip_copy(tmp_path / "base")


def test_equal_class_embeddings_are_an_error_that_names_the_classes(base):
    model, tokenizer = CLIPModel.from_pretrained(base).eval(), clip_tokenizer(base)
    with pytest.raises(ValueError, match="the classes 'alpha' and 'Alpha' are the same tokens"):
        zero_shot_head(model, tokenizer, ["beta", "alpha", "Alpha"], ["a {}."])
    torch.nn.init.zeros_(model.text_model.embeddings.token_embedding.weight)
    torch.nn.init.zeros_(model.text_model.embeddings.position_embedding.weight)
    with pytest.raises(ValueError, match=r"class 'alpha' and class 'beta' are equal.*\(3 of 3"):
        zero_shot_head(model, tokenizer, ["alpha", "beta", "gamma"], ["a {}."])
    torch.nn.init.constant_(model.text_projection.weight, float("nan"))
    with pytest.raises(ValueError, match="text_embeds of class 'alpha': not finite"):
        zero_shot_head(model, tokenizer, ["alpha", "beta"], ["a {}."])


def test_the_two_token_vocabulary_of_an_empty_folder_never_gives_a_head(base, tmp_path):
    """What transformers makes where there is no file, passed in by hand."""
    (tmp_path / "empty").mkdir()
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="knows no part of 'a alpha.'"):
        zero_shot_head(CLIPModel.from_pretrained(base), tokenizer, ["alpha", "beta"], ["a {}."])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text_embeds": torch.tensor([[1.0, 0], [0, 1], [1, 0]])}, "class 0 and class 2 are equal"),
        ({"text_embeds": torch.tensor([[1.0, 0], [torch.inf, 1]])}, "class 1: not finite"),
        ({"labels": torch.tensor([0, 2, 1])}, "labels: 2 at row 1, and there are 2 classes"),
        ({"labels": torch.tensor([0, -1, 1])}, "labels: -1 at row 1"),
        ({"labels": torch.tensor([[0], [1], [1]])}, r"labels \[3, 1\]: expected \[3\]"),
        ({"labels": torch.tensor([0, 1])}, r"labels \[2\]: expected \[3\]"),
    ],
)
def test_samples_with_impossible_classes_are_refused(changed, message):
    good = {
        "pixel_values": torch.zeros(3, 3, 4, 4),
        "text_embeds": torch.eye(2),
        "labels": torch.tensor([0, 1, 1]),
    }
    ClipTask().data(good)
    with pytest.raises(ValueError, match=message):
        ClipTask().data(good | changed)
