"""``report.html`` in headless Chromium: what one sees, hovers, sorts and types."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import browser  # noqa: F401
from fabricated_runs import HOSTILE, TASKS, comparison, merged, table

from mingle.runs.report import page as pages

pytestmark = pytest.mark.slow
#: folder → its page in the browser
Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:  # noqa: F811
    """Opens pages from the disk; none may complain, or ask for anything but itself."""
    said: list[str] = []
    contexts = []

    def open_page(folder: Path, width: int = 1000, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        shown, address = context.new_page(), pages.write(folder).resolve().as_uri()
        shown.on("console", lambda message: said.append(message.text))
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        shown.on(
            "request",
            lambda request: (
                request.url.startswith((address, "data:")) or said.append(f"asked for {request.url}")
            ),
        )
        shown.goto(address)
        return shown

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comparison(tmp_path_factory.mktemp("runs") / "demo", TASKS)


def tip(shown: Any) -> str | None:
    """What the page says of the cell under the pointer or with the focus."""
    found = shown.locator("#tip")
    return found.text_content() if found.is_visible() else None


def names(shown: Any) -> list[str]:
    return [text.strip() for text in shown.locator("table.sortable tbody th").all_text_contents()]


def test_the_table_sorts_by_click_and_by_keyboard(opened: Open, demo: Path) -> None:
    shown = opened(demo)
    assert names(shown) == ["individual", "average", "mingle"]
    acc = shown.get_by_role("button", name="ACC %").first
    acc.click()
    assert names(shown) == ["individual", "mingle", "average"]
    assert shown.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    acc.focus()
    shown.keyboard.press("Enter")
    assert names(shown) == ["average", "mingle", "individual"]
    shown.get_by_role("button", name="BWT").first.focus()
    shown.keyboard.press("Space")
    assert names(shown) == ["individual", "mingle", "average"]
    assert shown.locator("th[aria-sort]").count() == 1
    shown.get_by_role("button", name="method").click()
    assert names(shown) == ["average", "individual", "mingle"]


def test_cells_and_marks_say_what_they_are(opened: Open, demo: Path) -> None:
    shown = opened(demo)
    cells = shown.locator("article:not([hidden]) table.heat").first.locator("td[class]")
    cells.nth(3).hover()
    assert tip(shown) == "accuracy on task digits after merging task rings: 91.0 %"
    shown.locator("h1").hover()
    assert tip(shown) is None
    cells.first.focus()
    assert tip(shown) == "accuracy on task digits after merging task digits: 93.0 %"
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        shown.keyboard.press(key)
    assert tip(shown) == "accuracy on task letters after merging task rings: 92.0 %"
    assert shown.evaluate("document.activeElement.getAttribute('aria-label')") == tip(shown)
    shown.keyboard.press("Escape")
    assert tip(shown) is None
    shown.locator(".line", has_text="average").locator("circle").nth(2).hover()
    assert tip(shown) == "average, after merging rings, task 3 of 4: 64.0 %"
    shown.locator("article:not([hidden]) .span rect").first.hover()
    assert (tip(shown) or "").startswith("merging letters: interference S from 0.001")


def test_every_grid_is_one_stop_of_the_tab_key(opened: Open, demo: Path) -> None:
    shown = opened(demo)
    stops = "[...document.querySelectorAll(`{}`)].map(g => g.querySelectorAll('{}[tabindex=\"0\"]').length)"
    assert set(shown.evaluate(stops.format("table.heat", "td"))) == {1}
    assert shown.evaluate(stops.format("figure.accuracy svg", "circle")) == [1]


def test_one_method_at_a_time_is_shown_in_detail(opened: Open, demo: Path) -> None:
    shown = opened(demo)
    visible = shown.locator("article.detail:visible")
    assert visible.locator("h3").text_content() == "mingle"
    shown.locator(".choice a", has_text="average").click()
    assert visible.locator("h3").text_content() == "average"
    assert shown.locator(".choice a[aria-current]").text_content() == "average"
    assert "digits lost 18.0 points" in visible.locator(".advice").inner_text()
    shown.locator("table.sortable a", has_text="individual").click()
    assert visible.locator("h3").text_content() == "individual"
    assert shown.evaluate("document.activeElement.textContent") == "individual"


def test_the_theme_is_the_system_s_until_one_is_chosen(opened: Open, demo: Path) -> None:
    def ground(shown: Any) -> str:
        return str(shown.evaluate("getComputedStyle(document.body).backgroundColor"))

    light, dark = ground(opened(demo)), opened(demo, scheme="dark")
    assert ground(dark) != light
    dark.get_by_role("button", name="theme").click()
    assert ground(dark) == light
    dark.emulate_media(media="print", color_scheme="dark")
    assert not dark.locator(".choice").is_visible()


@pytest.mark.parametrize("width", [320, 800, 1600])
@pytest.mark.parametrize("kind", ["demo", "merge", "table"])
def test_no_page_is_wider_than_its_window(opened: Open, tmp_path: Path, kind: str, width: int) -> None:
    long = [*HOSTILE, *(f"a task with a name that is rather long, {place}" for place in range(13))]
    make = {
        "demo": lambda: comparison(tmp_path, long, ("individual", "average", "mingle", HOSTILE[-1])),
        "merge": lambda: merged(tmp_path, long),
        "table": lambda: table(tmp_path, [HOSTILE[0], HOSTILE[-1][:150]], ["average", "mingle"], long),
    }
    if kind == "demo":  # with a saved model, whose path stands in a command
        merged(tmp_path / "merged" / "average", long, "average")
    shown = opened(make[kind](), width)
    assert kind != "demo" or shown.locator("pre").count() > 0
    outside = """() => [...document.querySelectorAll("body *")]
        .filter((each) => !each.closest(".scroll, svg, pre, .skip, .unseen, #tip"))
        .filter((each) => each.getBoundingClientRect().right > innerWidth + 1)
        .map((each) => each.outerHTML.slice(0, 80))"""
    for method in [None, *shown.locator(".choice a").all()]:
        if method is not None:
            method.click()
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        assert shown.evaluate(outside) == []


def test_hostile_names_do_nothing_and_are_read_as_they_are(opened: Open, tmp_path: Path) -> None:
    shown = opened(comparison(tmp_path, HOSTILE, ("individual", *HOSTILE)))
    assert shown.title() == "mingle demo: suite [x] <i>, protocol strict"
    assert shown.evaluate("document.scripts.length + document.images.length") == 1
    first = shown.locator("article:not([hidden]) table.heat").first
    first.locator("td[class]").first.focus()
    name = HOSTILE[0]
    assert tip(shown) == f"accuracy on task {name} after merging task {name}: 93.0 %"
    assert first.locator("tbody th").nth(4).inner_text().endswith("turned\\u202eround\\u200f")
