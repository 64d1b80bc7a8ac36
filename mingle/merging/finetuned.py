"""A fine-tuned model beside its base, in whatever form it comes: its tower, and what is not merged."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mingle.io.adapter_config import CONFIG as ADAPTER_CONFIG
from mingle.io.files import CheckpointError
from mingle.io.lazy_tensors import Joined, Rows, described, in_rows, row_blocks, rows_of
from mingle.io.state_dicts import IncompatibleModel, first_names, non_finite, own_names, same_values
from mingle.kernels.dtypes import wide
from mingle.merging.adapter_fit import AdapterFit, as_matrix
from mingle.merging.vocabulary import Growth, Vocabulary, growth
from mingle.nn import adapter_files
from mingle.nn.adapter_files import Change
from mingle.nn.matrices import packed_experts
from mingle.tasks import TaskType
from mingle.tasks.configs import check_same_computation
from mingle.tasks.loading import ModelCheckpoint, absent, computed
from mingle.tasks.names import ModelTensors

#: a module, a state dict, or a local folder: a checkpoint of the whole model or of its tower, or a PEFT LoRA
#: adapter
Model = nn.Module | Mapping[str, Tensor] | str | Path
_SHOWN = 5


@contextmanager
def of_tasks(*names: str) -> Iterator[None]:
    """A block whose errors about models say of which tasks they are."""
    try:
        yield
    except (IncompatibleModel, CheckpointError) as error:
        told = f"task{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}"
        raise type(error)(f"{told}: {error}") from None


class FineTuned:
    """A fine-tuned model whose names, shapes, ties and settings were found to be those of the base.

    Only what these need is read when it is made; other weights are read when they are asked for.

    Args:
        model: the fine-tuned model.
        base: the whole base model; on the meta device, nothing can be asked for that needs its values.
        task: its task type.
        vocabulary: see `mingle.Merger`.
        base_folder: where the base is from, whose tokenizer tells which tokens are new.

    Raises:
        IncompatibleModel: not a fine-tuned version of the base.
        CheckpointError: a broken checkpoint.
    """

    def __init__(
        self,
        model: Model,
        base: nn.Module,
        task: TaskType,
        vocabulary: Vocabulary = "same",
        base_folder: Path | None = None,
    ) -> None:
        inside = task.tower(base)
        tower = base.get_submodule(inside)
        #: what may stand before the tower's names
        self._prefixes = task.prefixes(base)
        #: the base's tensors, its tower and that one's tensors, and what comes before the latter's names in
        #: the former
        self.whole, self.tower, self.base = base.state_dict(), tower, tower.state_dict()
        self.prefix = f"{inside}." if inside else ""
        #: every name, of the whole and of the tower → the first name of the same tensor
        self.whole_first, self.first = first_names(base), first_names(tower)
        #: what an adapter makes of the tower's weights, by their names, and of others, by the whole model's
        self.adapter: dict[str, Change] = {}
        self.beside: dict[str, Change] = {}
        #: the model's tensors, on the meta device where they are yet to be read, and the base tower's names →
        #: their own; an adapter may have none
        self.held: Mapping[str, Tensor] = {}
        self.own: dict[str, str] = {}
        #: the tensors that the task has of its own, by the names that they have in the whole model, and the
        #: names of the classes that they tell apart, where there are any
        self.head_names = task.heads(base)
        self.labels: tuple[str, ...] | None = None
        #: where they are read
        self._source: Mapping[str, Tensor]
        #: what the model's vocabulary has beyond the base's
        self.growth = Growth((0, 0))
        config: Any = model
        if isinstance(model, nn.Module):
            self.held, config = model.state_dict(), getattr(model, "config", None)
            self._source = self.held
        elif isinstance(model, Mapping):
            self.held = dict(ModelTensors(base, model, model.__getitem__, strip=False))
            config = None
            self._source = self.held
        elif ((folder := Path(model)) / ADAPTER_CONFIG).exists():
            self._take_adapter(folder, base, task, vocabulary, base_folder)
            return
        else:
            checkpoint, config = ModelCheckpoint(folder, base, strip=False), folder
            self._source = checkpoint
            self.held = {name: checkpoint.described(name) for name in checkpoint}
        own_folder = None if isinstance(model, nn.Module | Mapping) else folder
        self._fit_vocabulary(vocabulary, (base_folder, own_folder))
        may_lack = (set(task.optional(base)) | computed(base)) - set(self.head_names)
        optional = {name.removeprefix(self.prefix) for name in may_lack}
        self.own = own_names(self.base, self.held, self._prefixes, self.first, optional)
        self._check_ties()
        self._check_head(task, config)
        if config is not None and hasattr(base, "config"):
            check_same_computation(base.config, task.config_part, config)

    def _take_adapter(
        self,
        folder: Path,
        base: nn.Module,
        task: TaskType,
        vocabulary: Vocabulary,
        base_folder: Path | None,
    ) -> None:
        """Take on what a LoRA adapter's folder holds; all else is as in the base, if it is there."""
        adapter = adapter_files.read(folder)
        kept = {name: self.whole[name] for name in self.head_names if name not in absent(base)}
        self.held = kept | {name: adapter.saved.described(name) for name in adapter.saved}
        self._source = Joined(kept, adapter.saved)
        self._fit_vocabulary(vocabulary, (base_folder, folder))
        fit = AdapterFit(adapter, base, task, self.held)
        self.own, self.adapter, self.beside = fit.whole, fit.changes, fit.beside
        self._check_ties()
        own_head = any(name in adapter.saved for name in self.head_names)
        self._check_head(task, None if own_head else getattr(base, "config", None))

    def _fit_vocabulary(self, vocabulary: Vocabulary, folders: tuple[Path | None, Path | None]) -> None:
        """Take of a larger vocabulary what the base has too, or refuse it."""
        self.growth = growth(self.tower, self.base, self.first, self.held, self._prefixes, folders)
        if self.growth.shapes:
            if vocabulary == "same":
                raise IncompatibleModel(
                    f"its vocabulary has more than the base's: {self.growth}; with vocabulary 'base', what "
                    "both have is merged"
                )
            self.held = {name: self.growth.cut(name, tensor) for name, tensor in self.held.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The fine-tuned tower under the base's names; with a LoRA adapter's change in the layers it names.

        Each is a copy on the base's device, in float32, or in float64 where the base is.

        Raises:
            IncompatibleModel, CheckpointError: NaN or infinite weights; the message names the tensor, their
                number and where the first is.
        """
        return {name: self.tensor(name, self.base[name]) for name in self.base}

    def tensor(self, name: str, base: Tensor, rows: Rows = ...) -> Tensor:
        """One of `tensors`, with its errors.

        Args:
            name: of a tensor of the base tower.
            base: that tensor, which in a base on the meta device has no values.
            rows: which rows of the tensor are wanted, if `in_rows`; those of the base are given.
        """
        own, change = self.own.get(name), self.adapter.get(name)
        if own is None:
            tensor = base.to(wide(base), copy=True)
        else:
            # what an adapter changes is all of a larger vocabulary, as lengths of rows may count all of it
            read = self._read(own, rows) if change is None else self._source[own]
            tensor = read.detach().to(base.device, wide(base), copy=True)
        if change is not None:
            change.apply_(as_matrix(tensor, self.tower.get_submodule(name.removesuffix(".weight"))))
            tensor = tensor if own is None else self.growth.cut(own, tensor)
        if found := non_finite(tensor):
            if rows is not ...:
                return self.tensor(name, base)  # which raises with what is wrong with all of it
            raise IncompatibleModel(f"{name}: {found}")
        return tensor

    def in_rows(self, name: str) -> bool:
        """Whether rows of a tensor of the base tower take less memory than all of it."""
        return name not in self.adapter and (name not in self.own or in_rows(self._source, self.own[name]))

    def _read(self, name: str, rows: Rows = ...) -> Tensor:
        """One of the model's own tensors, or rows of it; of a larger vocabulary what the base has too."""
        return self.growth.cut(name, rows_of(self._source, name, rows))

    def head(self, base: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The tensors that the task has of its own, by the names that they have in the whole base model.

        Args:
            base: the whole base's tensors, where the base model is on the meta device.

        Raises:
            IncompatibleModel, CheckpointError: NaN or infinite values; the message names the tensor.
        """
        tensors = {name: self._read(name).detach() for name in self.head_names}
        if base is not None:  # an adapter may leave the base's head as it is
            tensors = {name: base[name] if t.is_meta else t for name, t in tensors.items()}
        tensors = {name: self._changed(name, tensor.clone()) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            if found := non_finite(tensor):
                raise IncompatibleModel(f"{name}: {found}")
        return tensors

    def left(self, merged: Collection[str], base: Mapping[str, Tensor] | None = None) -> list[str]:
        """What fine-tuning changed and merging leaves out, in words.

        There is a line for what stays as in the base, packed experts first, as they are most of a model, and
        one for what the base does not have.

        Args:
            merged: the names of the tower's tensors that are merged.
            base: where the base's values are; None where the base model itself holds them.
        """
        kept = {self.first[name] for name in merged}
        own = set(self.head_names)
        unmerged = [
            name for name in self.base if self.first[name] not in kept and self.prefix + name not in own
        ]
        inside = {self.own[name]: self.prefix + name for name in unmerged if name in self.own}
        taken = set(self.own.values()) | own
        # What the tower does not take is under the whole model's names, if the rest of the model is there.
        others = [name for name in self.held if name not in taken and not name.endswith("position_ids")]
        compared = inside | {name: name for name in others if name in self.whole}
        changed = [self.prefix + name for name in unmerged if name in self.adapter]
        changed += [name for name in self.beside if name not in own]
        changed += [
            name for own, name in compared.items() if name not in changed and self._differs(own, name, base)
        ]
        packed = {self.prefix + name for name in packed_experts(self.tower)}
        changed.sort(key=lambda name: name not in packed)
        lines = self._lines(changed, [name for name in others if name not in self.whole])
        new = str(self.growth)
        return [*lines, f"not in the base's vocabulary and left out: {new}"] if new else lines

    def _changed(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the head as an adapter makes it."""
        if name not in self.beside:
            return tensor
        changed = tensor.to(wide(tensor), copy=True)
        self.beside[name].apply_(changed)
        return changed.to(tensor)

    def _differs(self, own: str, name: str, base: Mapping[str, Tensor] | None) -> bool:
        """Whether the model's tensor `own` is another than the whole base's tensor `name`."""
        values, source = self.whole if base is None else base, name
        if base is not None:  # a file may hold any one of the names that are tied together
            ties = (other for other in self.whole if self.whole_first[other] == self.whole_first[name])
            source = next(other for other in ties if other in base)
        if described(values, source).shape != self.held[own].shape:
            return True
        divided = in_rows(values, source) and in_rows(self._source, own)
        for rows in row_blocks(self.held[own]) if divided else [...]:
            before = rows_of(values, source, rows)
            if not same_values(self._read(own, rows).to(before.device), before):
                return True
        return False

    def _check_ties(self) -> None:
        """Refuse tensors that the base ties together and that differ in this model: one would be lost."""
        sources: dict[str, str] = {}
        for name, own in self.own.items():
            source = sources.setdefault(self.first[name], own)
            if source != own and not same_values(self._read(source), self._read(own)):
                raise IncompatibleModel(
                    f"{own!r} and {source!r} are one tensor in the base and differ in this model, so that no "
                    "merge can keep both; give a base whose file holds both, apart from each other"
                )

    def _check_head(self, task: TaskType, config: Any) -> None:
        """Refuse a model without a head where each task has one; note the names of its classes.

        Args:
            task: the task type.
            config: the model's folder or its configuration; None where there is neither.
        """
        if missing := [name for name in self.head_names if name not in self.held]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise IncompatibleModel(
                f"no head, which each task has of its own: {missing[0]}{more} missing; give the whole "
                "fine-tuned model, or an adapter that was saved with its head (modules_to_save)"
            )
        self.labels = task.labels({name: self.held[name] for name in self.head_names}, config)

    def _lines(self, changed: Iterable[str], unknown: Iterable[str]) -> list[str]:
        lines = []
        for reason, names in (
            ("changed by fine-tuning and left as in the base", changed),
            ("not in the base and left out", unknown),
        ):
            kinds = Counter(map(self._kind, names))
            listed = [f"{kind} ({count} tensors)" if count > 1 else kind for kind, count in kinds.items()]
            more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
            if listed:
                lines.append(f"{reason}: {', '.join(listed[:_SHOWN])}{more}")
        return lines

    def _kind(self, name: str) -> str:
        """Tensors of the tower count as alike where only numbers differ, others by the part they are in."""
        return re.sub(r"\d+", "*", name) if name.startswith(self.prefix) else name.partition(".")[0]
