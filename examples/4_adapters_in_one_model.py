"""Two PEFT LoRA adapters live in one language model as gated experts, their factors used as they are."""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import mingle


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def save_adapter(folder: Path, rank: int) -> None:
    """What fine-tuning with PEFT leaves behind; here the factors are random."""
    adapted = get_peft_model(small_model(), LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)


tokens = torch.arange(12).view(1, 12)
with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
    folders = [Path(scratch) / "summaries", Path(scratch) / "translations"]
    for folder, rank in zip(folders, (4, 8), strict=True):
        save_adapter(folder, rank)

    model = small_model()
    plain = model(tokens).logits
    layers = mingle.add_adapter(model, folders[0])  # gates are 1: what PEFT's merged model computes
    print(f"{len(layers)} layers take experts, the first is {next(iter(layers))}")
    one = model(tokens).logits
    mingle.add_adapter(model, folders[1])  # another rank in the same layers
    print(f"experts per layer: {[layer.num_experts for layer in layers.values()]}")
    two = model(tokens).logits
    print(f"logits moved by {(one - plain).abs().max():.3f}, then by {(two - one).abs().max():.3f}")

    for layer in layers.values():  # any router may say how much of each adapter is at work
        layer.given_gates = torch.tensor([1.0, 0.0])
    print(f"only the first adapter again: {torch.allclose(model(tokens).logits, one, atol=1e-5)}")
    mingle.restore(model)
    print(f"the base model again: {torch.equal(model(tokens).logits, plain)}")
