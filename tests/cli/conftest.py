from pathlib import Path

import pytest
from few_samples import few_images  # noqa: F401
from merge_files import merge_file
from stub_suite import stub  # noqa: F401
from tiny_merge import models  # noqa: F401


@pytest.fixture
def config(tmp_path, base_folder, tuned_folders) -> Path:
    """A file that merges two models by their average, without samples."""
    experts = {f"task {i}": folder for i, folder in enumerate(tuned_folders[:2])}
    return merge_file(tmp_path, base_folder, experts, "average")
