"""What merges from files hold in memory at one time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from live_memory import peak_bytes
from streamed_merges import from_files
from streamed_models import SIZES
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from mingle.io import lazy_tensors
from mingle.merging import streamed
from mingle.methods.opcm import Opcm


@pytest.mark.parametrize("method", ["average", "opcm"])
def test_no_more_than_one_tensor_is_in_memory(method, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "PART_BYTES", 1 << 17)
    sizes = SIZES | dict(hidden_size=64, num_hidden_layers=12, intermediate_size=192)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16()
    for name in ("base", "one", "two"):
        model.save_pretrained(tmp_path / name, max_shard_size="200KB")
    whole, largest = (f(4 * tensor.numel() for tensor in model.parameters()) for f in (sum, max))
    merger = from_files(tmp_path, method, tmp_path / "merged", ["one"])
    found = peak_bytes(lambda: merger.add("two", tmp_path / "two", tmp_path / "merged"))
    assert found < (1 << 17) + 12 * largest < whole / 2
    assert found > peak_bytes(lambda: None) == 0


@pytest.mark.parametrize("method", ["task-arithmetic", "opcm"])
def test_of_a_large_tensor_that_is_merged_entry_by_entry_only_rows_are_in_memory(
    method, tmp_path, monkeypatch
):
    monkeypatch.setattr(streamed, "PART_BYTES", 1 << 14)
    monkeypatch.setattr(lazy_tensors, "BLOCK_ENTRIES", 1 << 12)
    model = LlamaForCausalLM(
        LlamaConfig(**SIZES | {"vocab_size": 9000}, intermediate_size=24, tie_word_embeddings=True)
    ).bfloat16()
    for name in ("base", "one", "two"):
        model.save_pretrained(tmp_path / name)
        model.model.embed_tokens.weight.data *= 1.5
    merger = from_files(tmp_path, method, tmp_path / "merged", ["one"])
    found = peak_bytes(lambda: merger.add("two", tmp_path / "two", tmp_path / "merged"))
    result = 4 * model.model.embed_tokens.weight.numel()
    assert result < found < 1.5 * result


def test_what_is_projected_as_a_whole_is_merged_in_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy_tensors, "BLOCK_ENTRIES", 1 << 12)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 9000, "tie_word_embeddings": False}))
    for name in ("base", "one", "two"):
        model.bfloat16().save_pretrained(tmp_path / name)
        model.lm_head.weight.data *= 1.5
    merger = from_files(tmp_path, "opcm", tmp_path / "merged", ["one"])
    merge, entries = Opcm.merge_tensor, []

    def noted(self, step, found, aside):
        entries.append((step.name, max(tensor.numel() for tensor in (step.tuned, *aside.values()))))
        return merge(self, step, found, aside)

    monkeypatch.setattr(Opcm, "merge_tensor", noted)
    merger.add("two", tmp_path / "two", tmp_path / "merged")
    heads = [size for name, size in entries if name == "lm_head.weight"]
    assert len(heads) > 1 and max(heads) <= 1 << 12


_MEASURED = """
import sys
from pathlib import Path
from mingle.merging.streamed import StreamedMerger

def peak():
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

place = Path(sys.argv[1])
merger = StreamedMerger(place / "base", sys.argv[2])
merger.add("one", place / "one", place / "merged-small")
before = peak()
merger = StreamedMerger(place / "large", sys.argv[2])
for name in ("one", "two"):
    merger.add(name, place / "large", place / "merged")
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["average", "ties", "opcm", "iso-c"])
def test_a_process_takes_no_more_memory_for_a_large_model(method, tmp_path):
    """A hundred million parameters, 400 MB in fp32, none of whose tensors has more than 4 MB."""
    sizes = SIZES | dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8)
    for name in ("base", "one"):
        LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16().save_pretrained(tmp_path / name)
    large = LlamaForCausalLM(LlamaConfig(**sizes | {"num_hidden_layers": 24})).bfloat16()
    large.save_pretrained(tmp_path / "large", max_shard_size="20MB")
    size = sum(4 * tensor.numel() for tensor in large.parameters())
    assert size > 3.9e8
    del large
    command = [sys.executable, "-c", _MEASURED, str(tmp_path), method]
    # as a merge's command has it: nothing that was freed is kept for later
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    more = int(run.stdout)
    assert more < streamed.PART_BYTES + 0.2 * size
