"""Image processors under their present and former names, in either file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mingle.tasks.image_processor import ImageProcessor

SIGLIP = dict(
    do_resize=True, do_rescale=True, do_normalize=True, size={"height": 24, "width": 24}, resample=3
)
CLIP = SIGLIP | dict(size=24, crop_size=24, do_center_crop=True)


@pytest.mark.parametrize(
    ("settings", "mean"),
    [
        (SIGLIP | dict(image_processor_type="SiglipImageProcessor"), 0.5),
        (SIGLIP | dict(image_processor_type="ViTImageProcessorFast"), 0.5),
        (SIGLIP | dict(feature_extractor_type="ViTFeatureExtractor"), 0.5),
        (CLIP | dict(feature_extractor_type="CLIPFeatureExtractor"), 0.48145466),
        (CLIP | dict(image_processor_type="CLIPImageProcessor"), 0.48145466),
        (CLIP, 0.48145466),
    ],
    ids=["SigLIP", "fast", "ViT of old", "CLIP of old", "CLIP", "without a name"],
)
@pytest.mark.parametrize("whole", [False, True], ids=["preprocessor_config.json", "processor_config.json"])
def test_what_a_file_does_not_say_is_as_its_kind_has_it(settings, mean, whole, tmp_path):
    name = "processor_config.json" if whole else "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps({"image_processor": settings} if whole else settings))
    processor = ImageProcessor(tmp_path)
    processor.check_output(24)
    made = processor([np.full((3, 40, 60), 255, np.uint8)])
    deviation = 0.5 if mean == 0.5 else 0.26862954
    torch.testing.assert_close(made[0, 0], torch.full((24, 24), (1 - mean) / deviation))
