"""A stand-in of the package that brings the base of the text suites: a tiny encoder in the same layout."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer

from mingle.suites.texts.base import PACKAGE


def write_model(folder: Path) -> Path:
    """A sentence-transformers folder with a BERT of two blocks and a word-piece tokenizer that spells."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={piece: n for n, piece in enumerate(pieces)}, model_max_length=64).save_pretrained(
        folder
    )
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": 32,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def write_package(site: Path) -> Path:
    """The package with that model in a folder of Python's path; returns the model's folder."""
    package = site / PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('nothing in here is needed')\n")
    return write_model(package / "model")
