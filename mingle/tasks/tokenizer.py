"""Tokenizers of local hub folders: their files checked before transformers sees them, and what it made of
them checked against the model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mingle.io.files import CheckpointError
from mingle.io.tokenizer_files import check_tokenizer_files
from mingle.options import OptionError
from mingle.tasks.configs import broken

_CLIP_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_TEXT_FILES = (
    ("tokenizer.json",),
    ("vocab.txt",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("tokenizer.model",),
)
#: a vocabulary with fewer tokens than this, special ones aside, cannot spell anything
_FEWEST = 8
_SAMPLE = "Is this a sentence? Yes, and here is another one."


def clip_tokenizer(folder: str | Path) -> Any:
    """The `transformers.CLIPTokenizer` of a folder.

    Raises:
        CheckpointError: no ``tokenizer.json``, nor ``vocab.json`` and ``merges.txt``; or one of the
            tokenizer's files is broken.  The message names the file.
    """
    from transformers import CLIPTokenizer

    paths = check_tokenizer_files(Path(folder), *_CLIP_FILES)
    tokenizer = _loaded(paths, lambda: CLIPTokenizer.from_pretrained(folder, local_files_only=True))
    unknown = tokenizer.unk_token
    # The library raises bare `Exception` where it needs a token that stands for unknown text and has none.
    if unknown is None or tokenizer.backend_tokenizer.model.token_to_id(str(unknown)) is None:
        raise CheckpointError(f"{paths[0]}: the unknown token {unknown!r} is not in its vocabulary")
    return tokenizer


def text_tokenizer(folder: str | Path, vocab_size: int) -> Any:
    """The tokenizer of a language model's folder.

    Args:
        folder: a local folder in hub format.
        vocab_size: the number of the model's embeddings.

    Raises:
        CheckpointError: no ``tokenizer.json`` and no vocabulary of another kind, one of the tokenizer's files
            is broken, it cannot read English text, or it has more tokens than the model has embeddings.  The
            message names the file.
        OptionError: a model of sentencepiece needs a package that is not installed.
    """
    from transformers import AutoTokenizer

    paths = check_tokenizer_files(Path(folder), *_TEXT_FILES)
    if paths[0].suffix == ".model" and importlib.util.find_spec("sentencepiece") is None:
        raise OptionError(f"{paths[0]}: reading it needs sentencepiece: pip install sentencepiece protobuf")
    tokenizer = _loaded(
        paths,
        lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
    )
    found = set(tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"])
    if found <= {tokenizer.unk_token_id}:
        raise CheckpointError(f"{paths[0]}: its vocabulary knows no part of the text {_SAMPLE!r}")
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: int(item[1]))
    if number >= vocab_size:
        raise CheckpointError(
            f"{paths[0]}: the token {token!r} has the number {number}, and the model's vocab_size is "
            f"{vocab_size}"
        )
    return tokenizer


def _loaded(paths: list[Path], load: Callable[[], Any]) -> Any:
    """What `load` returns, if it has a vocabulary worth the name."""
    errors: tuple[type[Exception], ...] = (OSError, *broken())
    try:
        tokenizer = load()
    except errors as error:
        named = " and ".join(path.name for path in paths)
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{paths[0].parent}: no tokenizer can be made of {named}: {reason}") from None
    ordinary = set(tokenizer.get_vocab()) - set(map(str, tokenizer.all_special_tokens))
    if len(ordinary) < _FEWEST:
        raise CheckpointError(
            f"{paths[0]}: a vocabulary of {len(ordinary)} tokens, special ones aside, which cannot spell text"
        )
    return tokenizer
