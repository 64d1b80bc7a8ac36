"""A base whose image processor is broken, or another model's: the file and the field are named."""

from __future__ import annotations

import json

import pytest
from image_folders import LFS, PROMPTS, change_json, clip_copy, put

from mingle.io.files import CheckpointError
from mingle.suites.clip_base import ClipBase


@pytest.fixture
def base(tmp_path):
    return clip_copy(tmp_path / "base")


PROCESSOR_FAULTS = [
    (put("image_mean", [0.5, 0.5]), r"image_mean is \[0.5, 0.5\], expected three finite numbers"),
    (put("image_mean", "grey"), "image_mean is 'grey'"),
    (put("image_std", [0.3, 0.0, 0.3]), "image_std is .*, expected more than 0"),
    (put("image_std", [0.3, float("nan"), 0.3]), "image_std is .*, expected three finite numbers"),
    (put("rescale_factor", 0), "rescale_factor is 0, expected more than 0"),
    (put("rescale_factor", "1/255"), "rescale_factor is '1/255'"),
    (put("size", {"shortest_edge": 0}), "size is .*, expected 1 to 4096 pixels"),
    (put("size", {"shortest_edge": -28}), "size is .*, expected 1 to"),
    (put("size", {"shortest_edge": "28"}), "size is .*, expected 1 to"),
    (put("size", {"height": 28}), "size is .*, expected 1 to"),
    (put("size", {}), "size is {}, expected 1 to"),
    (put("size", 10**9), "size is 1000000000, expected 1 to"),
    (put("crop_size", [28]), r"crop_size is \[28\], expected 1 to"),
    (put("do_resize", "yes"), "do_resize is 'yes', expected true or false"),
    (put("resample", 99), "resample is 99, expected the number of a filter"),
    (put("crop_size", {"height": 14, "width": 14}), r"makes an image \[3, 14, 14\], and the model takes"),
    (put("do_center_crop", False), r"makes an image \[3, .*\], and the model takes \[3, 28, 28\]"),
    (put("crop_size", {"shortest_edge": 28}), "its image processor fails"),
    (lambda content: content.clear(), r"makes an image \[3, 224, 224\], and the model takes \[3, 28, 28\]"),
]


@pytest.mark.parametrize(("change", "message"), PROCESSOR_FAULTS, ids=[m for _, m in PROCESSOR_FAULTS])
def test_a_broken_image_processor_is_named_with_the_field(base, change, message):
    change_json(base / "preprocessor_config.json", change)
    with pytest.raises(CheckpointError, match=rf"^{base}/preprocessor_config\.json: {message}"):
        ClipBase(base).check(*PROMPTS)


@pytest.mark.parametrize("content", ["", "[]", "{", LFS, '"CLIP"'])
def test_an_image_processor_that_is_something_else(base, content):
    (base / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"^{base}/preprocessor_config\.json: "):
        ClipBase(base).check(*PROMPTS)


def test_an_image_processor_inside_a_processor_counts(base):
    settings = json.loads((base / "preprocessor_config.json").read_text())
    (base / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    ClipBase(base).check(*PROMPTS)
    (base / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="no image processor"):
        ClipBase(base).check(*PROMPTS)
    (base / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    ClipBase(base).check(*PROMPTS)
    (base / "processor_config.json").write_text(json.dumps({"image_processor": settings | {"size": 0}}))
    with pytest.raises(CheckpointError, match=r"processor_config\.json: size is 0"):
        ClipBase(base).check(*PROMPTS)
