"""The README of an exported model: what it was made of, how well it does, and what was left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mingle.text import markdown_cell
from mingle.version import __version__


class CardTask(NamedTuple):
    """One merged task.

    Attributes:
        name: the task's name.
        when_merged, now: accuracy in per cent where the task is known, or None where it was not measured.
        unknown: accuracy now where the task has to be found too.
        notes: what is worth knowing, such as parts of the fine-tuned model that were not merged.
    """

    name: str
    when_merged: float | None
    now: float | None
    unknown: float | None
    notes: Sequence[str]


def model_card(title: str, method: str, options: Mapping[str, Any], tasks: Sequence[CardTask]) -> str:
    """Markdown with the metadata that the hub reads at its head.

    Args:
        title: of the page.
        method: by which the models were merged.
        options: of the method.
        tasks: in order of arrival.
    """
    lines = [
        "---",
        "library_name: transformers",
        "tags: [merge, mingle]",
        "---",
        "",
        f"# {markdown_cell(title)}",
        "",
        f"{len(tasks)} fine-tuned models, merged one after another with the method `{method}` by mingle "
        f"{__version__}.",
        "",
        "| task | accuracy when merged | accuracy now | now, task unknown |",
        "|---|---:|---:|---:|",
        *(
            " | ".join([f"| {markdown_cell(t.name)}", *map(_percent, (t.when_merged, t.now, t.unknown))])
            + " |"
            for t in tasks
        ),
    ]
    noted = [f"- {markdown_cell(task.name)}: {markdown_cell(note)}" for task in tasks for note in task.notes]
    if noted:
        lines += ["", "## What to know", "", *noted]
    lines += ["", "## Options", "", "```json", json.dumps(options, indent=2, default=str), "```", ""]
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f} %"
