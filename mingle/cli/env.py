"""``mingle env``: versions and backends, for bug reports."""

from __future__ import annotations

import argparse

import torch

from mingle.cli import arguments
from mingle.cli.arguments import Commands
from mingle.cli.output import document, line, show
from mingle.io.provenance import versions
from mingle.kernels import gemm
from mingle.ops import dispatch, extension
from mingle.runs import devices


def register(commands: Commands) -> None:
    parser = commands.add_parser("env", help="versions and backends, for bug reports")
    arguments.printing(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    device = devices.usual()
    facts = versions() | {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": str(torch.get_num_threads()),
        "triton": dispatch.explanation(device),
        "extension": extension.summary(),
        "cpu products": gemm.explanation(),
    }
    show(*(line(f"{name:14}{value}") for name, value in facts.items()))
    document(facts)
