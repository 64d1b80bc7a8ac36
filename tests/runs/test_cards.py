"""The HTML of a trial: everything is in it, and names are text whatever they hold."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from mingle.runs.play import cards
from mingle.runs.play.trial import Answer, Gates, Likely, Routing, Trial

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror="alert(1)">',
    "' onclick='alert(1)",
    "**bold** [x](http://evil) &amp; `c`",
    "turned\u202eround \x1b[31m",
)
_TAGS = {
    *("article", "b", "div", "h2", "i", "p", "section", "small", "span"),
    *("table", "tbody", "td", "th", "thead", "tr"),
}
_ATTRIBUTES = {"class", "data-part", "role", "scope", "style", "tabindex", "title"}


class Page(HTMLParser):
    """The text of HTML, line by line, which may have no tags and attributes but those of cards."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.lines: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        assert tag in _TAGS and {name for name, _ in attrs} <= _ATTRIBUTES, (tag, attrs)

    def handle_data(self, data):
        self.lines.append(data)


def text(html: str) -> str:
    return "\n".join(Page(html).lines)


def trial(names=("one", "two"), **changes):
    likely = tuple(Likely(name, f"class of {name}", 0.4 - 0.1 * n) for n, name in enumerate(names))
    parts = dict(
        active=tuple(names),
        merged=Answer(likely),
        routing=Routing({name: 1 / len(names) for name in names}),
        gates=Gates(
            ("stack.0.fc1", "stack.0.fc2"), tuple(names), ((0.5,) * len(names), (-0.25,) * len(names))
        ),
        base=Answer(text="said"),
        experts={name: Answer(likely[n : n + 1]) for n, name in enumerate(names)},
    )
    return Trial(**(parts | changes))


def test_answers_have_a_card_for_every_model():
    found = text(cards.answers(trial()))
    for line in ("merged model", "class of one", "40.0 %", "base model", "said", "expert of two", "50.0 %"):
        assert line in found
    assert '<article class="card expert off">' in cards.answers(trial(active=("one",)))


@pytest.mark.parametrize("count", [1, 2])
def test_a_reason_that_all_experts_share_is_said_once(count):
    experts = {f"t{n}": Answer(reason="none is kept") for n in range(count)}
    assert text(cards.answers(trial(experts=experts))).count("none is kept") == 1
    experts["other"] = Answer(text="")
    found = text(cards.answers(trial(experts=experts)))
    assert found.count("none is kept") == count and "an empty answer" in found


def test_a_router_that_finds_an_input_strange_says_so():
    found = text(cards.answers(trial(routing=Routing({"a": 0.2, "b": 0.8}, strange=True))))
    assert "no expert works" in found and found.index("80.0 %") < found.index("20.0 %")
    assert "no router" in text(cards.answers(trial(routing=Routing(reason="no router"))))


def test_gates_are_a_row_for_every_layer_and_one_for_their_mean():
    html = cards.gates(trial())
    found = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr.*?</tr>", html)]
    assert found == [
        ["stack.0.…", "one", "two"],
        ["mean", "of", "2", "layers", "0.12", "0.12"],
        ["fc1", "0.50", "0.50"],
        ["fc2", "−0.25", "−0.25"],
    ]
    assert "rgba(230, 126, 34, 0.75)" in html and "rgba(41, 128, 185, 0.38)" in html


def test_layers_that_are_all_alike_are_one_row_and_those_not_called_have_dashes():
    alike = Gates(("a", "b"), ("one",), ((0.3,), (0.3,)))
    found = text(cards.gates(trial(gates=alike)))
    assert "all 2 layers" in found and found.count("0.30") == 1
    partly = Gates(("a", "b"), ("one",), ((0.3,), (float("nan"),)))
    found = text(cards.gates(trial(gates=partly)))
    assert "mean of 1 layer" in found
    assert found.count("–") == 1
    assert "none" in text(cards.gates(trial(gates=Gates(reason="none"))))
    silent = Gates(("a",), ("one",), ((0.0,),))
    assert "0.00" in text(cards.gates(trial(gates=silent)))


@pytest.mark.parametrize("name", [*HOSTILE, "x" * 10_000])
def test_names_are_text_whatever_they_hold(name):
    shown = name.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")
    hostile = trial((name, "two"), base=Answer(text=name), merged=Answer(reason=name))
    whole = cards.answers(hostile) + cards.gates(hostile)
    whole += cards.heading(name, name, name, 2) + cards.message(name)
    found = Page(whole).lines
    for line in (shown, f"expert of {shown}", f"class of {shown}", f"{shown} · {shown} · 2 tasks"):
        assert line in found
