"""A person's image or text as a model's inputs, by the processor or tokenizer in its base's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from mingle.nn.call_arguments import takes
from mingle.tasks.base import TaskType
from mingle.tasks.image_processor import ImageProcessor
from mingle.tasks.pixels import ImageError, read_image
from mingle.tasks.tokenizer import text_tokenizer

#: the most tokens of an answer that is a text
ANSWER_TOKENS = 32
#: positions that some encoders, such as RoBERTa, keep for padding, where the tokenizer does not say so
_OFFSET = 2


class ReadingError(ValueError):
    """What a person gave is nothing that the model can read.  The message is the reason."""


class Reader(Protocol):
    """Makes one sample of what a person gave."""

    def __call__(self, given: Any) -> dict[str, Tensor]:
        """The model's inputs, each with one row.

        Raises:
            ReadingError: nothing was given, or nothing that can be read.
        """

    def decode(self, tokens: Tensor) -> str:
        """An answer, token ids [L], as text."""


class ImageReader:
    """Paths of images → ``pixel_values`` [1, 3, H, W].

    Args:
        folder: with an image processor.
        size: of the images that the model takes, where it says so.

    Raises:
        CheckpointError: see `ImageProcessor`.
    """

    def __init__(self, folder: Path, size: int | None) -> None:
        self.processor = ImageProcessor(folder)
        if size is not None:
            self.processor.check_output(size)

    def __call__(self, given: str | Path | None) -> dict[str, Tensor]:
        if not given:
            raise ReadingError("there is no image yet")
        try:
            return {"pixel_values": self.processor([read_image(Path(given))])}
        except ImageError as error:
            raise ReadingError(f"the image cannot be read: {error}") from None

    def decode(self, tokens: Tensor) -> str:
        raise NotImplementedError("a model of images writes no texts")


class TextReader:
    """Texts → ``input_ids`` and ``attention_mask`` [1, L], and ``token_type_ids`` where the model takes them.

    Args:
        folder: with a tokenizer.
        model: the whole model.
        answers: whether it writes its answers behind the text, and needs room for them.

    Raises:
        CheckpointError: see `text_tokenizer`.
    """

    def __init__(self, folder: Path, model: nn.Module, *, answers: bool) -> None:
        whole: Any = model
        self.tokenizer = text_tokenizer(folder, whole.get_input_embeddings().num_embeddings)
        names = ("input_ids", "attention_mask", "token_type_ids")
        self.names = [name for name in names if name == "input_ids" or takes(model, name)]
        #: how many tokens a text may have
        self.limit = self.tokenizer.model_max_length
        positions = getattr(whole.config, "max_position_embeddings", None) or self.limit
        if answers:
            self.limit = min(self.limit, positions - ANSWER_TOKENS)
        elif positions < self.limit:
            self.limit = positions - _OFFSET

    def __call__(self, given: str | None) -> dict[str, Tensor]:
        if not given or not given.strip():
            raise ReadingError("there is no text yet")
        tokens = self.tokenizer(given, return_tensors="pt")
        found = tokens["input_ids"].shape[1]
        if not found:
            raise ReadingError("the tokenizer finds nothing in the text")
        if found > self.limit:
            raise ReadingError(f"the text has {found} tokens, and the model has room for {self.limit}")
        return {name: tokens[name] for name in self.names if name in tokens}

    def decode(self, tokens: Tensor) -> str:
        text: str = self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
        return text


def reader_of(task: TaskType, model: nn.Module, folder: Path) -> Reader:
    """The reader for a model's samples.

    Args:
        task: the model's task type.
        model: the whole model.
        folder: its base's.

    Raises:
        ReadingError: a task type whose samples are neither images nor texts.
        CheckpointError: a folder without the files, or with broken ones.
    """
    if task.modality == "image":
        if takes(model.get_submodule(task.tower(model)), "spatial_shapes"):
            raise ReadingError(
                f"{folder}: the model takes images as patches, which only samples of yours are"
            )
        config: Any = getattr(model, "config", None)
        part = getattr(config, task.config_part, config) if task.config_part else config
        size = getattr(part, "image_size", None)
        return ImageReader(folder, size if isinstance(size, int) else None)
    if task.modality == "text":
        encoded = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return TextReader(folder, model, answers=not task.one_class and not encoded)
    raise ReadingError(
        f"task type {task.name!r}: its samples are neither images nor texts, as far as anybody says; a task "
        "type of your own may say so by its `modality`"
    )
