"""Fine-tuned models with new tokens: refused by name, or merged in the rows that the base has too."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import yaml
from merge_files import merge_file
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import mingle
from mingle.cli import main
from mingle.io.files import CheckpointError
from mingle.io.state_dicts import IncompatibleModel
from mingle.io.tokens import tokens
from mingle.runs.check import check
from mingle.runs.config import load

TOKENS = 24
SIZES = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
NEW = {"<tool>": TOKENS, "</tool>": TOKENS + 1}


def llama(rows=TOKENS, tied=False):
    return LlamaForCausalLM(LlamaConfig(vocab_size=rows, tie_word_embeddings=tied, **SIZES)).eval()


def moved(model, rows):
    """A fine-tuned copy with as many rows of embeddings as asked for."""
    tuned = copy.deepcopy(model)
    tuned.resize_token_embeddings(rows)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return tuned


def with_tokenizer(folder, added=None):
    """A tokenizer.json in which words have numbers, and in a file of their own the tokens that were added."""
    words = {f"word{i}": i for i in range(TOKENS)}
    content = {"version": "1.0", "model": {"type": "WordLevel", "vocab": words, "unk_token": "word0"}}
    listed = [{"id": number, "content": token} for token, number in (added or {}).items()]
    (folder / "tokenizer.json").write_text(json.dumps(content | {"added_tokens": listed}))
    return folder


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request):
    return llama(tied=request.param)


@pytest.fixture
def folders(base, tmp_path):
    """The base's, and that of a fine-tuned model with two new tokens and rows up to a multiple of eight."""
    base.save_pretrained(tmp_path / "base")
    tuned = moved(base, 32)
    tuned.save_pretrained(tmp_path / "tuned")
    with_tokenizer(tmp_path / "base")
    with_tokenizer(tmp_path / "tuned", NEW)
    return tmp_path / "base", tmp_path / "tuned", tuned


def common(model, base):
    """The fine-tuned model's state without what the base does not have."""
    state = base.state_dict()
    return {name: t[tuple(map(slice, state[name].shape))] for name, t in model.state_dict().items()}


@pytest.mark.parametrize("form", ["folder", "module", "state"])
def test_new_tokens_are_refused_and_named_where_they_have_names(folders, form):
    base, tuned, model = folders
    given = {"folder": tuned, "module": model, "state": model.state_dict()}[form]
    names = " with the tokens '<tool>', '</tool>'" if form == "folder" else ""
    with pytest.raises(IncompatibleModel, match=rf"than the base's: rows 24 to 31{names}; with vocabulary"):
        mingle.Merger(base, "average").add("one", given)


@pytest.mark.parametrize("form", ["folder", "module", "state"])
def test_the_common_rows_are_merged_when_asked_for(base, folders, form):
    folder, tuned, model = folders
    given = {"folder": tuned, "module": model, "state": model.state_dict()}[form]
    merger = mingle.Merger(folder, "average", vocabulary="base")
    report = merger.add("one", given)
    assert report.notes[0].startswith("not in the base's vocabulary and left out: rows 24 to 31")
    wanted = common(model, base)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in merger.model.state_dict().items())
    assert merger.model.config.vocab_size == TOKENS


def test_later_models_get_what_the_first_one_got(folders, tmp_path):
    base, tuned, _ = folders
    merger = mingle.Merger(base, "average", vocabulary="base")
    merger.add("one", tuned)
    merger.save_pretrained(tmp_path / "merged")
    again = mingle.Merger.from_pretrained(tmp_path / "merged")
    assert again.vocabulary == "base"
    again.add("two", tuned)
    manifest = tmp_path / "merged" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"vocabulary": "bass"}))
    with pytest.raises(CheckpointError, match="vocabulary 'bass'; did you mean 'base'"):
        mingle.Merger.from_pretrained(tmp_path / "merged")


def test_commands_know_the_key(folders, tmp_path):
    base, tuned, _ = folders
    path = merge_file(tmp_path, base, {"one": tuned}, "average")
    with pytest.raises(IncompatibleModel, match="'one' .*the tokens '<tool>', '</tool>'"):
        check(load(path))
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"vocabulary": "base"}))
    plan = check(load(path), tmp_path / "merged")
    assert any("'<tool>'" in line for line in plan.left["one"])
    assert main(["merge", str(path), "--out", str(tmp_path / "merged")]) == 0
    assert main(["add", str(tmp_path / "merged"), "--name", "two", "--model", str(tuned)]) == 0


def test_a_merge_is_told_when_models_with_new_tokens_come_later(folders, tmp_path):
    base, tuned, _ = folders
    path = merge_file(tmp_path, base, {"one": base}, "average")
    assert main(["merge", str(path), "--out", str(tmp_path / "merged")]) == 0
    add = ["add", str(tmp_path / "merged"), "--name", "two", "--model", str(tuned)]
    assert main(add) == 2
    assert main([*add, "--vocabulary", "base"]) == 0
    assert mingle.Merger.from_pretrained(tmp_path / "merged").vocabulary == "base"


def test_new_tokens_in_rows_that_the_base_has_too_are_only_mentioned(tmp_path):
    base = llama(32)
    base.save_pretrained(tmp_path / "base")
    with_tokenizer(tmp_path / "base")
    moved(base, 32).save_pretrained(tmp_path / "tuned")
    with_tokenizer(tmp_path / "tuned", NEW)
    report = mingle.Merger(tmp_path / "base", "average").add("one", tmp_path / "tuned")
    assert report.notes == ["not in the base's vocabulary and left out: with the tokens '<tool>', '</tool>'"]


def test_a_smaller_vocabulary_is_refused(base, folders):
    folder, _, _ = folders
    for vocabulary in ("same", "base"):
        with pytest.raises(
            IncompatibleModel, match="has 20 rows and the base's 24: a vocabulary may only grow"
        ):
            mingle.Merger(folder, "average", vocabulary=vocabulary).add("one", moved(base, 20))


def test_anything_else_of_another_shape_is_refused_as_ever(base, folders, tmp_path):
    folder, tuned, _ = folders
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(9)
    save_file(tensors, tuned / "model.safetensors")
    with pytest.raises(
        IncompatibleModel, match=r"1 of another shape: model.norm.weight \[9\] instead of \[8\]"
    ):
        mingle.Merger(folder, "average", vocabulary="base").add("one", tuned)


def test_biases_of_a_vocabulary_and_towers_are_cut_too():
    torch.manual_seed(0)
    sizes = dict(encoder_layers=1, decoder_layers=1, encoder_ffn_dim=12, decoder_ffn_dim=12)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=16)
    bart = BartForConditionalGeneration(BartConfig(vocab_size=TOKENS, d_model=8, **sizes, **heads))
    bert = BertForSequenceClassification(BertConfig(vocab_size=TOKENS, **SIZES))
    for base in (bart, bert):
        tuned = moved(base, TOKENS + 3)
        merger = mingle.Merger(base, "average", vocabulary="base")
        merger.add("one", tuned)
        wanted = common(tuned, base)
        assert all(torch.equal(t, wanted[name]) for name, t in merger.model_for("one").state_dict().items())


def test_an_unknown_word_is_refused(base):
    with pytest.raises(
        ValueError, match="vocabulary 'bass'; did you mean 'base'.*expected one of same, base"
    ):
        mingle.Merger(base, "average", vocabulary="bass")


def test_tokens_are_read_from_every_file_that_names_them(tmp_path):
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    assert tokens(tmp_path) == {0: "a", 1: "b"}
    (tmp_path / "added_tokens.json").write_text('{"<x>": 2}')
    decoder = {"3": {"content": "<y>"}, "4": "not a token", "five": {"content": "<z>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    assert tokens(tmp_path) == {0: "a", 1: "b", 2: "<x>", 3: "<y>"}
    unigram = {"model": {"type": "Unigram", "vocab": [["p", -1.0], ["q", -2.0]]}, "added_tokens": [7]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram))
    assert tokens(tmp_path)[1] == "q"
    (tmp_path / "tokenizer.json").write_text("{")
    assert tokens(tmp_path)[1] == "b"
