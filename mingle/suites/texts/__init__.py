"""The text suites: eight real classifications of short texts, and a real pre-trained sentence encoder.

The base is sentence-transformers/all-MiniLM-L6-v2, which a package of its own brings along (the extra
``texts``), or the hub.  The tasks come from free sources: see `mingle.suites.texts.corpus`.  Experts, and
chains of models each fine-tuned from the one before, are trained on first use into the user's cache, in one
to four minutes each on one CPU core.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

from mingle.io.hub import Revisions
from mingle.kernels import store
from mingle.suites import OnTraining, Suite
from mingle.suites.protocol import Labels, SeedRequest
from mingle.suites.texts import finetune
from mingle.suites.texts.base import TextBase, find_base
from mingle.suites.texts.corpus import TextTask, labelled, read_tasks
from mingle.suites.trained import trained
from mingle.tasks import TaskData

NAMES = ("texts8", "texts-tuning")
_MINGLES = ("mingle", "mingle-light", "mingle-routed")
#: Chosen by ``examples/text_data/tuning.py`` on the tasks of ``texts-tuning``, which ``texts8`` has none of;
#: for the other methods that learn the rule took the published settings.
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"rank": 32, "lr": 1e-3, "gamma": 0.3} for name in _MINGLES},
    "nufilt": {"lr": 1e-2},
}


def load(
    name: str,
    base: Path | None,
    request: SeedRequest,
    on_training: OnTraining | None = None,
    revisions: Revisions | None = None,
) -> Suite:
    """A text suite by name; see `mingle.suites.load`.

    The experts are fine-tuned from `base`, whatever it is.
    """
    tasks = read_tasks(name)

    @cache
    def prepared() -> TextBase:
        return TextBase(base or find_base(revisions))

    def expert(name: str, after: tuple[str, ...] = ()) -> Path:
        chain = [tasks[earlier] for earlier in (*after, name)]
        return expert_folder(prepared(), chain, on_training)

    return Suite(
        name,
        "sentence-encoder",
        base or (lambda: prepared().folder),
        {task.name: partial(_samples, task, prepared) for task in tasks.values()},
        {task.name: partial(expert, task.name) for task in tasks.values()},
        request,
        SETTINGS,
        continued=expert,
        training={task.name: partial(_training, task, prepared) for task in tasks.values()},
        labels={task.name: partial(_labels, task) for task in tasks.values()},
        checks={task.name: partial(_check, task, prepared) for task in tasks.values()},
        revisions=revisions,
    )


def expert_folder(base: TextBase, chain: Sequence[TextTask], on_training: OnTraining | None = None) -> Path:
    """The folder of the last task's model, at the end of a chain of models that starts from the base.

    Each model of a chain is fine-tuned from the one before; a single task's starts from the base.  A model is
    kept by the contents of the base and of all tasks of its chain, in order, and by the settings of training:
    chains that begin alike share the models of their common beginning.
    """
    *before, task = chain
    start = expert_folder(base, before, on_training) if before else None
    config = finetune.FinetuneConfig()
    content = [base.digest, *(earlier.name + earlier.digest for earlier in chain), str(asdict(config))]
    key = hashlib.sha256("\n".join(content).encode()).hexdigest()[:12]
    return trained(
        store.cache_folder() / "texts" / f"{task.name}-{key}",
        lambda folder: finetune.finetune(
            base, task, folder, config, partial(on_training, task.name) if on_training else None, start
        ),
    )


def _labels(task: TextTask) -> Labels:
    return Labels(labelled(task.test)[1], task.class_names)


def _check(task: TextTask, prepared: Callable[[], TextBase]) -> None:
    prepared().check(task.class_names)


def _samples(task: TextTask, prepared: Callable[[], TextBase]) -> TaskData:
    """All test texts of a task."""
    base, (texts, labels) = prepared(), labelled(task.test)
    head = {"text_embeds": base.head(task.class_names)}
    return TaskData(base.tokens(texts), head, labels, class_names=tuple(task.class_names))


def _training(task: TextTask, prepared: Callable[[], TextBase]) -> TaskData:
    """The texts that fine-tuning sees."""
    base, (texts, _) = prepared(), labelled(task.train)
    head = {"text_embeds": base.head(task.class_names)}
    return TaskData(base.tokens(texts), head, class_names=tuple(task.class_names))
