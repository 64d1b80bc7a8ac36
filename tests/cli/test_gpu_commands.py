"""Commands that merge use the GPU."""

from __future__ import annotations

import pytest
import torch
from merge_files import merge_file

from mingle.cli import main
from mingle.merging.merger import Merger

pytestmark = pytest.mark.gpu


def test_merge_and_add_compute_on_the_gpu(base_folder, tuned_folders, tmp_path):
    models = dict(zip(("one", "two"), tuned_folders, strict=False))
    merge = ("merge", merge_file(tmp_path, base_folder, models, "made-it"), "--out", tmp_path / "out")
    add = ("add", tmp_path / "out", "--name", "three", "--model", tuned_folders[2])
    for command in (merge, add):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        assert main([str(word) for word in command]) == 0
        assert torch.cuda.max_memory_allocated() > before
    assert Merger.from_pretrained(tmp_path / "out").task_names == ["one", "two", "three"]
