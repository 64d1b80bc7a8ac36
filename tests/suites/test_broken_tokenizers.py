"""A base whose tokenizer is broken, or another model's: the file and the field are named."""

from __future__ import annotations

import json

import pytest
import torch
from image_folders import LFS, PROMPTS, change_json, clip_copy, drop, image_folder, opened, put
from transformers import CLIPConfig, CLIPModel

from mingle import suites
from mingle.io.files import CheckpointError
from mingle.suites.clip_base import ClipBase
from mingle.tasks.tokenizer import clip_tokenizer


@pytest.fixture
def base(tmp_path):
    return clip_copy(tmp_path / "base")


def split_vocabulary(base):
    """Put ``vocab.json`` and ``merges.txt`` in the place of ``tokenizer.json``."""
    model = json.loads((base / "tokenizer.json").read_text())["model"]
    (base / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (base / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]))
    (base / "tokenizer.json").unlink()


def test_vocabulary_and_merges_stand_in_for_the_whole_tokenizer(base):
    expected = ClipBase(base).head(*PROMPTS)
    split_vocabulary(base)
    ClipBase(base).check(*PROMPTS)
    assert torch.equal(ClipBase(base).head(*PROMPTS), expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "bad JSON"),
        ("{", "bad JSON: line 1"),
        (LFS, "a Git LFS pointer"),
        ("<html>not found</html>", "bad JSON"),
        ("[]", "expected dict"),
        ("{}", "has no 'model'"),
        ('{"model": {}, "model": {}}', "duplicate key 'model'"),
    ],
)
def test_a_tokenizer_json_that_is_something_else(base, content, message):
    (base / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"^{base}/tokenizer\.json: .*{message}"):
        ClipBase(base).check(*PROMPTS)


TOKENIZER_FAULTS = [
    (drop("model"), "has no 'model'"),
    (drop("added_tokens"), "has no 'added_tokens'"),
    (drop("added_tokens", 0, "id"), r"added_tokens\[0\] has no 'id'"),
    (put("added_tokens", 0, "id", "x"), r"added_tokens\[0\]: id is 'x', expected int"),
    (put("version", "2.0"), "version is '2.0'"),
    (put("comment", 1), "unknown key 'comment'"),
    (put("model", "type", "Tree"), "type is 'Tree'"),
    (drop("model", "vocab"), "vocab is None, expected dict"),
    (put("model", "vocab", {}), "vocab is empty"),
    (put("model", "vocab", ["a", "b"]), "vocab is .*, expected dict"),
    (put("model", "vocab", "!", 1.5), "vocab: '!' is 1.5, expected int"),
    (put("model", "vocab", "!", -1), "vocab: '!' is -1"),
    (put("model", "vocab", "!", True), "vocab: '!' is True"),
    (put("model", "vocab", "new", 3), "has the number 3 twice"),
    (drop("model", "vocab", "<|endoftext|>"), "unk_token is '<.endoftext.>', which is not in its vocabulary"),
    (drop("model", "merges"), "has no 'merges'"),
    (put("model", "merges", 2, "a b c"), r"merges\[2\] is 'a b c', expected two tokens"),
    (put("model", "merges", 2, [1, 2]), r"merges\[2\] is \[1, 2\]"),
    (put("model", "merges", 2, ["x", "☃"]), r"merges\[2\] needs '☃', which is not in the vocabulary"),
    (put("model", "dropout", "x"), "dropout is 'x'"),
    (put("model", "end_of_word_suffix", 3), "end_of_word_suffix is 3, expected str"),
    (put("normalizer", "NFC"), "normalizer is 'NFC', expected dict"),
    (put("normalizer", "normalizers", 0, "type", "NFX"), r"normalizer\[0\]: type is 'NFX', expected one of"),
    (drop("normalizer", "normalizers"), "normalizer has no 'normalizers'"),
    (drop("pre_tokenizer", "pretokenizers", 0, "pattern"), r"pre_tokenizer\[0\] has no 'pattern'"),
    (put("decoder", {"type": "Nothing"}), "decoder: type is 'Nothing'"),
    (drop("post_processor", "sep"), "post_processor has no 'sep'"),
    (put("truncation", {"max_length": "x"}), "truncation: max_length is 'x'"),
    (put("padding", {}), "padding has no 'strategy'"),
]


@pytest.mark.parametrize(("change", "message"), TOKENIZER_FAULTS, ids=[m for _, m in TOKENIZER_FAULTS])
def test_a_broken_tokenizer_json_is_named_with_the_field(base, change, message):
    change_json(base / "tokenizer.json", change)
    with pytest.raises(CheckpointError, match=rf"^{base}/tokenizer\.json: .*{message}"):
        ClipBase(base).check(*PROMPTS)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_broken_settings_of_the_tokenizer_are_named(base, name, content):
    (base / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"^{base}/{name}: "):
        ClipBase(base).check(*PROMPTS)


@pytest.mark.parametrize(
    "change",
    [put("unk_token", 3), put("eos_token", None), put("init_inputs", [1]), put("bos_token", {})],
)
def test_settings_that_transformers_refuses_are_our_error(base, change):
    change_json(base / "tokenizer_config.json", change)
    with pytest.raises(CheckpointError, match=r"no tokenizer can be made of tokenizer\.json"):
        ClipBase(base).check(*PROMPTS)


@pytest.mark.parametrize("length", ["x", 0, -1, [77], True])
def test_a_length_that_is_none_is_refused(base, length):
    change_json(base / "tokenizer_config.json", put("model_max_length", length))
    with pytest.raises(CheckpointError, match=rf"^{base}/tokenizer_config\.json: model_max_length is "):
        ClipBase(base).check(*PROMPTS)


def test_an_unknown_token_outside_the_vocabulary_is_refused(base):
    change_json(base / "tokenizer_config.json", put("unk_token", "<unk>"))
    with pytest.raises(CheckpointError, match=r"the unknown token '<unk>' is not in its vocabulary"):
        ClipBase(base).check(*PROMPTS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", "{}", "is empty"),
        ("vocab.json", "[1]", "expected dict"),
        ("merges.txt", "", "is empty"),
        ("merges.txt", LFS, "Git LFS pointer"),
        ("merges.txt", "#version: 0.2\na b c\n", r"\[0\] is 'a b c', expected two tokens"),
        ("merges.txt", "#version: 0.2\nx ☃\n", r"\[0\] needs '☃'"),
        ("merges.txt", None, "no tokenizer"),
    ],
)
def test_broken_vocabulary_and_merges(base, name, content, message):
    split_vocabulary(base)
    (base / name).unlink()
    if content is not None:
        (base / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"^{base}.*{message}"):
        ClipBase(base).check(*PROMPTS)


def small_vocabulary(content):
    content["model"] |= {
        "vocab": {"a</w>": 0, "a": 1, "<|startoftext|>": 836, "<|endoftext|>": 837},
        "merges": [],
    }


def test_a_vocabulary_of_a_few_tokens_is_refused(base):
    change_json(base / "tokenizer.json", small_vocabulary)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: a vocabulary of 2 tokens"):
        ClipBase(base).check(*PROMPTS)


def test_a_vocabulary_that_knows_no_prompt_is_refused(base):
    with pytest.raises(ValueError, match=f"^{base}: its vocabulary knows no part of '☃'"):
        ClipBase(base).check(["☃", "雪"], ["{}"])


def test_tokens_without_an_embedding_are_named_with_both_numbers(base):
    config = CLIPConfig.from_pretrained(base)
    config.text_config.vocab_size = 600
    CLIPModel(config).save_pretrained(base)
    with pytest.raises(ValueError, match=f"^{base}: .* has the number 837, and the vocab_size .* is 600"):
        ClipBase(base).check(*PROMPTS)


def test_another_end_token_than_the_model_s_is_named(base):
    change_json(base / "config.json", put("text_config", "eos_token_id", 5))
    with pytest.raises(ValueError, match="prompts end with the token 837, and the eos_token_id .* is 5"):
        ClipBase(base).check(*PROMPTS)


def test_prompts_are_cut_to_what_the_text_tower_takes(base):
    (base / "tokenizer_config.json").unlink()
    ClipBase(base).check(["alpha", "beta"], ["{}" + " and so on" * 40])


def test_the_tokenizer_of_an_image_folder_s_base_is_checked_once(base, tmp_path, monkeypatch):
    from mingle.suites import clip_base

    calls = []
    monkeypatch.setattr(clip_base, "clip_tokenizer", lambda folder: calls.append(1) or clip_tokenizer(folder))
    folder = image_folder(tmp_path / "images")
    (folder / "letters").rename(folder / "first")
    image_folder(folder)
    suite = opened(folder, base)
    for name in suite:
        suite.check(name)
    assert list(suite) == ["first", "letters"] and len(calls) == 1


T5_FAULTS = [
    (lambda path: path.unlink(), r"no tokenizer \(tokenizer\.json, or vocab\.txt, .*\)"),
    (lambda path: path.write_text("{"), r"tokenizer\.json: bad JSON"),
    (
        lambda path: change_json(path, put("model", "vocab", {"a": 0, "b": 1, "c": 2})),
        r"tokenizer\.json: a vocabulary of 3 tokens",
    ),
    (
        lambda path: change_json(path, put("model", "vocab", "new", 5000)),
        r"tokenizer\.json: the token 'new' has the number 5000, and the model's vocab_size is 259",
    ),
]


@pytest.mark.parametrize(("harm", "message"), T5_FAULTS, ids=[m for _, m in T5_FAULTS])
def test_a_broken_tokenizer_of_a_t5_base_is_named(glue_hub, tmp_path, harm, message):
    import standin_hub

    standin_hub.t5_base(tmp_path / "base")
    suites.load("glue-8", base=tmp_path / "base").check("cola")
    harm(tmp_path / "base/tokenizer.json")
    with pytest.raises(CheckpointError, match=message):
        suites.load("glue-8", base=tmp_path / "base").check("cola")


@pytest.mark.parametrize(("content", "message"), [(b"", "it is empty"), (LFS.encode(), "a Git LFS pointer")])
def test_a_broken_sentencepiece_model_is_named(glue_hub, tmp_path, content, message):
    import standin_hub

    standin_hub.t5_base(tmp_path / "base")
    (tmp_path / "base/tokenizer.json").unlink()
    (tmp_path / "base/spiece.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"spiece\.model: {message}"):
        suites.load("glue-8", base=tmp_path / "base").check("cola")
