"""A trial as HTML.  Names are shown as they are: whatever they hold is text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import takewhile

from mingle.runs.play.trial import Answer, Gates, Routing, Trial
from mingle.text import visible

#: of all cards; colours are those of the page they stand on, and follow its light and dark theme
STYLE = """
.mingle { color: var(--body-text-color); font-size: 0.95rem; min-width: 0; }
.mingle h2 { font-size: 1rem; font-weight: 600; margin: 0 0 0.3rem; }
.mingle p { margin: 0.2rem 0; overflow-wrap: anywhere; }
.mingle small, .mingle .note { color: color-mix(in srgb, var(--body-text-color) 72%, transparent); }
.mingle .said { white-space: pre-wrap; overflow-wrap: anywhere; }
.mingle .cards { display: grid; gap: 0.6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.mingle .card { border: 1px solid var(--border-color-primary); border-radius: 0.5rem; min-width: 0;
  padding: 0.6rem 0.75rem; background: var(--background-fill-primary); overflow-wrap: anywhere; }
.mingle .merged { border: 2px solid var(--color-accent); }
.mingle .merged, .mingle .routing { grid-column: 1 / -1; }
.mingle .off { opacity: 0.6; }
.mingle .bars { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 0.1rem 0.75rem; margin: 0;
  align-items: baseline; }
.mingle .bars div { overflow-wrap: anywhere; }
.mingle .name { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden; }
.mingle .bars .number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.mingle .bars .bar { grid-column: 1 / -1; height: 0.3rem; border-radius: 0.15rem; overflow: hidden;
  margin-bottom: 0.3rem; background: var(--border-color-primary); }
.mingle .bar i { display: block; height: 100%; background: var(--color-accent); }
.mingle .scroll { overflow: auto; max-height: 32rem; border: 1px solid var(--border-color-primary);
  border-radius: 0.5rem; }
.mingle table { border-collapse: separate; border-spacing: 0; border: 0 !important; margin: 0;
  font-size: 0.8rem; width: 100%; }
.mingle tr > * { padding: 0.15rem 0.5rem; border: 0; text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.mingle thead th { position: sticky; top: 0; z-index: 2; background: var(--background-fill-secondary); }
.mingle tr > :first-child { position: sticky; left: 0; text-align: left; }
.mingle tbody th { z-index: 1; background: var(--background-fill-primary); font-weight: 400; }
.mingle thead th:first-child { z-index: 3; }
.mingle th .name { display: block; max-width: 9rem; text-overflow: ellipsis; }
.mingle tr > :first-child .name { max-width: 16rem; }
.mingle .all > * { font-weight: 600; }
@media (max-width: 40rem) {
  .mingle th .name { max-width: 5rem; }
  .mingle tr > :first-child .name { max-width: 9rem; }
}
"""
#: how many classes a card names, but for that of the merged model
_FEW = 3
_ABOUT_GATES = (
    "How much of every task's expert is at work: 0 is nothing, 1 all of it, less than 0 its opposite."
)


def answers(trial: Trial) -> str:
    """The cards of all models' answers, and what a router makes of the input."""
    cards = [_card("merged model", trial.merged, "merged")]
    cards.append(
        f'<article class="card routing"><h2>which task it is of</h2>{_routing(trial.routing)}</article>'
    )
    if trial.base is not None:
        cards.append(_card("base model", trial.base))
    experts = list(trial.experts.values())
    if len({answer.reason for answer in experts} - {""}) == 1 and all(each.reason for each in experts):
        cards.append(_card("the tasks' own experts", experts[0]))
    else:
        cards += [
            _card(f"expert of {name}", answer, "expert" if name in trial.active else "expert off")
            for name, answer in trial.experts.items()
        ]
    return _section("answers", f'<div class="cards">{"".join(cards)}</div>')


def gates(trial: Trial) -> str:
    """The gates of all experts in all layers, as a table whose cells are the darker the more they hold."""
    return _section("gates", f"<h2>which experts work, layer by layer</h2>{_table(trial.gates)}")


def message(text: str) -> str:
    """A card with nothing but a line of text."""
    return _section("answers", f'<div class="card" role="alert">{_text(text)}</div>')


def heading(folder: str, method: str, task_type: str, tasks: int) -> str:
    """The head of the page."""
    count = "1 task" if tasks == 1 else f"{tasks} tasks"
    about = f"{_text(method)} · {_text(task_type)} · {count}"
    return _section("heading", f'<h2>{_name(folder)}</h2><p class="note">{about}</p>')


def _text(text: str) -> str:
    return escape(visible(text, keep="\n"))


def _section(name: str, content: str) -> str:
    return f'<section class="mingle" data-part="{name}">{content}</section>'


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>'


def _card(title: str, answer: Answer, kind: str = "") -> str:
    content = _note(answer.reason) if answer.reason else ""
    if answer.text is not None:
        content += f'<p class="said">{_text(answer.text)}</p>' if answer.text else _note("an empty answer")
    classes = answer.classes if kind == "merged" else answer.classes[:_FEW]
    tasks = not kind.startswith("expert")  # all classes of an expert are its own task's
    content += _bars((each.label, each.task if tasks else "", each.probability) for each in classes)
    return f'<article class="card {kind}"><h2>{_name(title)}</h2>{content}</article>'


def _name(text: str) -> str:
    """A name that is cut where it is longer than a few lines; the whole of it shows when it is pointed at."""
    return f'<span class="name" title="{_text(text)}">{_text(text)}</span>'


def _bars(rows: Iterable[tuple[str, str, float]]) -> str:
    """Rows of a name, what stands small behind it, and a share, the first of them in bold."""
    lines = []
    for number, (name, below, share) in enumerate(rows):
        shown = _name(name) if number else f"<b>{_name(name)}</b>"
        small = f"<small>{_name(below)}</small>" if below else ""
        lines.append(
            f"<div>{shown}{small}</div>"
            f'<div class="number">{100 * share:.1f} %</div>'
            f'<div class="bar"><i style="width:{100 * share:.1f}%"></i></div>'
        )
    return f'<div class="bars">{"".join(lines)}</div>' if lines else ""


def _routing(found: Routing) -> str:
    if found.reason:
        return _note(found.reason)
    rows = sorted(found.shares.items(), key=lambda item: -item[1])
    strange = "It is so strange to all of these tasks that no expert works: the base model answers."
    return (_note(strange) if found.strange else "") + _bars((name, "", share) for name, share in rows)


def _table(found: Gates) -> str:
    if found.reason:
        return _note(found.reason)
    called = [row for row in found.values if all(map(math.isfinite, row))]
    most = max((abs(value) for row in called for value in row), default=0.0)
    alike = len(set(found.values)) == 1
    start = _shared(found.layers)
    head = "".join(f'<th scope="col">{_name(name)}</th>' for name in found.tasks)
    rows = []
    if called:
        means = [sum(column) / len(called) for column in zip(*called, strict=True)]
        every = "1 layer" if len(called) == 1 else f"{len(called)} layers"
        rows.append(
            _row(f"all {every}" if alike and len(called) > 1 else f"mean of {every}", means, most, "all")
        )
    if not alike or not called:
        layers = [name.removeprefix(start) for name in found.layers]
        rows += [_row(name, row, most) for name, row in zip(layers, found.values, strict=True)]
    corner = _name(f"{start}…" if start and not alike else "layer")
    return (
        f'{_note(_ABOUT_GATES)}<div class="scroll" tabindex="0"><table><thead><tr>'
        f'<th scope="col">{corner}</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _shared(names: Sequence[str]) -> str:
    """The modules that all these layers are inside of, as the beginning of their names."""
    parents = [name.split(".")[:-1] for name in names]
    steps = takewhile(lambda step: len(set(step)) == 1, zip(*parents, strict=False))
    return "".join(f"{step[0]}." for step in steps)


def _row(name: str, values: Sequence[float], most: float, kind: str = "") -> str:
    cells = "".join(_cell(value, most) for value in values)
    return f'<tr class="{kind}"><th scope="row">{_name(name)}</th>{cells}</tr>'


def _cell(value: float, most: float) -> str:
    if not math.isfinite(value):
        return "<td>–</td>"
    strength = 0.75 * abs(value) / most if most else 0.0
    colour = "230, 126, 34" if value >= 0 else "41, 128, 185"
    shown = f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")
    return f'<td style="background-color: rgba({colour}, {strength:.2f})">{shown}</td>'
