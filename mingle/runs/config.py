"""The YAML file of ``merge`` and ``check``, read into dataclasses; every mistake in it is found here.

    base: models/clip-vit-base-patch32        # a local folder, or a hub id
    method: mingle                            # without it, `mingle.methods.DEFAULT`
    task_type: text-classification            # where the base's own head does not say what it is
    experts:                                  # each a folder in hub format, a LoRA adapter, or a hub id
      - {name: svhn, model: models/clip-vit-base-patch32_svhn}
      - {name: gtsrb, model: tanganke/clip-vit-base-patch32_gtsrb, revision: 1a2b3c…}
    order: {shuffle: false, seeds: [42]}
    layers: [self_attn.q_proj, mlp.fc1]       # exact suffixes
    rank: 64
    gate: {k: 3, gamma: 1.0, beta: 0.99, reduce: sample}
    adapt: {steps: 50, lr: 1.0e-4, batch_size: 16, samples_per_class: 5, temperature: 2.0, protocol: strict}
    eval: {suite: images/, every_step: true, batch_size: 128}
    vocabulary: same                          # or base: of models with new tokens, merge the rows both have
    dtype: float32                            # or bfloat16, float16: of the base and the merged model
    keep: 3                                   # generations; without it, all are kept
    shard: auto                               # always, never: whether processes share out the weights
    options: {constraint: hard}               # anything else the method takes
    revisions: {datasets/ylecun/mnist: 4d5…}  # commits of hub models and data sets

Method options that are not in the file are those that the suite recommends for its models, or else those
published for that many tasks: see `mingle.runs.settings`.  Of a hub model or data set without a revision, the
commit found first is kept.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mingle import methods, tasks
from mingle.merging.opened import ADAPTATION
from mingle.merging.vocabulary import Vocabulary
from mingle.options import OptionError, build, refuse_unknown, require_positive, shown
from mingle.runs import strict_yaml
from mingle.runs.sharding import Shard
from mingle.suites.protocol import PROTOCOLS
from mingle.tasks.precision import Precision


@dataclass(frozen=True)
class Expert:
    """One fine-tuned model.

    Attributes:
        name: the task's name.
        model: a local folder or hub id of a fine-tuned model or a LoRA adapter.
        revision: a commit, branch or tag of the hub model.
    """

    name: str
    model: str
    revision: str | None = None


@dataclass(frozen=True)
class Order:
    """The order of arrival.

    Attributes:
        shuffle: merge in the orders that `seeds` give, once in each, instead of in the order listed.
        seeds: see `mingle.runs.orders`.
    """

    shuffle: bool = False
    seeds: tuple[int, ...] = (42,)

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: expected at least one, and none of them twice")


@dataclass(frozen=True)
class Gate:
    """Options of the gates; None leaves the suite's or the published setting."""

    k: int | None = None
    gamma: float | None = None
    beta: float | None = None
    reduce: Literal["token", "sample", "batch"] | None = None


@dataclass(frozen=True)
class Adapt:
    """Options of the adaptation; None leaves the suite's or the published setting."""

    steps: int | None = None
    lr: float | Literal["auto"] | None = None
    batch_size: int | None = None
    micro_batch_size: int | None = None
    temperature: float | None = None
    samples_per_class: int = 5
    protocol: Literal["strict", "official"] = "strict"


@dataclass(frozen=True)
class Eval:
    """Options of the evaluation.

    Attributes:
        suite: where seed and test samples come from.
        every_step: whether to evaluate after every merge, not only after the last.
        batch_size: samples per batch.
    """

    suite: str | None = None
    every_step: bool = True
    batch_size: int = 128

    def __post_init__(self) -> None:
        require_positive(self, "batch_size")


@dataclass(frozen=True)
class MergeConfig:
    """A merge, with the keys of the file that the module describes."""

    base: str
    experts: tuple[Expert, ...]
    method: str = methods.DEFAULT
    task_type: str | None = None
    order: Order = field(default_factory=Order)
    layers: tuple[str, ...] | None = None
    rank: int | None = None
    gate: Gate = field(default_factory=Gate)
    adapt: Adapt = field(default_factory=Adapt)
    eval: Eval = field(default_factory=Eval)
    vocabulary: Vocabulary = "same"
    dtype: Precision = "float32"
    keep: int | None = None
    shard: Shard = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.keep is not None:
            require_positive(self, "keep")

    def method_options(self) -> dict[str, Any]:
        """The file's settings of the method, under the method's own option names.

        Raises:
            OptionError: an option that the method does not have, or gates that the protocol does not allow.
        """
        adapt = {name: getattr(self.adapt, name) for name in ADAPTATION}
        given = {"rank": self.rank, "layers": self.layers, **asdict(self.gate), **adapt}
        given = {name: value for name, value in given.items() if value is not None} | self.options
        build(methods.get(self.method).Options, given, f"method {self.method!r}")
        if given.get("reduce") == PROTOCOLS["official"] and self.adapt.protocol == "strict":
            reason = (
                "with batch gates predictions depend on the batch, which the strict protocol does not allow"
            )
            raise OptionError(f"gate: reduce: {reason}")
        return given


_SECTIONS: dict[str, type] = {"order": Order, "gate": Gate, "adapt": Adapt, "eval": Eval}


def load(path: str | Path) -> MergeConfig:
    """The config in a YAML file.

    Raises:
        OptionError: bad YAML, an unknown key (the message names the nearest known one), or a value of the
            wrong type; the message names the file.
    """
    return parse(strict_yaml.read(Path(path)), str(path))


def parse(content: Any, where: str) -> MergeConfig:
    """A config from plain data; `where` names its source in errors."""
    if not isinstance(content, dict):
        raise OptionError(
            f"{where}: expected a mapping with the keys {', '.join(f.name for f in fields(MergeConfig))}"
        )
    refuse_unknown(content, [f.name for f in fields(MergeConfig)], where)
    for key in ("base", "experts"):
        if key not in content:
            raise OptionError(f"{where}: {key!r} is missing")
    given = dict(content)
    for key, section in _SECTIONS.items():
        if key in given:
            given[key] = build(section, _mapping(given[key], f"{where}: {key}"), f"{where}: {key}")
    if not isinstance(given["experts"], list) or not given["experts"]:
        raise OptionError(f"{where}: experts: expected a list of {{name, model}}")
    given["experts"] = tuple(
        build(Expert, _mapping(entry, f"{where}: experts[{i}]"), f"{where}: experts[{i}]")
        for i, entry in enumerate(given["experts"])
    )
    config = build(MergeConfig, given, where)
    names = [expert.name for expert in config.experts]
    if "" in names:
        raise OptionError(f"{where}: experts[{names.index('')}]: name: a task needs a name")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise OptionError(f"{where}: experts: two of them are called {twice!r}")
    try:
        if config.task_type is not None:
            tasks.get(config.task_type)
        config.method_options()
    except ValueError as error:
        unnamed = "" if "method" in given else f"; the file names no method, which means {config.method!r}"
        raise OptionError(f"{where}: {error}{unnamed}") from None
    return config


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise OptionError(f"{where}: {shown(value)} is not a mapping")
    return value
