"""Fine-tuned models whose vocabulary grew: which rows the base has too, and which tokens are new."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from mingle.io.state_dicts import IncompatibleModel
from mingle.io.tokens import has_vocabulary, tokens
from mingle.options import nearest, shown
from mingle.tasks.token_ids import token_embeddings

#: what fine-tuned models may have: the same vocabulary as the base, or a larger one, from which the rows that
#: the base has too are merged
Vocabulary = Literal["same", "base"]
_SHOWN = 8


def check_vocabulary(value: Any) -> None:
    """Raise `ValueError` unless the value is one of `Vocabulary`."""
    known = get_args(Vocabulary)
    if value not in known:
        raise ValueError(
            f"vocabulary {shown(value)}{nearest(str(value), known)}: expected one of {', '.join(known)}"
        )


@dataclass(frozen=True)
class Growth:
    """What a fine-tuned model's vocabulary has beyond the base's.

    Attributes:
        rows: how many embeddings the base has, and the fine-tuned model.
        shapes: the shapes that the base has of the fine-tuned model's tensors with a row per token.
        new: the new tokens, where tokenizers tell.
    """

    rows: tuple[int, int]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    new: tuple[str, ...] = ()

    def __str__(self) -> str:
        first, end = self.rows
        names = ", ".join(map(repr, self.new[:_SHOWN]))
        more = f" and {len(self.new) - _SHOWN} more" if len(self.new) > _SHOWN else ""
        rows = f"row {first}" if end == first + 1 else f"rows {first} to {end - 1}"
        return " ".join(
            filter(None, (rows if end > first else "", f"with the tokens {names}{more}" if names else ""))
        )

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """The part of the fine-tuned model's tensor `name` that the base has too."""
        shape = self.shapes.get(name, tensor.shape)
        return tensor[tuple(map(slice, shape))]


def growth(
    tower: nn.Module,
    base: Mapping[str, Tensor],
    first: Mapping[str, str],
    tuned: Mapping[str, Tensor],
    prefixes: Iterable[str],
    folders: tuple[Path | None, Path | None],
) -> Growth:
    """How a fine-tuned model's vocabulary differs from the base's; only shapes count.

    Args:
        tower: the base's, and
        base: its tensors.
        first: its `mingle.io.state_dicts.first_names`.
        tuned: the fine-tuned model's tensors.
        prefixes: see `mingle.io.state_dicts.own_names`.
        folders: of the base and of the fine-tuned model, with their tokenizers, where there are any.

    Raises:
        IncompatibleModel: a smaller vocabulary.
    """
    in_base = {f"{prefix}{name}": name for prefix in ("", *prefixes) for name in base}
    held = {name: in_base[name] for name in tuned if name in in_base}
    embeddings = first.get(_embeddings(tower))
    found = next((tuned[name].shape[0] for name, known in held.items() if first[known] == embeddings), None)
    if embeddings is None or found is None:
        return Growth((0, 0))
    rows = base[embeddings].shape[0]
    if found < rows:
        raise IncompatibleModel(
            f"its vocabulary has {found} rows and the base's {rows}: a vocabulary may only grow"
        )
    shapes = {
        name: tuple(base[known].shape)
        for name, known in held.items()
        if found > rows and _grew(base[known], tuned[name], rows, found)
    }
    return Growth((rows, found), shapes, _new(*folders, rows))


def _embeddings(tower: nn.Module) -> str:
    """The name of the tower's token embeddings; empty where it has none."""
    found = token_embeddings(tower)
    return next((f"{name}.weight" for name, module in tower.named_modules() if module is found), "")


def _grew(base: Tensor, tuned: Tensor, rows: int, found: int) -> bool:
    """Whether the shapes differ, and in nothing but the number of tokens."""
    pairs = list(zip(base.shape, tuned.shape, strict=False))
    return base.dim() == tuned.dim() and {(a, b) for a, b in pairs if a != b} == {(rows, found)}


def _new(base: Path | None, tuned: Path | None, rows: int) -> tuple[str, ...]:
    """The fine-tuned model's tokens that the base's tokenizer does not have, in order."""
    if tuned is None:
        return ()
    known = set(tokens(base).values()) if base is not None and has_vocabulary(base) else None
    return tuple(
        token
        for number, token in sorted(tokens(tuned).items())
        if (number >= rows if known is None else token not in known)
    )
