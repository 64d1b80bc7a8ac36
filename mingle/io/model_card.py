"""The README of an exported model: what it was made of, how well it does, and what was left out.

Of a merger's own folder it is `mingle.io.folder_card`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from mingle.io.hub import ModelName
from mingle.io.licenses import in_conflict
from mingle.text import markdown_cell, visible
from mingle.version import __version__

#: what `MergeMethod` and `Merger` say of a merge: the keys of `mingle.io.manifest.MERGE`
Merge = Mapping[str, Any]
#: task type → what the hub calls it
_PIPELINES = {
    "clip": "zero-shot-image-classification",
    "causal-lm": "text-generation",
    "image-classification": "image-classification",
    "text-classification": "text-classification",
    "sentence-encoder": "sentence-similarity",
}
_UNKNOWN = "not named in its card"
#: how the hub is told that one name does not do
_SEVERAL = {"license": "other", "license_name": "several-see-below"}


def model_card(title: str, merge: Merge, base: ModelName) -> str:
    """Of one model that serves all tasks; Markdown with the metadata that the hub reads at its head."""
    return page(
        head(title, "transformers", ("merge", "mingle"), merge, base),
        f"{_count(merge)} fine-tuned models{of(base)}, merged one after another {_with(merge)}.",
        accuracies(merge),
        end(merge, base),
    )


def folded_card(
    title: str,
    merge: Merge,
    base: ModelName,
    task: str,
    gates: Mapping[str, tuple[float, float, float]],
    samples: int | None,
) -> str:
    """Of a model for one task alone, with experts folded into its weights.

    Args:
        title: of the page.
        merge: what was merged.
        base: what the base is called.
        task: the name of the task.
        gates: name of a task with an expert → the mean, the smallest and the largest of its gates over
            layers.
        samples: how many samples of the task the gates are means over; None where they are not means.
    """
    name, count = markdown_cell(task), _count(merge)
    how = (
        "1 for the task's own expert and 0 for all others"
        if samples is None
        else f"the means over {samples} samples of the task, layer by layer"
    )
    return page(
        head(title, "transformers", ("merge", "mingle"), merge, base),
        f"A model for the task {name}, from {count} fine-tuned models that were merged {_with(merge)}. "
        "In the merged model, gates that depend on the input decide how much of every task's expert is at "
        f"work. Here they are constant, {how}, and the experts are part of the weights: W₀ + Σ g B A. The "
        f"model serves {name} and none of the other tasks; its accuracy was not measured.",
        "| expert | mean gate over layers | smallest | largest |\n|---|---:|---:|---:|\n"
        + "\n".join(
            f"| {markdown_cell(expert)} | {' | '.join(f'{value:.3f}' for value in values)} |"
            for expert, values in gates.items()
        ),
        end(merge, base),
    )


def adapters_card(
    title: str,
    merge: Merge,
    base: ModelName,
    base_class: str | None,
    folders: Sequence[str | None],
    ranks: Mapping[str, str],
    tower: str,
    *,
    classes: int | None,
    chooses: bool,
) -> str:
    """Of a folder of adapters.

    Args:
        title: of the page.
        merge: what was merged.
        base: what the base is called.
        base_class: its class in transformers; None where it is not from there.
        folders: each task's folder, in order; None for those without an adapter.
        ranks: folder → the ranks of its layers, in words.
        tower: the part of the base that the names in the router's tensors count from; empty for all of it.
        classes: how many the head of the first adapter has; None where tasks have no heads of their own.
        chooses: see `mingle.methods.MergeMethod.chooses`.
    """
    called = f"`{visible(base.name or 'the base').replace('`', '')}`"
    revision = f" at commit `{base.revision}`" if base.revision else ""
    rows = [
        f"| {markdown_cell(task['name'])} | "
        + (f"`{folder}/` | {ranks[folder]}" if folder else "none: nothing to merge |")
        + f" | {_measured(merge, i)} |"
        for i, (task, folder) in enumerate(zip(merge["tasks"], folders, strict=True))
    ]
    first, *others = [folder for folder in folders if folder]
    count = ""
    if classes is not None:
        others, count = [], f", num_labels={classes}"  # heads of other sizes fit another base
    code = [
        "from peft import PeftModel",
        *([f"from transformers import {base_class}"] if base_class else []),
        "",
        f"base = {base_class}.from_pretrained({json.dumps(visible(base.name or 'base'))}{count})"
        if base_class
        else "base = ...  # the untouched base model",
        f'model = PeftModel.from_pretrained(base, "{first}", adapter_name="{first}")',
        *(f'model.load_adapter("{folder}", adapter_name="{folder}")' for folder in others[:1]),
        *(f'model.set_adapter("{folder}")  # from here on this one answers' for folder in others[:1]),
    ]
    names = f"; the names of layers count from `{tower}`" if tower else ""
    return page(
        head(title, "peft", ("lora", "merge", "mingle"), merge, base),
        f"{_count(merge)} fine-tuned models of {called}{revision}, merged one after another {_with(merge)}, "
        "as LoRA adapters of the untouched base: one per task.",
        "\n".join(
            [
                "| task | adapter | rank | accuracy when merged | accuracy now | now, task unknown |",
                "|---|---|---|---:|---:|---:|",
                *rows,
            ]
        ),
        "The accuracies are those of the merged model in mingle.",
        "| part | what |\n|---|---|\n"
        "| `<task>/` | a task's expert as a PEFT adapter with a scaling of 1 |\n"
        "| `router.safetensors` | what decides in mingle how much of each expert is at work, and what later "
        f"merges need{names} |\n"
        "| `router.json` | method, options, the tasks in order, whose folder is which, hashes |",
        "## One adapter with PEFT",
        "```python\n" + "\n".join(code) + "\n```",
        "## Which adapter for which input",
        _routing(merge, chooses=chooses),
        "## Back into mingle",
        "`mingle.Merger.from_adapters(base, folder)` is the merged model again, with its router, and takes "
        "further tasks.",
        end(merge, base),
    )


def _routing(merge: Merge, *, chooses: bool) -> str:
    """How well it does to answer every input with one adapter, outside mingle."""
    if not chooses:
        return (
            "In mingle several experts are at work on an input, each by its gates. One adapter alone, at "
            "full strength, is another model: whoever serves these adapters has to know which task an input "
            "belongs to, and the accuracy of that was not measured."
        )
    text = (
        "In mingle a router gives every input to one adapter, or to the base alone: whoever follows it "
        "elsewhere "
    )
    if merge["matrix"] and None not in merge["matrix"][-1]:
        return text + 'has the accuracies above, under "now".'
    return text + "does as well as the merged model, whose accuracy was not measured."


def page(*parts: str) -> str:
    """Parts with an empty line between them; those that are empty left out."""
    return "\n\n".join(part for part in parts if part) + "\n"


def head(title: str, library: str, tags: Sequence[str], merge: Merge, base: ModelName) -> str:
    """The metadata that the hub reads, and the title.

    Args:
        title: of the page.
        library: what loads the folder.
        tags: what it is found by.
        merge: what was merged.
        base: what the base is called.
    """
    models = [base, *map(_model, merge["tasks"])]
    adapters = library == "peft"
    named = [model.hub_id for model in (models[:1] if adapters else models) if model.hub_id]
    metadata: dict[str, Any] = {"library_name": library}
    if ids := list(dict.fromkeys(named)):
        metadata["base_model"] = ids if len(ids) > 1 else ids[0]
        metadata["base_model_relation"] = "adapter" if adapters else "merge"
    if kind := _PIPELINES.get(merge["task_type"]):
        metadata["pipeline_tag"] = kind
    known = {model.license for model in models}
    if None not in known:
        metadata |= {"license": known.pop()} if len(known) == 1 else _SEVERAL
    text = yaml.safe_dump(metadata | {"tags": list(tags)}, sort_keys=False, default_flow_style=None)
    return f"---\n{text}---\n\n# {markdown_cell(title)}"


def licenses(merge: Merge, base: ModelName) -> str:
    """What the cards of base and fine-tuned models name, and a warning where that does not go together."""
    models = [("base", base), *((task["name"], _model(task)) for task in merge["tasks"])]
    if all(model.license is None for _, model in models):
        return ""
    conflict = in_conflict(model.license for _, model in models)
    warning = (
        "**Warning:** these licences differ, and not all of them allow what is made of a model to be passed "
        "on under another. Find out whether this merge may be used and passed on."
    )
    rows = [
        f"| {markdown_cell(name)} | {_called(model)} | {markdown_cell(model.license or _UNKNOWN)} |"
        for name, model in models
    ]
    table = "\n".join(["| | model | licence |\n|---|---|---|", *rows])
    return page("## Licences", warning if conflict else "", table).rstrip("\n")


def left_behind(merge: Merge) -> str:
    """What stays of tasks that were removed."""
    lines = [
        f"- {markdown_cell(task['name'])}: {markdown_cell(line)}; concerns "
        + ", ".join(map(markdown_cell, task["tasks"]))
        for task in merge.get("removed", [])
        for line in task["stays"]
    ]
    return page("## Removed tasks, and what of them stays", "\n".join(lines)).rstrip("\n") if lines else ""


def _model(task: Mapping[str, Any]) -> ModelName:
    return ModelName.noted(task.get("model", {}))


def of(base: ModelName) -> str:
    """Which base fine-tuned models are of, after their mention; empty where it has no name."""
    return f" of {_called(base)}" if base.name else ""


def _called(model: ModelName) -> str:
    name = f"`{visible(model.name).replace('`', '')}`" if model.name else "not named"
    return name + (f" at `{visible(model.revision).replace('`', '')}`" if model.revision else "")


def _count(merge: Merge) -> int:
    return len(merge["tasks"])


def _with(merge: Merge) -> str:
    return f"with the method `{merge['method']}` by mingle {__version__}"


def accuracies(merge: Merge) -> str:
    """A table of what was measured, task by task."""
    head = "| task | accuracy when merged | accuracy now | now, task unknown |\n|---|---:|---:|---:|"
    rows = [
        f"| {markdown_cell(task['name'])} | {_measured(merge, i)} |" for i, task in enumerate(merge["tasks"])
    ]
    return "\n".join([head, *rows])


def _measured(merge: Merge, place: int) -> str:
    """The accuracies of a task: when it was merged, now, and now where the task has to be found too."""
    matrix, unknown = merge["matrix"], merge.get("unknown")
    found = unknown[-1][place] if unknown else None
    return " | ".join(map(_percent, (matrix[place][place], matrix[-1][place], found)))


def end(merge: Merge, base: ModelName) -> str:
    """The notes on tasks, what stays of those that left, licences, and the options."""
    noted = [
        f"- {markdown_cell(task['name'])}: {markdown_cell(note)}"
        for task in merge["tasks"]
        for note in task["notes"]
    ]
    options = json.dumps(merge["options"], indent=2, default=str)
    return page(
        "## What to know" if noted else "",
        "\n".join(noted),
        left_behind(merge),
        licenses(merge, base),
        "## Options",
        f"```json\n{options}\n```",
    ).rstrip("\n")


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f} %"
