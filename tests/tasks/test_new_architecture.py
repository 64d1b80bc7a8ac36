"""An architecture that nobody has seen: its structure is found, and every method merges it."""

from __future__ import annotations

import pytest
import torch
from architectures import moved, names_in, options
from few_methods import each_method
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import mingle
from mingle import tasks
from mingle.methods import METHODS
from mingle.methods.base import PlainMethod


class NewConfig(PretrainedConfig):
    model_type = "made-up"

    def __init__(self, vocab_size=32, width=16, layers=2, **more):
        self.vocab_size, self.width, self.layers = vocab_size, width, layers
        super().__init__(**more)


class NewAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.mix(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class NewBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), NewAttention(width)
        self.grow, self.shrink = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.shrink(self.grow(x).relu())


class NewModel(PreTrainedModel):
    config_class = NewConfig
    base_model_prefix = "trunk"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.steps = nn.ModuleList(NewBlock(config.width) for _ in range(config.layers))
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, **_):
        x = self.embed(input_ids)
        for step in self.steps:
            x = step(x)
        return x


class NewForCausalLM(PreTrainedModel):
    config_class = NewConfig
    base_model_prefix = "trunk"

    def __init__(self, config):
        super().__init__(config)
        self.trunk = NewModel(config)
        self.words = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask=None, **_):
        return CausalLMOutput(logits=self.words(self.trunk(input_ids)))


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A new architecture, registered at run time; folders of its base and of three fine-tuned models."""
    AutoConfig.register("made-up", NewConfig, exist_ok=True)
    AutoModelForCausalLM.register(NewConfig, NewForCausalLM, exist_ok=True)
    folder = tmp_path_factory.mktemp("made-up")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = NewForCausalLM(NewConfig()).eval()
    base.save_pretrained(folder / "base")
    for i in range(3):
        moved(base, i).save_pretrained(folder / str(i))
    return folder


def test_the_structure_of_an_architecture_that_nobody_has_seen_is_found(made_up):
    task = tasks.of(made_up / "base")
    assert task.name == "causal-lm"
    structure = task.structure(task.skeleton(made_up / "base"))
    assert structure.sets["full"] == ("attention.qkv", "attention.mix", "grow", "shrink")
    assert structure.sets["light"] == ("attention.qkv", "grow")


@each_method(METHODS)
def test_every_method_merges_it_without_any_code(made_up, method, tmp_path):
    merger = mingle.Merger(made_up / "base", method, **options(method))
    given = {"input_ids": torch.arange(3, 23).view(4, 5), "answer_mask": torch.ones(4, 5, dtype=torch.long)}
    for i in range(2):
        merger.add(str(i), made_up / str(i), given)
    merger.save_pretrained(tmp_path / "merged")
    again = mingle.Merger.from_pretrained(tmp_path / "merged")
    again.add("2", made_up / "2", given)
    if issubclass(METHODS[method], PlainMethod):
        again.export(tmp_path / "exported")
        assert names_in(tmp_path / "exported") == names_in(made_up / "base")
        NewForCausalLM.from_pretrained(tmp_path / "exported")
