"""Pre-train the base model of the glyph suites: a small CLIP that knows some six hundred characters by their
Unicode names.

The model is a `transformers.CLIPModel` with its own tokenizer and image processor, written as an ordinary hub
folder.  It is trained with the full soft-max over the names of all characters; a contrastive loss over
batches of 256 learns nothing in the same time.  First it sees plain black-on-white glyphs only; then, briefly
and at a low learning rate, a fraction of the images comes in random domains, which makes zero-shot
recognition in the task domains possible but poor.  (A quarter of the images from the start gives 95 %
zero-shot: nothing is left to merge.)  Deterministic for one machine and one version of torch; about 17
minutes on 2 CPU cores.

    python examples/glyph_models/pretrain.py mingle/suites/glyphs/data/base
"""

from __future__ import annotations

import argparse
import itertools
import re
import string
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from mingle.suites.glyphs.alphabets import ALPHABETS, TEMPLATES
from mingle.suites.glyphs.domains import DOMAINS, apply_domain
from mingle.suites.glyphs.render import (
    IMAGE_SIZE,
    TEST_FACES,
    TEST_PLACEMENT,
    TRAIN_FACES,
    TRAIN_PLACEMENT,
    view,
)
from mingle.suites.glyphs.tasks import GlyphTask

VISION = dict(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=IMAGE_SIZE,
    patch_size=4,
)
TEXT = dict(
    hidden_size=96,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=32,
)
PROJECTION = 96
MERGES = 700
MEAN, STD = 0.5, 0.35
FOREIGN = [domain for domain in DOMAINS if domain != "plain"]


def learn_merges(texts: list[str], count: int) -> list[tuple[str, str]]:
    """The `count` most useful byte-pair merges, ties broken by the alphabet (the tokenizers library breaks
    them at random).
    """
    words = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text.lower()))
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts in pieces.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def build_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """A byte-pair tokenizer in CLIP's format, learnt from the prompts themselves."""
    merges = learn_merges(texts, MERGES)
    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [
        *letters,
        *(c + "</w>" for c in letters),
        *("".join(m) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT["max_position_embeddings"])


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    ids = dict(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = CLIPConfig(
        text_config=dict(**TEXT, **ids, projection_dim=PROJECTION, hidden_act="gelu"),
        vision_config=dict(**VISION, projection_dim=PROJECTION, hidden_act="gelu"),
        projection_dim=PROJECTION,
    )
    return CLIPModel(config)


class Corpus:
    """Training views of all characters of all alphabets, and their prompts."""

    def __init__(self) -> None:
        sources = [GlyphTask(alphabet, "plain") for alphabet in ALPHABETS]
        self.names = [name for source in sources for name in source.class_names]
        self.prompts = [[template.format(name) for name in self.names] for template in TEMPLATES]
        self.train, self.test = (self._joined(sources, faces) for faces in (TRAIN_FACES, TEST_FACES))
        self.by_class = [(self.train[1] == c).nonzero().flatten() for c in range(len(self.names))]

    @staticmethod
    def _joined(sources: list[GlyphTask], faces: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        outlines, labels, first = [], [], 0
        for source in sources:
            own, index = source.outlines(faces)
            outlines.append(own)
            labels.append(index + first)
            first += len(source.characters)
        return torch.cat(outlines), torch.cat(labels)

    def batch(
        self, size: int, foreign: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`size` views, classes drawn uniformly; a fraction `foreign` of them in two random domains."""
        target = torch.randint(len(self.names), (size,), generator=generator)
        index = torch.stack(
            [
                self.by_class[c][torch.randint(len(self.by_class[c]), (), generator=generator)]
                for c in target.tolist()
            ]
        )
        ink = view(self.train[0][index], TRAIN_PLACEMENT, generator)
        half = round(size * foreign / 2)
        domains = [FOREIGN[int(torch.randint(len(FOREIGN), (), generator=generator))] for _ in range(2)] + [
            "plain"
        ]
        parts = ink.tensor_split([half, 2 * half])
        return torch.cat(
            [apply_domain(domain, part, generator) for domain, part in zip(domains, parts, strict=True)]
        ), target


class Trainer:
    """A CLIP model and how it is trained on a corpus."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.corpus = Corpus()
        self.tokenizer = build_tokenizer([text for texts in self.corpus.prompts for text in texts])
        self.tokens = [
            self.tokenizer(texts, padding=True, return_tensors="pt") for texts in self.corpus.prompts
        ]
        self.model = build_model(self.tokenizer)

    def logits(self, pictures: torch.Tensor, prompt: int) -> torch.Tensor:
        model = self.model
        text = model.text_projection(model.text_model(**self.tokens[prompt]).pooler_output)
        image = model.visual_projection(
            model.vision_model((pictures.float() / 255 - MEAN) / STD).pooler_output
        )
        return (
            model.logit_scale.exp().clamp(max=100) * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
        )

    def train(self, steps: int, lr: float, foreign: float, batch_size: int) -> None:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps + 1, pct_start=0.1)
        self.model.train()
        began = time.perf_counter()
        for step in range(1, steps + 1):
            pictures, target = self.corpus.batch(batch_size, foreign, self.generator)
            loss = F.cross_entropy(self.logits(pictures, step % len(TEMPLATES)), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 0:
                print(
                    f"step {step}/{steps}  loss {loss.item():.3f}  {time.perf_counter() - began:.0f} s",
                    flush=True,
                )
        self.model.eval()

    @torch.inference_mode()
    def accuracy(self) -> float:
        """Top-1 over all characters, plain, in faces not trained on."""
        outlines, labels = self.corpus.test
        generator = torch.Generator().manual_seed(0)
        right = 0
        for part, label in zip(outlines.split(256), labels.split(256), strict=True):
            pictures = apply_domain("plain", view(part, TEST_PLACEMENT, generator), generator)
            right += int((self.logits(pictures, 0).argmax(1) == label).sum())
        return right / len(labels)

    def save(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.model.half().save_pretrained(out)
        self.tokenizer.save_pretrained(out)
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3
        ).save_pretrained(out)
        for path in out.iterdir():
            path.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=2200, help="on plain glyphs")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--foreign-steps", type=int, default=400, help="with a fraction of foreign images")
    parser.add_argument("--foreign-lr", type=float, default=6e-4)
    parser.add_argument(
        "--foreign", type=float, default=0.15, help="the fraction of images in a random domain"
    )
    parser.add_argument("--batch-size", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    trainer = Trainer(args.seed)
    trainer.train(args.steps, args.lr, 0.0, args.batch_size)
    trainer.train(args.foreign_steps, args.foreign_lr, args.foreign, args.batch_size)
    print(f"plain glyphs in unseen faces, {len(trainer.corpus.names)} classes: {trainer.accuracy():.1%}")
    trainer.save(args.out)


if __name__ == "__main__":
    main()
