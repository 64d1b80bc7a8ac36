"""The names of a classifier's classes, as its configuration has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mingle.io.files import CheckpointError
from mingle.io.state_dicts import IncompatibleModel
from mingle.options import shown
from mingle.tasks.configs import CONFIG, read_config

#: what transformers calls classes without names
_NUMBERED = re.compile(r"LABEL_\d+")
#: for a head that does something else
ONE_CLASS = (
    "merged are classifiers that give every sample one of several classes; for others give a task_type of "
    "your own, see mingle.tasks.TaskType"
)
_OTHER_PROBLEMS = ("regression", "multi_label_classification")


def labels_of(config: Path | Any) -> tuple[str, ...] | None:
    """The names of the classes by number; None where they have none.

    Args:
        config: a fine-tuned model's folder, its configuration, an object of transformers, or None.

    Raises:
        IncompatibleModel: a head whose answer is not one class per sample.
        CheckpointError: a folder whose configuration is broken.
    """
    where, content = "its configuration", config.to_dict() if hasattr(config, "to_dict") else {}
    if isinstance(config, Path) and (config / CONFIG).exists():
        where, content = str(config / CONFIG), read_config(config)
    problem = content.get("problem_type")
    if problem in _OTHER_PROBLEMS:
        raise IncompatibleModel(f"{where}: problem_type is {problem!r}; {ONE_CLASS}")
    listed = content.get("id2label")
    if not listed:
        return None
    if not isinstance(listed, Mapping) or not all(isinstance(label, str) for label in listed.values()):
        raise CheckpointError(f"{where}: id2label: {shown(listed)}: expected a text for each class")
    by_number = {str(number): label for number, label in listed.items()}
    if by_number.keys() != {str(number) for number in range(len(by_number))}:
        raise CheckpointError(f"{where}: id2label: {shown(listed)}: expected the classes 0, 1, 2, …")
    labels = tuple(by_number[str(number)] for number in range(len(by_number)))
    return None if all(map(_NUMBERED.fullmatch, labels)) else labels
