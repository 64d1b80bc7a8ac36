"""A merge of three models that takes a tenth of a second, as commands."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import CLIPConfig, CLIPModel

from mingle.cli import main, output
from mingle.merging.merger import Merger

_TOWER = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


class TinyMerge:
    """Files for commands that start at the same state as often as is wanted.

    Attributes:
        root: what the commands write to is below it; of a finished merge of two, that is ``merged``.
        said: the file with what the last command printed.
    """

    def __init__(self, folder: Path) -> None:
        self.inputs, self.root, self.said = folder / "inputs", folder / "root", folder / "said"
        text = _TOWER | dict(vocab_size=8, max_position_embeddings=4, bos_token_id=0, eos_token_id=1)
        vision = _TOWER | dict(image_size=8, patch_size=4)
        torch.manual_seed(0)
        base = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
        base.save_pretrained(self.inputs / "base")
        for name in "abc":
            model = copy.deepcopy(base)
            with torch.no_grad():
                for parameter in model.vision_model.parameters():
                    parameter += 0.01 * torch.randn(parameter.shape)
            model.save_pretrained(self.inputs / name)
        self.write_config("ab")
        assert self.merge(self.root / "merged")() == 0

    def write_config(self, names: str, **changes: object) -> None:
        experts = [{"name": name, "model": str(self.inputs / name)} for name in names]
        content = {"base": str(self.inputs / "base"), "method": "average", "experts": experts} | changes
        (self.inputs / "merge.yaml").write_text(yaml.safe_dump(content))

    def merge(self, out: Path) -> Callable[[], int]:
        return self._command("merge", self.inputs / "merge.yaml", "--out", out)

    def add(self, folder: Path, name: str = "c") -> Callable[[], int]:
        return self._command("add", folder, "--name", name, "--model", self.inputs / name)

    def remove(self, folder: Path, *names: str) -> Callable[[], int]:
        return self._command("remove", folder, *names)

    def rollback(self, folder: Path, number: int) -> Callable[[], int]:
        return self._command("rollback", folder, "--to", number)

    def tidy(self, folder: Path, *more: str) -> Callable[[], int]:
        return self._command("tidy", folder, *more)

    def export(self, folder: Path, out: Path, *more: str) -> Callable[[], int]:
        return self._command("export", folder, "--out", out, *more)

    def routed(self) -> Path:
        """The folder of another merge of two, whose method leaves experts."""
        folder = self.root / "routed"
        if not folder.exists():
            merger = Merger(self.inputs / "base", "routed", rank=2, depths=(0,))
            head = torch.nn.functional.normalize(torch.randn(2, 8), dim=-1)
            for name in "ab":
                samples = {"pixel_values": torch.randn(4, 3, 8, 8), "text_embeds": head}
                merger.add(name, self.inputs / name, samples)
            merger.save_pretrained(folder)
        return folder

    def copied(self, name: str, source: str = "merged") -> Path:
        """A new copy of the merge of two, or of another folder."""
        shutil.rmtree(self.root / name, ignore_errors=True)
        shutil.copytree(self.root / source, self.root / name)
        return self.root / name

    def _command(self, *words: object) -> Callable[[], int]:
        def run() -> int:
            with open(self.said, "w") as file:
                output.console.file = file
                try:
                    return main(list(map(str, words)))
                finally:
                    output.console.file = None  # type: ignore[assignment]

        return run


#: what a merge took, and the page that is made of all other files
_BESIDE = ("timings.json", "report.html")


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too, except `_BESIDE`."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path not in {folder / name for name in _BESIDE}
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyMerge:
    """A merge of a, b and c by averages, in three generations."""
    tiny = TinyMerge(tmp_path_factory.mktemp("generations"))
    assert tiny.add(tiny.root / "merged")() == 0
    return tiny
