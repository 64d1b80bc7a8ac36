"""``mingle play``: a page on which a person tries a merged model."""

from __future__ import annotations

import argparse

from mingle.cli import arguments
from mingle.cli.arguments import Commands
from mingle.cli.output import say
from mingle.cli.progress import stages
from mingle.io.files import file_path
from mingle.runs.play import page
from mingle.runs.play.try_out import TryOut


def register(commands: Commands) -> None:
    parser = commands.add_parser("play", help="try a merged model on a page in the browser")
    parser.add_argument("folder", type=file_path, help="the folder that merge wrote")
    text = f"on {page.HOST}; by default the first free one from {page.PORT} on"
    parser.add_argument("--port", type=arguments.positive, help=text)
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    text = "let Gradio make a public address too, over a server of its makers, for whoever knows it"
    parser.add_argument("--share", action="store_true", help=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    page.require()
    port = page.free_port(args.port)
    with stages("reading"):
        try_out = TryOut.of(args.folder)
    page.serve(try_out, args.folder, port, _started, share=args.share, browser=args.open)
    say("stopped: nothing was changed")


def _started(local: str, public: str | None) -> None:
    say("the page is at ", local)
    if public:
        say("everybody who knows this address can use it: ", public)
    say("Ctrl-C stops it")
