"""The names that tensors of a checkpoint have in the model that transformers makes of it.

transformers 5 has renamed tensors of some architectures and packs the experts of mixtures into one tensor,
while their files go on using the names that they always had.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mingle.io.files import CheckpointError
from mingle.io.lazy_tensors import LazyTensors, Rows
from mingle.options import shown

#: what older versions stored of any model, and is not a parameter now
_ALWAYS_IGNORED = (r"position_ids$", r"rotary_emb\.inv_freq$", r"\.(attn|attention)\.(masked_)?bias$")


@dataclass
class Source:
    """Where a tensor of a model comes from.

    Attributes:
        first: its name in the model; of several tensors that are made together, the first one's.
        files: the names in the checkpoint, each with the pattern in the rule that it matches.
        rule: of transformers, by which the tensor is put together; None where only its name differs.
    """

    first: str
    files: dict[str, str] = field(default_factory=dict)
    rule: Any = None


class ModelTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint under the names that they have in a model, each made when it is asked for.

    The checkpoint may be of a model with another head, or with none.  What older versions stored and is not a
    parameter now is left out.

    Args:
        model: of transformers; any other has the same names as its checkpoints.
        names: in the checkpoint.
        read: gives the checkpoint's tensors by these names.
        strip: take away what a model with a head puts before the names of one without, if `model` has none.
            What is not part of such a model can then no longer be told from a head.
        where: the checkpoint is, for messages.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        read: Callable[[str], Tensor],
        *,
        strip: bool,
        where: str = "the tensors",
    ) -> None:
        self.model, self._read, self._where = model, read, where
        self._sources = _sources(model, names, strip)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __getitem__(self, name: str) -> Tensor:
        """The tensor in its stored dtype."""
        return self._made(name, self._read)

    def file_of(self, name: str) -> str | None:
        """The name of the tensor in the checkpoint; None where it is put together, perhaps of several."""
        source = self._sources[name]
        return next(iter(source.files)) if source.rule is None else None

    def _made(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor, from what `read` gives.

        Raises:
            CheckpointError: tensors that cannot be put together.
        """
        source = self._sources[name]
        given = {file: read(file) for file in source.files}
        first = next(iter(given))
        if source.rule is None:
            return given[first]
        from mingle.tasks.configs import broken

        rule, config = copy.deepcopy(source.rule), getattr(self.model, "config", None)
        for file, tensor in given.items():
            rule.add_tensor(source.first, file, source.files[file], tensor)
        try:
            made = rule.convert(source.first, model=self.model, config=config)[name]
        except broken() as error:
            others = f" and {len(given) - 1} more" if len(given) > 1 else ""
            reason = f"{first!r}{others} do not make {name!r}: {shown(str(error))}"
            raise CheckpointError(f"{self._where}: {reason}") from None
        result: Tensor = made[0] if isinstance(made, list) else made
        return result


def _sources(model: nn.Module, names: Iterable[str], strip: bool) -> dict[str, Source]:
    """Name in the model → where the tensor is in a checkpoint with these names."""
    if not hasattr(model, "config") or not hasattr(model, "base_model_prefix"):
        return {name: Source(name, {name: ""}) for name in sorted(names)}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    whole: Any = model
    rules: list[Any] = get_model_conversion_mapping(whole)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    state, prefix = whole.state_dict(), whole.base_model_prefix or None
    if not strip and not any(name.startswith(f"{prefix}.") for name in state):
        prefix = None
    ignored = [*_ALWAYS_IGNORED, *(whole._keys_to_ignore_on_load_unexpected or ())]
    found: dict[str, Source] = {}
    for name in sorted(names, key=dot_natural_key):  # experts are packed in this order
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:  # the file has the model's names already
            renamed, pattern = name, None
        rule = next((rule for rule in converters if pattern in rule.source_patterns), None)
        if rule is None and renamed not in state and any(re.search(each, name) for each in ignored):
            continue
        targets = [renamed]
        if rule is not None:
            first, *others = rule.target_patterns
            targets += [renamed.replace(first, other, 1) for other in others]
        for target in targets:
            found.setdefault(target, Source(renamed, rule=rule)).files[name] = pattern or ""
    return found


class InFiles(LazyTensors):
    """The same as `in_files`, of tensors that are made when they are asked for.

    Tensors of which files hold parts under names of their own, as of packed experts, are taken apart whole.

    Args:
        model: the model or its skeleton.
        tensors: by their names in it; all that belong together.

    Raises:
        ValueError: tensors of which files hold something made of several.
    """

    def __init__(self, model: nn.Module, tensors: LazyTensors) -> None:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import dot_natural_key

        self._model, self._tensors, names = model, tensors, list(tensors)
        if isinstance(model, PreTrainedModel):  # in which order they are for one that was loaded
            names.sort(key=dot_natural_key)
        whole = in_files(model, {name: tensors.described(name) for name in names})
        super().__init__(whole)
        self._described = whole
        self._source = {name: name for name in names if name in whole}
        for name in names:
            if name not in whole:
                self._source |= dict.fromkeys(in_files(model, {name: tensors.described(name)}), name)
        if self._source.keys() != whole.keys():
            strange = sorted(self._source.keys() ^ whole.keys())[0]
            raise ValueError(
                f"files of a {type(model).__name__} hold {strange!r}, which is made of several tensors"
            )
        self._apart: dict[str, dict[str, Tensor]] = {}

    def described(self, name: str) -> Tensor:
        return self._described[name]

    def rows(self, name: str, rows: Rows) -> Tensor:
        source = self._source[name]
        if source == name:
            return self._tensors.rows(name, rows)
        if source not in self._apart:
            for oldest in list(self._apart)[:-1]:  # the parts of two tensors follow one another in turn
                del self._apart[oldest]
            self._apart[source] = in_files(self._model, {source: self._tensors[source]})
        return self._apart[source][name][rows]

    def in_rows(self, name: str) -> bool:
        return self._source[name] == name and self._tensors.in_rows(name)


def in_files(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model as its files have them, for programs that know no others.

    Args:
        model: the model, with the names of the files that it was loaded from, if any.
        tensors: by their names in it; all that belong together.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(model, PreTrainedModel):
        return dict(tensors)
    found: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return found
