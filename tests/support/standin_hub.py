"""A small hub: repositories with the names, files and columns of the real ones, in the layout of the hub's
own cache; and a stand-in of the package `fusion_bench`, where only the modules with names and prompts can be
imported.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import tiny_models
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_models import VISION
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from mingle.suites import glyphs
from mingle.suites.fusionbench.datasets import GLUE_TASKS

BASE, EUROSAT, SVHN = "openai/clip-vit-base-patch32", "tanganke/eurosat", "ufldl-stanford/svhn"
TEST_FILE = "data/test-00000-of-00001.parquet"
TEXT = tiny_models.TEXT | dict(
    hidden_size=32, intermediate_size=64, vocab_size=838, max_position_embeddings=32
)
TEXT |= dict(bos_token_id=836, eos_token_id=837, pad_token_id=837)


class Hub:
    """A hub cache under `home`, which is what HF_HOME names."""

    def __init__(self, home: Path) -> None:
        self.home, self.cache = home, home / "hub"

    def storage(self, repo: str, kind: str = "model") -> Path:
        return self.cache / f"{kind}s--{repo.replace('/', '--')}"

    def snapshot(self, repo: str, kind: str = "model", ref: str = "main") -> Path:
        storage = self.storage(repo, kind)
        return storage / "snapshots" / (storage / "refs" / ref).read_text()

    def add(self, repo: str, files: Mapping[str, bytes], kind: str = "model", ref: str = "main") -> str:
        """A commit with these files, which the branch `ref` then points to."""
        storage = self.storage(repo, kind)
        commit = hashlib.sha1(
            repr(sorted((name, hashlib.sha256(data).digest()) for name, data in files.items())).encode()
        ).hexdigest()
        for name, data in files.items():
            blob = storage / "blobs" / hashlib.sha256(data).hexdigest()
            link = storage / "snapshots" / commit / name
            blob.parent.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(data)
            link.symlink_to(Path(*[".."] * (len(Path(name).parts) + 1), "blobs", blob.name))
        reference = storage / "refs" / ref
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
        return commit


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def clip(seed: int = 0) -> CLIPModel:
    torch.manual_seed(seed)
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)).eval()


def clip_base(folder: Path, model: CLIPModel, *, shard: str = "10GB") -> dict[str, bytes]:
    """A base as the hub holds it: model, tokenizer and image processor."""
    model.save_pretrained(folder, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(glyphs.BASE / name, folder / name)
    processor = json.loads((glyphs.BASE / "preprocessor_config.json").read_text())
    processor |= {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return contents(folder)


def clip_expert(folder: Path, model: CLIPModel, seed: int) -> dict[str, bytes]:
    """A fine-tuned vision tower as the hub holds it."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    tower = {
        f"vision_model.{k}": v + 0.05 * torch.randn(v.shape, generator=generator)
        for k, v in model.vision_model.state_dict().items()
    }
    save_file(tower, folder / "model.safetensors", {"format": "pt"})
    model.config.vision_config.save_pretrained(folder)
    return contents(folder)


def t5_base(folder: Path) -> dict[str, bytes]:
    """A small Flan-T5: every byte a token, and the tokens of T5 that mean something."""
    specials = ["<pad>", "</s>", "<unk>"]
    vocabulary = {
        token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    shape = dict(
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        vocab_size=len(vocabulary),
        feed_forward_proj="gated-gelu",
    )
    T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0)).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return contents(folder)


def picture(colour: int, noise: int = 0, form: str = "PNG") -> bytes:
    """An encoded picture in one of three colours."""
    generator = torch.Generator().manual_seed(noise)
    pixels = torch.randint(0, 60, (20, 24, 3), generator=generator, dtype=torch.uint8)
    pixels[..., colour % 3] += 150
    encoded = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(encoded, form)
    return encoded.getvalue()


def table(
    columns: Mapping[str, Sequence[Any]], classes: Mapping[str, Sequence[str]] | None = None, group: int = 4
) -> bytes:
    """A Parquet file as `datasets` writes it, with the names of classes where a column has some."""
    made = arrow.table(dict(columns))
    features = {
        name: {"names": list(names), "_type": "ClassLabel"} for name, names in (classes or {}).items()
    }
    if features:
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    stream = io.BytesIO()
    parquet.write_table(made, stream, row_group_size=group)
    return stream.getvalue()


def glue_files(**changed: Mapping[str, Sequence[Any]]) -> dict[str, bytes]:
    """GLUE as the hub holds it, some tasks with other rows."""
    files = {
        f"{task}/{GLUE_TASKS[task].split}-00000-of-00001.parquet": table(columns)
        for task, columns in (GLUE | changed).items()
    }
    return files | {"mnli/validation_mismatched-00000-of-00001.parquet": table(GLUE["mnli"])}


def images(
    count: int, classes: int, image: str = "image", label: str = "label", first: int = 0
) -> dict[str, list[Any]]:
    """Columns of `count` pictures whose colour tells their class, numbered from `first`."""
    numbers = range(first, first + count)
    return {
        image: [
            {"bytes": picture(i % classes, i, "JPEG" if i % 2 else "PNG"), "path": f"{i}.png"}
            for i in numbers
        ],
        label: [i % classes for i in numbers],
    }


#: rows of GLUE by task
GLUE = {
    "cola": {"sentence": ["Dogs bark.", "Bark dogs the.", "It rains."], "label": [1, 0, 1], "idx": [0, 1, 2]},
    "mnli": {"premise": ["A", "B b"], "hypothesis": ["C", "D"], "label": [2, 0], "idx": [0, 1]},
    "qqp": {
        "question1": [f"Is {i}?" for i in range(260)],
        "question2": ["Or?"] * 260,
        "label": [0, 1] * 130,
        "idx": list(range(260)),
    },
    "stsb": {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [4.96, 0.0], "idx": [0, 1]},
}

MAPPING = {
    "eurosat": ".eurosat",
    "svhn": ".svhn",
    "fer2013": ".fer2013",
    "stanford-cars": ".eurosat",
    "resisc45": ".eurosat",
    "gtsrb": ".eurosat",
    "food101": ".eurosat",
    "cifar100": {"module": ".cifar100", "classnames": "fine_label", "templates": "templates"},
}
_THREE = """
classnames = ["annual crop land", "forest", "river"]
templates = [lambda c: f"a photo of {c}.", lambda c: f"a {c}."]
"""
_GLUE = """
cola = {"input_text": "Correct: \\"{sentence}\\"?", "target_text": {"0": "unacceptable", "1": "acceptable"}}
mnli = {
    "input_text": "{premise} implies {hypothesis}?",
    "target_text": {"0": "entailment", "1": "neutral", "2": "contradiction"},
}
qqp = {"input_text": "{question1} or {question2}?", "target_text": {"0": "no", "1": "yes"}}
stsb = {"input_text": "{sentence1} and {sentence2}?", "target_text": "{:.1f}"}
glue_prompt_templates = {"cola": cola, "mnli": mnli, "qqp": qqp, "stsb": stsb}
"""


def fusion_bench(root: Path) -> Path:
    """A package whose `__init__` modules fail, as the real ones do where their dependencies are missing;
    returns what goes on the path.
    """
    files = {
        "__init__.py": "raise ImportError('lightning is not installed')\n",
        "tasks/__init__.py": "",
        "tasks/clip_classification/__init__.py": (
            "from datasets import load_dataset\n"
            f"class CLIPTemplateFactory:\n    _dataset_mapping = {MAPPING!r}\n"
        ),
        "tasks/clip_classification/eurosat.py": _THREE,
        "tasks/clip_classification/cifar100.py": _THREE.replace("classnames", "fine_label"),
        "tasks/clip_classification/fer2013.py": (
            'classnames = ["angry", "happy"]\ntemplates = [lambda c: f"they look {c}."]\n'
        ),
        "tasks/clip_classification/svhn.py": (
            "classnames = [str(i) for i in range(3)]\n"
            "templates = [lambda c: f'a photo of the number: \"{c}\".']\n"
        ),
        "tasks/flan_t5_text_generation/glue_prompt_templates.py": _GLUE,
    }
    for name, text in files.items():
        path = root / "fusion_bench" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root
