"""The page of ``mingle play`` in a browser: give it an input, read the answers, switch a task off."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import played_merges
import pytest
from chromium import browser  # noqa: F401
from PIL import Image

from mingle.runs.play import page as served
from mingle.runs.play.try_out import TryOut

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gradio") is None,
        reason="Gradio is not installed; the extra `play` brings it",
    ),
]
TASKS = (
    "<script>document.title='run'</script> ${document.title='run'} {{7*7}}",
    "</script><img src=x onerror=document.title='run'> **b** \"q\"",
)
CLASSES = (("<b>cat</b>", "dog_ _"), ("red", "green" * 500, "'blue'"))


@contextmanager
def playing(folder: Path, *options: str) -> Iterator[str]:
    """The address of the page for a folder; when the block ends it is stopped, and has left nothing."""
    uploads = folder.parent / "uploads"
    uploads.mkdir()
    command = [sys.executable, "-m", "mingle", "play", str(folder), "--port", str(served.free_port(None))]
    process = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TMPDIR": str(uploads), "COLUMNS": "200"},
    )
    try:
        assert process.stdout is not None
        said = iter(process.stdout.readline, "")
        address = next(
            (found[0] for line in said if (found := re.search(r"http://127\.0\.0\.1:\d+/", line))), ""
        )
        assert address, process.wait()
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and out.endswith("stopped: nothing was changed\n"), out
    assert not list(uploads.glob("mingle-play-*"))


@pytest.fixture
def page(browser):  # noqa: F811
    """An empty page of the browser."""
    context = browser.new_context(viewport={"width": 1200, "height": 1000})
    yield context.new_page()
    context.close()


def part(page, name: str) -> str:
    return page.locator(f"#{name}").inner_text()


def until(page, name: str, condition) -> str:
    """The text of a part of the page, once it is as it shall be."""
    end = time.monotonic() + 60
    while not condition(text := part(page, name)):
        assert time.monotonic() < end, text
        page.wait_for_timeout(100)
    return text


def card(page, kind: str):
    return page.locator(f"#answers .{kind}").inner_text()


def test_an_image_is_answered_and_a_task_switched_off(tmp_path, monkeypatch, page):
    """Names that would do something in a page are text in it, and nothing is fetched from anywhere else."""
    monkeypatch.setattr(played_merges, "TASKS", TASKS)
    monkeypatch.setattr(played_merges, "CLASSES", CLASSES)
    played_merges.classifier(tmp_path, "vit", "mingle").save_pretrained(tmp_path / "merged")
    picture = tmp_path / "picture.png"
    Image.radial_gradient("L").convert("RGB").save(picture)
    try_out = TryOut.of(tmp_path / "merged")
    expected = {active: try_out.trial(picture, active) for active in (TASKS, TASKS[:1], TASKS[1:])}
    kept = {path: path.read_bytes() for path in (tmp_path / "merged").rglob("*") if path.is_file()}
    with playing(tmp_path / "merged") as address:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.locator("#given input[type=file]").set_input_files(picture)
        until(page, "gates", lambda text: "mean of 12 layers" in text)
        until(page, "answers", lambda text: text.count("expert of ") == 2)

        def is_shown(active) -> None:
            best = expected[active].merged.classes[0]
            share = f"{100 * best.probability:.1f} %"
            until(page, "answers", lambda text: share in text and best.label[:20] in text)
            shown = [task for task in TASKS if task in card(page, "merged")]
            assert set(shown) == {each.task for each in expected[active].merged.classes}

        is_shown(TASKS)
        boxes = page.locator("#active input[type=checkbox]")
        assert [box.is_checked() for box in boxes.all()] == [True, True]
        assert [task in part(page, "active") for task in TASKS] == [True, True]
        boxes.nth(0).uncheck()
        is_shown(TASKS[1:])
        boxes.nth(0).check()
        boxes.nth(1).uncheck()
        is_shown(TASKS[:1])
        boxes.nth(0).uncheck()
        until(page, "answers", lambda text: "no task is active" in text)
        boxes.nth(0).check()
        boxes.nth(1).check()
        is_shown(TASKS)

        assert page.title() == "mingle play" and page.locator("#answers img, #answers script").count() == 0
        for width in (320, 800, 1600):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert asked and all(url.startswith((address, "data:", "blob:")) for url in asked), asked
        refused = "fetch('http://127.0.0.1:9/').then(() => 'fetched', error => error.message)"
        assert "Failed to fetch" in page.evaluate(refused)
        policy = page.request.get(address).headers["content-security-policy"]
        assert policy.startswith("default-src 'self'")
        picture.write_bytes(b"not a picture")
        page.locator("#given input[type=file]").set_input_files(picture)
        until(
            page, "answers", lambda text: "the image cannot be read: in no format that Pillow knows" in text
        )
        page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
        until(page, "answers", lambda text: "there is no image yet" in text)
    assert kept == {path: path.read_bytes() for path in (tmp_path / "merged").rglob("*") if path.is_file()}


def test_a_text_is_answered_by_a_model_that_writes(tmp_path, page):
    played_merges.writers(tmp_path, "llama", "routed").save_pretrained(tmp_path / "merged")
    expected = TryOut.of(tmp_path / "merged").trial("is this it?", ("task 0", "task 1"))
    with playing(tmp_path / "merged") as address:
        page.goto(address)
        page.locator("#ask").click()
        until(page, "answers", lambda text: "there is no text yet" in text)
        page.locator("#given textarea").fill("is this it?")
        page.locator("#ask").click()
        until(page, "answers", lambda text: text.count("expert of ") == 2)
        shown = " ".join(card(page, "merged").split())
        assert " ".join(expected.merged.text.split()) in shown
        page.locator("#active input").nth(0).uncheck()
        page.locator("#active input").nth(1).uncheck()
        base = " ".join(expected.base.text.split())
        until(page, "answers", lambda text: " ".join(text.split()).count(base) == 2)


def test_a_method_whose_tasks_cannot_be_switched_off_says_why(tmp_path, page):
    played_merges.writers(tmp_path, "llama", "average").save_pretrained(tmp_path / "merged")
    with playing(tmp_path / "merged") as address:
        page.goto(address)
        until(page, "active", lambda text: "method 'average' keeps no expert that could be" in text)
        assert all(box.is_disabled() for box in page.locator("#active input").all())
