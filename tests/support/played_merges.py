"""Tiny merges of two tasks in folders, whose bases have what reads images or texts."""

from __future__ import annotations

import copy
import json
import string
from pathlib import Path
from typing import Any

import classifiers
import small_minilm
import tiny_decoders
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

import mingle
from mingle.tasks.sentence_encoder import class_embeddings
from mingle.tasks.tokenizer import text_tokenizer

#: of merges of classifiers, image encoders and sentence encoders
CLASSES = classifiers.NAMES
TASKS = ("task 0", "task 1")
OPTIONS: dict[str, dict[str, Any]] = {
    "average": {},
    "individual": {},
    "made-it": dict(share=0.3),
    "mass": dict(rank=2, depth=0, most=1),
    "mingle": dict(rank=2, steps=3, lr=0.05, batch_size=4, k=1),
    "mingle-routed": dict(rank=2, steps=3, lr=0.05, batch_size=4, k=1),
    "pre-trained": {},
    "routed": dict(rank=2, depths=(1,), abstain=None),
    "wemoe": dict(rank=2, later_rank=2, steps=2, lr=0.05, batch_size=4),
}


def write_processor(folder: Path, size: int) -> None:
    """An image processor for images of that size."""
    settings = {"image_processor_type": "CLIPImageProcessor", "size": size, "crop_size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def write_tokenizer(folder: Path, size: int, **settings: Any) -> None:
    """A tokenizer of that many tokens, one for each character."""
    letters = (string.ascii_lowercase + " .,?!" + string.printable)[:94]
    known = ["<pad>", "<unk>", "</s>", *dict.fromkeys(letters)][:size]
    tokenizer = Tokenizer(models.WordLevel({token: n for n, token in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = dict(pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **settings).save_pretrained(folder)


def classifier(folder: Path, kind: str, method: str) -> mingle.Merger:
    """A merge of classifiers of images (``vit``) or of texts (``bert``)."""
    base = classifiers.made(kind)
    base.save_pretrained(folder / "base")
    if kind == "vit":
        write_processor(folder / "base", 8)
    else:
        write_tokenizer(folder / "base", 40)
    merger = mingle.Merger(folder / "base", method, **OPTIONS[method])
    for number, names in enumerate(CLASSES):
        model = classifiers.tuned(base, names, number + 1)
        merger.add(TASKS[number], model, classifiers.inputs(base, seed=number))
    return merger


def sentences(folder: Path, method: str) -> mingle.Merger:
    """A merge of sentence encoders."""
    base = small_minilm.write_model(folder / "base")
    merger = mingle.Merger(base, method, "sentence-encoder", **OPTIONS[method])
    tokenizer = text_tokenizer(base, merger.base.get_input_embeddings().num_embeddings)
    for number, names in enumerate(CLASSES):
        texts = ["a short text", "another one", "the third", "no more than this"]
        tokens = dict(tokenizer([f"{number} {text}" for text in texts], padding=True, return_tensors="pt"))
        head = class_embeddings(merger.base, tokenizer, names)
        samples = {**tokens, "text_embeds": head, "class_names": list(names)}
        merger.add(TASKS[number], moved(merger.base, number), samples)
    return merger


def writers(folder: Path, kind: str, method: str) -> mingle.Merger:
    """A merge of models that write: ``llama`` or ``mt5``."""
    base = tiny_decoders.built(tiny_decoders.CONFIGS[kind]())
    base.save_pretrained(folder / "base")
    write_tokenizer(folder / "base", tiny_decoders.VOCABULARY)
    merger = mingle.Merger(folder / "base", method, **OPTIONS[method])
    for number, name in enumerate(TASKS):
        merger.add(name, tiny_decoders.tuned(base, number), tiny_decoders.prompts(kind, number))
    return merger


def moved(base: nn.Module, seed: int) -> nn.Module:
    """The model with all its tensors moved."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model
