"""Sentence encoders: folders of sentence-transformers and plain ones, ways of pooling, and padding."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, BertModel

import mingle
from mingle.io.files import CheckpointError
from mingle.merging.finetuned import FineTuned
from mingle.tasks.sentence_encoder import POOLINGS, SentenceEncoderTask, embed

TASK = SentenceEncoderTask()
CONFIG = BertConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=16,
)
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


@pytest.fixture(scope="module")
def base():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertModel(CONFIG).eval()


@pytest.fixture(scope="module")
def texts():
    """Token ids [4, 7] of four lengths, and their mask."""
    generator = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(5, 40, (4, 7), generator=generator), torch.ones(4, 7, dtype=torch.long)
    for row, length in enumerate((7, 5, 3, 1)):
        ids[row, length:], mask[row, length:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def folder(base, path, modules=None, pooling=None, scale=None):
    base.save_pretrained(path)
    if modules is not None:
        (path / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling/config.json").write_text(json.dumps(pooling))
    if scale is not None:
        (path / "config_sentence_transformers.json").write_text(json.dumps({"scale": scale}))
    return path


def samples(texts, seed=2):
    head = F.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)
    return {**texts, "text_embeds": head}


@pytest.mark.parametrize("mode", POOLINGS)
def test_pooling_is_read_from_the_folder_and_padding_is_not_seen(base, texts, tmp_path, mode):
    flag = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "lasttoken": "lasttoken"}[mode]
    model = TASK.load(folder(base, tmp_path / "base", MODULES, {f"pooling_mode_{flag}": True}))
    found = embed(model, texts)
    for row in range(4):
        length = int(texts["attention_mask"][row].sum())
        alone = {name: tensor[row : row + 1, :length] for name, tensor in texts.items()}
        hidden = base(**alone).last_hidden_state[0]
        pooled = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0), "lasttoken": hidden[-1]}
        torch.testing.assert_close(found[row], F.normalize(pooled[mode], dim=0), atol=1e-6, rtol=1e-5)


def test_cosines_are_multiplied_by_the_folders_scale(base, texts, tmp_path):
    plain = TASK.load(folder(base, tmp_path / "plain"))
    scaled = TASK.load(folder(base, tmp_path / "scaled", scale=50.0))
    data = TASK.data(samples(texts))
    torch.testing.assert_close(2.5 * TASK.logits(plain, data), TASK.logits(scaled, data))
    assert TASK.logits(plain, data).abs().max() <= 20


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        ([*MODULES, {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}], None, "'Dense'"),
        ([{"path": "0_Transformer", "type": "x.Transformer"}], None, "'0_Transformer'"),
        ([*MODULES, {"path": "2_Pooling", "type": "x.Pooling"}], None, "two modules 'Pooling'"),
        ([{"type": 3}], None, "a list of modules with a type and a path"),
        (
            MODULES,
            {"pooling_mode_weightedmean_tokens": True},
            "pooling_mode: pooling_mode_weightedmean_tokens",
        ),
        (MODULES, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "mean, cls"),
        (MODULES, {"pooling_mode": ["mean", "cls"]}, "pooling_mode: mean, cls"),
        (MODULES, {}, "pooling_mode: none"),
    ],
)
def test_what_cannot_be_read_is_named(base, tmp_path, modules, pooling, message):
    path = folder(base, tmp_path / "base", modules, pooling)
    with pytest.raises(CheckpointError, match=message):
        TASK.load(path)


def test_a_base_without_pooler_and_experts_with_heads(base, tmp_path, texts):
    torch.manual_seed(3)
    whole = BertForMaskedLM(CONFIG).eval()
    whole.bert.load_state_dict(base.state_dict(), strict=False)
    whole.save_pretrained(tmp_path / "base")
    tuned = copy.deepcopy(whole)
    with torch.no_grad():
        for parameter in tuned.bert.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path / "tuned")
    merger = mingle.Merger(tmp_path / "base", "average", "sentence-encoder")
    report = merger.add("one", tmp_path / "tuned")
    merged, wanted = merger.model.state_dict(), tuned.bert.state_dict()
    assert all(torch.equal(merged[name], wanted[name]) for name in wanted)
    assert report.notes == [] or all("cls" in note for note in report.notes)
    FineTuned(tmp_path / "tuned", TASK.skeleton(tmp_path / "base"), TASK)


def test_a_sample_does_not_feel_the_padding_of_its_batch(base, texts):
    """Not even where gates see the mean of a sample and the model is called by itself."""
    merger = mingle.Merger(base, "mingle", "sentence-encoder", rank=2, steps=3, lr=0.5, batch_size=2)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    merger.add("one", tuned, samples(texts))
    together = merger.model(**texts).last_hidden_state
    for row in range(4):
        length = int(texts["attention_mask"][row].sum())
        alone = {name: tensor[row : row + 1, :length] for name, tensor in texts.items()}
        torch.testing.assert_close(
            together[row, :length], merger.model(**alone).last_hidden_state[0], atol=1e-5, rtol=1e-4
        )
    assert all(layer.token_mask is None for layer in merger.method.layers.values())
