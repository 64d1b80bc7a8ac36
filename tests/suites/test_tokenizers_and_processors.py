"""A base whose tokenizer or image processor is missing, broken, or another model's: named at the check."""

from __future__ import annotations

import pytest
import yaml
from image_folders import PROMPTS, clip_copy, image_folder

from mingle.cli import main
from mingle.io.files import CheckpointError
from mingle.suites import glyphs
from mingle.suites.clip_base import ClipBase


@pytest.fixture
def base(tmp_path):
    return clip_copy(tmp_path / "base")


def test_the_whole_base_passes(base):
    ClipBase(base).check(*PROMPTS)


@pytest.mark.parametrize("command", ["check", "merge", "eval"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenizer.json", "no tokenizer (tokenizer.json, or vocab.json and merges.txt)"),
        (
            "preprocessor_config.json",
            "no image processor (preprocessor_config.json, or an image_processor in",
        ),
    ],
)
def test_a_missing_file_is_named_by_every_command(base, tmp_path, capsys, command, name, message):
    image_folder(tmp_path / "images")
    experts = [{"name": "letters", "model": str(glyphs.DATA / "experts/greek-inverted")}]
    adapt = {"samples_per_class": 1}
    config = {"base": str(base), "method": "average", "experts": experts, "adapt": adapt}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(config | {"eval": {"suite": str(tmp_path / "images")}}))
    out = tmp_path / "out"
    if command == "eval":
        assert main(["merge", str(tmp_path / "m.yaml"), "--out", str(out)]) == 0
        (found,) = out.rglob(name)
    else:
        found = base / name
    found.unlink()
    given = {"check": [], "merge": ["--out", str(out)], "eval": []}[command]
    capsys.readouterr()
    assert main([command, str(out if command == "eval" else tmp_path / "m.yaml"), *given]) == 2
    assert f"{found.parent}: {message}" in capsys.readouterr().out.replace("\n", " ").replace("  ", " ")
    assert command == "eval" or not out.exists()


def test_a_link_out_of_the_folder_is_not_followed(base, tmp_path):
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (base / name).rename(tmp_path / name)
        (base / name).symlink_to(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name}: refusing a symlink"):
            ClipBase(base).check(*PROMPTS)
        (base / name).unlink()
        (tmp_path / name).rename(base / name)
