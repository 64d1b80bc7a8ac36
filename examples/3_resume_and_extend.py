"""Save a merge, come back next month, add a task: bit for bit what an uninterrupted merge gives."""

import tempfile
from pathlib import Path

import torch

import mingle
from mingle import suites

suite = suites.load("glyphs4", samples_per_class=1)
first, second, third = list(suite)[:3]
options = {"method": "mingle", "rank": 8, "steps": 5, "lr": 4e-3}


def add(merger: mingle.Merger, task: str) -> None:
    merger.add(task, suite.expert(task), suite.seeds(task))


with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch) / "merged"
    merger = mingle.Merger(suite.base, **options)
    add(merger, first)
    add(merger, second)
    merger.save_pretrained(folder)  # safetensors and a JSON manifest
    print(f"saved {sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 1e6:.1f} MB")

    resumed = mingle.Merger.from_pretrained(folder)  # the folder is all it needs
    add(resumed, third)

uninterrupted = mingle.Merger(suite.base, **options)
for task in (first, second, third):
    add(uninterrupted, task)

states = resumed.model.state_dict(), uninterrupted.model.state_dict()
same = all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
print(f"tasks: {', '.join(resumed.task_names)}")
print(f"the same bits as without a stop: {same}")
