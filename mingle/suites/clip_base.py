"""What a CLIP folder turns images and class names into: loaded once, and checked before anything heavy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mingle.tasks.clip import ClipTask, prompt_tokens, zero_shot_head
from mingle.tasks.image_processor import ImageProcessor
from mingle.tasks.tokenizer import clip_tokenizer


class ClipBase:
    """The image processor, tokenizer and text tower of a local hub folder.

    Raises, on first use of each:
        CheckpointError: a file that is missing or broken, or that does not fit the model; the message names
            it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def config(self) -> Any:
        """The `transformers.CLIPConfig` of the model."""
        return ClipTask().skeleton(self.folder).config

    @cached_property
    def processor(self) -> ImageProcessor:
        processor = ImageProcessor(self.folder)
        processor.check_output(self.config.vision_config.image_size)
        return processor

    @cached_property
    def tokenizer(self) -> Any:
        return clip_tokenizer(self.folder)

    def check(self, class_names: Sequence[str], templates: Sequence[str]) -> None:
        """Check processor and tokenizer, and that the tokenizer tells the classes apart.

        Raises:
            ValueError: see `mingle.tasks.clip.prompt_tokens`.
        """
        _ = self.processor
        prompt_tokens(self.config, self.tokenizer, class_names, templates)

    def head(self, class_names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
        """The zero-shot classifier [C, P]; see `mingle.tasks.clip.zero_shot_head`."""
        return zero_shot_head(ClipTask().load(self.folder), self.tokenizer, class_names, templates)
