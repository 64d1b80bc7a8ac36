"""What mingle computes on fixed inputs, in digests: `test_unchanged.py` holds them against those that version
0.1.0 gave.

    python tests/regression/figures.py FILE.json    records those of the installed version

Only public names are used here, so that any version can be recorded.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mingle
from mingle import suites
from mingle.methods import METHODS
from mingle.tasks import TaskData

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import spectra

#: options of the merges, each given to the methods that have it
OPTIONS = dict(
    rank=16,
    later_rank=8,
    steps=4,
    lr=4e-3,
    batch_size=8,
    gamma=0.3,
    r_p=16,
    r_v=4,
    r_l=16,
    scaling=0.3,
    init=0.3,
    backend="grouped",
)
T5_METHODS = ("average", "mingle", "routed", "wemoe")


@contextmanager
def steady() -> Iterator[None]:
    """One thread and one library, so that equal inputs give equal bits on equal processors."""
    threads, library = torch.get_num_threads(), os.environ.get("MINGLE_CPU_GEMM")
    torch.set_num_threads(1)
    os.environ["MINGLE_CPU_GEMM"] = "mkl"
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)
        if library is None:
            del os.environ["MINGLE_CPU_GEMM"]
        else:
            os.environ["MINGLE_CPU_GEMM"] = library


def digest(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The SHA-256 of names, shapes and bits; and for other processors the norm and one scalar product, both
    in float64.
    """
    sha, square, product = hashlib.sha256(), 0.0, 0.0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        flat = tensor.reshape(-1).double()
        square += flat.square().sum().item()
        product += (flat * torch.arange(1, len(flat) + 1, dtype=torch.float64).cos()).sum().item()
    return {"sha256": sha.hexdigest(), "norm": math.sqrt(square), "product": product}


def processor() -> str:
    """A digest of what plain PyTorch computes here: where it differs, no bits need be the same."""
    with steady():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(200, 150, generator=generator)
        square = x.mT @ x
        values = {
            "product": square,
            "double": x.double().mT @ x.double(),
            "eigenvalues": torch.linalg.eigvalsh(square.double()),
            "vectors": torch.linalg.svd(x, full_matrices=False)[2],
            "factor": torch.linalg.qr(x)[1],
            "softmax": x.softmax(1),
            "attention": torch.nn.functional.scaled_dot_product_attention(
                *(x[None, None, :, :64] for _ in range(3))
            ),
        }
        return f"torch {torch.__version__}, {digest(values)['sha256']}"


def known(method: str, **options: Any) -> dict[str, Any]:
    """Those of the options that a method has."""
    return {
        name: value for name, value in options.items() if name in METHODS[method].Options.__dataclass_fields__
    }


def glyph_merge(method: str, protocol: str) -> dict[str, Tensor]:
    """The merged model of glyphs4, embedded in the package."""
    suite = suites.load("glyphs4", protocol=protocol)
    reduce = {"strict": "sample", "official": "batch"}[protocol]
    merger = mingle.Merger(
        suite.base, method, suite.task_type, seed=5, **known(method, reduce=reduce, **OPTIONS)
    )
    for name in suite:
        merger.add(name, suite.expert(name), suite.seeds(name))
    return merger.model.state_dict()


def tiny_t5() -> tuple[Any, list[Any]]:
    """A Flan-T5 of two layers, and two models near it."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    base = T5ForConditionalGeneration(config).eval()
    generator, tuned = torch.Generator().manual_seed(1), []
    with torch.no_grad():
        for _, parameter in sorted(base.named_parameters()):
            drawn = (
                0.2 * torch.randn(parameter.shape, generator=generator)
                if parameter.dim() == 2
                else torch.ones(parameter.shape)
            )
            parameter.copy_(drawn)
        for _ in range(2):
            model = copy.deepcopy(base)
            for name, parameter in sorted(model.named_parameters()):
                if parameter.dim() == 2 and "shared" not in name and "embed" not in name:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            tuned.append(model)
    return base, tuned


def t5_merge(method: str) -> dict[str, Tensor]:
    base, tuned = tiny_t5()
    merger = mingle.Merger(
        base, method, "t5", seed=5, **known(method, depths=(0, 1), **OPTIONS | {"rank": 4, "later_rank": 2})
    )
    generator = torch.Generator().manual_seed(2)
    for i, model in enumerate(tuned):
        lengths = torch.randint(3, 10, (8,), generator=generator)
        mask = (torch.arange(9) < lengths[:, None]).long()
        ids = torch.randint(2, 60, (8, 9), generator=generator) * mask
        merger.add(f"task{i}", model, TaskData({"input_ids": ids, "attention_mask": mask}))
    return merger.model.state_dict()


def decompositions() -> dict[str, Tensor]:
    """`svd_lowrank` of every spectrum, tall and wide, alone and in a batch."""
    found: dict[str, Tensor] = {}
    for name in spectra.SPECTRA:
        matrices = [
            spectra.matrix(name, m, n, 8, seed) for seed, (m, n) in enumerate([(96, 64), (40, 120), (64, 64)])
        ]
        for kind, given in (("list", matrices), ("batch", torch.stack([matrices[2], -matrices[2]]))):
            for part, value in zip("USV", mingle.linalg.svd_lowrank(given, 8, seed=3), strict=True):
                for i, tensor in enumerate(value):
                    found[f"{name}, {kind} {i}: {part}"] = tensor
    return found


def layer(backend: str, reduce: str) -> dict[str, Tensor]:
    """A `MingleLinear` of three experts: y and the gradients of x and of the newest gate."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    linear = torch.nn.Linear(48, 80)
    with torch.no_grad():
        linear.weight.copy_(normal(80, 48) / 7)
        linear.bias.copy_(normal(80))
    own = mingle.MingleLinear.from_linear(linear, reduce)
    own.backend = backend
    for rank in (5, 16, 3):
        own.add_expert(normal(rank, 48) / 7, normal(80, rank), gate_weight=normal(48) / 7, gate_bias=0.5)
    x, dy = normal(4, 10, 48).requires_grad_(), normal(4, 10, 80)
    y = own(x)
    gradients = torch.autograd.grad(y, [x, own.gate_weight, own.gate_bias], dy)
    return {"y": y, **dict(zip(("x", "gate_weight", "gate_bias"), gradients, strict=True))}


def cases() -> dict[str, Callable[[], dict[str, Tensor]]]:
    """Everything that is recorded, by name."""
    found: dict[str, Callable[[], dict[str, Tensor]]] = {"svd_lowrank": decompositions}
    for backend in ("eager", "grouped"):
        for reduce in ("token", "sample", "batch"):
            found[f"layer, {backend}, {reduce}"] = partial(layer, backend, reduce)
    for method in T5_METHODS:
        found[f"t5, {method}"] = partial(t5_merge, method)
    for method in RECORDED_METHODS:
        for protocol in ("strict", "official"):
            found[f"glyphs4, {method}, {protocol}"] = partial(glyph_merge, method, protocol)
    return found


#: the methods of version 0.1.0
RECORDED_METHODS = (
    "pre-trained", "individual", "average", "task-arithmetic", "ties", "magmax", "consensus-ta", "opcm",
    "adamerging", "wemoe", "nufilt", "mingle", "mingle-light", "mingle-seq", "routed",
)  # fmt: skip


def main(target: Path) -> None:
    recorded = {}
    for name, compute in cases().items():
        with steady():
            recorded[name] = digest(compute())
        print(name, recorded[name]["sha256"][:12], flush=True)
    target.write_text(json.dumps({"processor": processor(), "cases": recorded}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
