"""LoRA adapters of one language model become one model, which finds the adapter for every prompt by itself.

python examples/adapters_to_one_model.py BASE OUT NAME=ADAPTER … < prompts.json

BASE and the adapters are local folders; the file has some prompts for each adapter: {"NAME": ["…", "…"], …}.
"""

import json
import sys

from transformers import AutoTokenizer

import mingle

base, out, *adapters = sys.argv[1:]
prompts = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(base)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
merger = mingle.Merger(base, method="routed", rank=16)  # nothing is trained
for name, folder in (adapter.split("=", 1) for adapter in adapters):
    merger.add(name, folder, dict(tokenizer(prompts[name], padding=True, return_tensors="pt")))
    print(f"{name} is in it, from {folder}")
merger.save_pretrained(f"{out}/merged")  # mingle.Merger.from_pretrained opens it, and takes further adapters
merger.export(f"{out}/adapters", format="peft")  # for programs that load adapters, and their router
