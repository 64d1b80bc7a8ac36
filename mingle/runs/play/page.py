"""The page on which a person tries a merged model, in Gradio.

It is served to this machine alone, and asks for nothing from anywhere else: fonts are the system's, Gradio's
telemetry is off, and the browser is told to fetch from nowhere but this page's own address.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mingle.options import OptionError
from mingle.runs.play import cards
from mingle.runs.play.try_out import TryOut
from mingle.tasks.readers import ReadingError
from mingle.text import visible

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
#: the port where none is asked for, and how many after it are tried
PORT, PORTS = 7860, 100
#: of an image
_MOST_BYTES = "100mb"
_MISSING = "`mingle play` needs Gradio: pip install 'mingle-merge[play]'"
_POLICY = (
    "default-src 'self' blob: data:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' ws: blob: data:; frame-ancestors 'none'"
)
_ABOUT_TASKS = "Switch tasks off and see the answer change. What is saved stays as it is."
_FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]
_MONO = ["ui-monospace", "Consolas", "monospace"]
_STYLE = """
.gradio-container { width: 100%; max-width: min(100vw, 84rem) !important; margin: 0 auto !important; }
.gradio-container :is(.main, .wrap, main, .row, .block) { min-width: 0; max-width: 100%; }
.active-tasks { --block-info-text-color: color-mix(in srgb, var(--body-text-color) 72%, transparent); }
.active-tasks label { max-width: 100%; }
.active-tasks label > span { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3;
  overflow: hidden; overflow-wrap: anywhere; }
"""


def require() -> None:
    """Raise `OptionError` unless Gradio is installed."""
    if importlib.util.find_spec("gradio") is None:
        raise OptionError(_MISSING)


def free_port(wanted: int | None) -> int:
    """The port to serve on: the one that is asked for, or the first free one from `PORT` on.

    Raises:
        OptionError: it is in use, or may not be used; or all are.
    """
    for port in range(PORT, PORT + PORTS) if wanted is None else [wanted]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except (OSError, OverflowError) as error:
                if wanted is not None:
                    reason = error.strerror if isinstance(error, OSError) else "expected at most 65535"
                    raise OptionError(f"--port {port}: {reason}") from None
            else:
                return port
    raise OptionError(f"--port: {PORT} to {PORT + PORTS - 1} are all in use; name another one")


def serve(
    try_out: TryOut,
    folder: Path,
    port: int,
    on_start: Callable[[str, str | None], None],
    *,
    share: bool = False,
    browser: bool = False,
) -> None:
    """Serve the page until the process is interrupted or terminated; nothing is left on the disk.

    Args:
        try_out: the merged model.
        folder: where it came from.
        port: on 127.0.0.1.
        on_start: told of the page's address and, with `share`, of its public one.
        share: let Gradio make a public address, over a server of its makers.
        browser: open the page in the user's browser.
    """
    with tempfile.TemporaryDirectory(prefix="mingle-play-") as uploads:
        _set_up(uploads)
        import gradio
        from starlette.middleware import Middleware

        page = _page(try_out, folder)
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            _, local, public = page.launch(
                server_name=HOST,
                server_port=port,
                share=share,
                inbrowser=browser,
                prevent_thread_lock=True,
                quiet=True,
                footer_links=[],
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                enable_monitoring=False,
                show_error=True,
                max_file_size=_MOST_BYTES,
                app_kwargs={"middleware": [Middleware(_Policy)]},
                theme=gradio.themes.Default(font=_FONTS, font_mono=_MONO),
                css=_STYLE + cards.STYLE,
            )
            on_start(local, public)
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGTERM, previous)
            page.close()


class _Policy:
    """Tells the browser to fetch from nowhere but the page's own address."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def told(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, told if scope["type"] == "http" else send)


def _set_up(uploads: str) -> None:
    """Settings that Gradio reads when it is imported or started."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "0"
    os.environ["GRADIO_TEMP_DIR"] = uploads
    for name in ("NO_PROXY", "no_proxy"):  # it asks its own server whether it runs
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), HOST)))


def _page(try_out: TryOut, folder: Path) -> Any:
    """The page, not yet served."""
    import gradio

    merger, image = try_out.merger, try_out.modality == "image"
    outputs: list[Any] = []

    def answered(given: Any, active: list[int]) -> Iterator[tuple[str, str]]:
        """All parts of the page, once for every model that has answered."""
        names = [try_out.tasks[place] for place in active]
        try:
            for trial in try_out.trials(given, names):
                yield cards.answers(trial), cards.gates(trial)
        except ReadingError as error:
            yield cards.message(str(error)), ""

    with gradio.Blocks(title="mingle play", analytics_enabled=False) as page:
        about = (merger.method.name, merger.task.name, len(try_out.tasks))
        gradio.HTML(cards.heading(str(folder), *about))
        with gradio.Row():
            with gradio.Column(scale=2, min_width=280):
                if image:
                    given: Any = gradio.Image(
                        label="image to try",
                        sources=["upload", "clipboard"],
                        height=280,
                        elem_id="given",
                    )
                    given.preprocess = _path  # the image is read as those of suites are
                else:
                    given = gradio.Textbox(label="text to try", lines=4, max_lines=12, elem_id="given")
                ask = gradio.Button("Answer", variant="primary", elem_id="ask")
                active: Any = gradio.CheckboxGroup(
                    [(visible(name), place) for place, name in enumerate(try_out.tasks)],
                    value=list(range(len(try_out.tasks))),
                    label="active tasks",
                    info=try_out.fixed or _ABOUT_TASKS,
                    interactive=not try_out.fixed,
                    elem_id="active",
                    elem_classes="active-tasks",
                )
            with gradio.Column(scale=3, min_width=280):
                outputs = [gradio.HTML(elem_id=name) for name in ("answers", "gates")]
        triggers = [ask.click, active.change, *([given.change] if image else [given.submit])]
        gradio.on(
            triggers, answered, [given, active], outputs,
            concurrency_limit=1, trigger_mode="always_last", show_progress="minimal", api_name=False,
        )  # fmt: skip
    return page


def _path(given: Any) -> str | None:
    """Where an uploaded file is; it may hold anything."""
    return None if given is None else given.path
