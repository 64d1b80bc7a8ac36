"""Adapters that PEFT made become one language model, which answers each prompt with the adapter for it."""

from __future__ import annotations

import copy
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import mingle

peft = pytest.importorskip("peft")

SCRIPT = Path(__file__).parents[2] / "examples" / "adapters_to_one_model.py"
WORDS = {
    "numbers": ["one", "two", "three", "four", "five", "six"],
    "colours": ["red", "green", "blue", "white", "black"],
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A small language model with its tokenizer, and two adapters for it."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", *WORDS["numbers"], *WORDS["colours"]])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path / "base")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=1,
        bos_token_id=1,
    )
    base = LlamaForCausalLM(config).eval()
    base.save_pretrained(tmp_path / "base")
    for name, targets in (("numbers", ["q_proj", "v_proj"]), ("colours", "all-linear")):
        options = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
        model = peft.get_peft_model(copy.deepcopy(base), options)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / name)
    return tmp_path


def test_each_prompt_is_answered_with_its_adapter(place, monkeypatch, capsys):
    prompts = {
        name: [" ".join(words[i:] + words[:i]) for i in range(len(words))] for name, words in WORDS.items()
    }
    arguments = [place / "base", place / "out", *(f"{name}={place / name}" for name in WORDS)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(prompts)))
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert f"colours is in it, from {place / 'colours'}" in capsys.readouterr().out

    merged = mingle.Merger.from_pretrained(place / "out" / "merged").model
    again = mingle.Merger.from_adapters(place / "base", place / "out" / "adapters").model
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place / "base")
    for name in WORDS:
        tokens = tokenizer(prompts[name], return_tensors="pt", return_token_type_ids=False)
        bases = [AutoModelForCausalLM.from_pretrained(place / "base").eval() for _ in range(3)]
        with torch.no_grad():
            plain, published, exported = (
                model(**tokens).logits
                for model in (
                    bases[0],
                    peft.PeftModel.from_pretrained(bases[1], place / name),
                    peft.PeftModel.from_pretrained(bases[2], place / "out" / "adapters" / name),
                )
            )
            assert not torch.allclose(plain, published, atol=1e-2)
            torch.testing.assert_close(exported, published, rtol=1e-4, atol=1e-4)
            for model in (merged, again):
                torch.testing.assert_close(model(**tokens).logits, published, rtol=1e-4, atol=1e-4)


def test_it_is_as_short_as_a_first_example_should_be():
    code = SCRIPT.read_text().split('"""')[2].strip().splitlines()
    assert len(code) <= 20
