"""``mingle play``: what it refuses before it reads anything, and what the page is served with."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import sys
import types

import pytest

from mingle.cli import main, play
from mingle.options import OptionError
from mingle.runs.play import page


def test_without_gradio_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["play", str(tmp_path / "missing")]) == 2
    assert "needs Gradio: pip install 'mingle-merge[play]'" in capsys.readouterr().out


def test_a_port_in_use_is_named_before_the_model_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "require", lambda: None)
    with socket.socket() as taken:
        taken.bind((page.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["play", str(tmp_path / "missing"), "--port", str(port)]) == 2
        assert f"--port {port}: Address already in use" in capsys.readouterr().out
        monkeypatch.setattr(page, "PORT", port)
        assert port < page.free_port(None) < port + page.PORTS
        monkeypatch.setattr(page, "PORTS", 1)
        with pytest.raises(OptionError, match="are all in use; name another one"):
            page.free_port(None)
    assert page.free_port(port) == port
    with pytest.raises(OptionError, match="--port 70000"):
        page.free_port(70000)


def test_a_folder_that_is_no_merged_model_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "require", lambda: None)
    assert main(["play", str(tmp_path / "missing")]) == 2
    assert "missing" in capsys.readouterr().out


def test_every_answer_tells_the_browser_to_fetch_from_nowhere_else():
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
        await send({"type": "http.response.body", "body": b""})

    async def send(message):
        sent.append(message)

    asyncio.run(page._Policy(app)({"type": "http"}, None, send))
    (_, kept), (name, policy) = sent[0]["headers"]
    assert (kept, name) == (b"y", b"content-security-policy")
    assert b"default-src 'self'" in policy and b"http" not in policy
    assert sent[1] == {"type": "http.response.body", "body": b""}


def test_gradio_is_told_to_report_nothing_and_to_keep_uploads_where_they_are_removed(monkeypatch):
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "example.org")
    page._set_up("uploads")
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "0" and os.environ["GRADIO_TEMP_DIR"] == "uploads"
    assert os.environ["NO_PROXY"] == "example.org,127.0.0.1" and os.environ["no_proxy"] == "127.0.0.1"


class Page:
    """Stands in for Gradio's, which is not asked for anything here."""

    def __init__(self, public):
        self.public, self.asked, self.closed = public, {}, False

    def launch(self, **asked):
        self.asked = asked
        return None, f"http://{page.HOST}:{asked['server_port']}/", self.public

    def close(self):
        self.closed = True


class Interrupted:
    """An event during whose wait the user presses Ctrl-C."""

    def wait(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "share", "browser"),
    [([], False, False), (["--open"], False, True), (["--share"], True, False)],
)
def test_a_public_address_and_a_browser_only_where_they_are_asked_for(
    tmp_path, monkeypatch, capsys, options, share, browser
):
    served = Page("https://public.example/" if share else None)
    gradio = types.SimpleNamespace(themes=types.SimpleNamespace(Default=lambda **fonts: fonts))
    starlette = types.SimpleNamespace(Middleware=lambda policy: policy)
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.setitem(sys.modules, "starlette.middleware", starlette)
    for name, stand_in in {
        "require": lambda: None,
        "_set_up": lambda uploads: None,
        "_page": lambda try_out, folder: served,
        "free_port": lambda wanted: 7860,
    }.items():
        monkeypatch.setattr(page, name, stand_in)
    monkeypatch.setattr(play.TryOut, "of", lambda folder: None)
    monkeypatch.setattr(page.threading, "Event", Interrupted)
    assert main(["play", str(tmp_path), *options]) == 0
    assert (served.asked["share"], served.asked["inbrowser"]) == (share, browser)
    assert served.asked["server_name"] == "127.0.0.1" and served.closed
    said = capsys.readouterr().out
    assert "the page is at http://127.0.0.1:7860/" in said
    assert ("everybody who knows this address can use it: https://public.example/" in said) == share
