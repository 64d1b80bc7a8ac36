"""Small models in exactly the hub's format, samples for them, and how tests with markers run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported, here and in every process that a test starts: on matrices as small as these,
# threads that wait for one another cost twice what they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from gpu_fixtures import _precision, pytest_runtest_setup  # noqa: F401
from hub_fixtures import glue_hub, hub, image_hub  # noqa: F401
from interpreter import pytest_pyfunc_call, pytest_runtest_logreport  # noqa: F401
from tiny_models import TEXT, VISION

from mingle.tasks import TaskData

if TYPE_CHECKING:  # tests in Triton's interpreter, a process for each file, do without it
    from transformers import CLIPModel


def pytest_collection_finish() -> None:
    """A model that is loaded writes its configuration out in full several times, for messages that nobody
    sees; that takes a fifth of the time of loading one.
    """
    if "transformers" in sys.modules:
        sys.modules["transformers"].PretrainedConfig.__repr__ = object.__repr__


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def base_model() -> CLIPModel:
    from transformers import CLIPConfig, CLIPModel

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)).eval()


@pytest.fixture(scope="session")
def tuned_states(base_model: CLIPModel) -> list[dict[str, torch.Tensor]]:
    """Three fine-tuned vision towers under the tower's own names."""
    generator = torch.Generator().manual_seed(2)
    tower = base_model.vision_model.state_dict()
    return [
        {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in tower.items()} for _ in range(3)
    ]


@pytest.fixture(scope="session")
def base_folder(base_model: CLIPModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    base_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tuned_folders(
    base_model: CLIPModel, tuned_states: list[dict[str, torch.Tensor]], base_folder: Path
) -> list[Path]:
    """The fine-tuned towers as hub folders, with the prefix that hub checkpoints carry."""
    from safetensors.torch import save_file

    folders = []
    for i, state in enumerate(tuned_states):
        folder = base_folder.parent / f"tuned{i}"
        folder.mkdir()
        base_model.config.vision_config.save_pretrained(folder)
        save_file(
            {f"vision_model.{k}": v for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"}
        )
        folders.append(folder)
    return folders


@pytest.fixture(scope="session")
def samples() -> list[TaskData]:
    """Labelled random images and classes of three tasks."""
    generator = torch.Generator().manual_seed(3)
    return [
        TaskData(
            {"pixel_values": torch.randn(24, 3, 16, 16, generator=generator)},
            {"text_embeds": torch.nn.functional.normalize(torch.randn(5, 16, generator=generator), dim=-1)},
            torch.randint(5, (24,), generator=generator),
        )
        for _ in range(3)
    ]
