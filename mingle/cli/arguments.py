"""Options that several commands take."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn, TypeAlias, get_args

import yaml

from mingle.methods import METHODS
from mingle.options import OptionError
from mingle.runs.sharding import Shard
from mingle.suites.protocol import PROTOCOLS
from mingle.text import visible

#: the object that a command registers itself with
Commands: TypeAlias = "argparse._SubParsersAction[Any]"


class LiteralParser(argparse.ArgumentParser):
    """Shows what it complains about as it is; parsers of commands are of this class too."""

    def error(self, message: str) -> NoReturn:
        super().error(visible(message))


def offline(parser: argparse.ArgumentParser) -> None:
    """``--offline``."""
    text = "take hub models and data sets from the hub's cache only"
    parser.add_argument("--offline", action="store_true", help=text)


def printing(parser: argparse.ArgumentParser) -> None:
    """``--json`` and ``--quiet``; see `mingle.cli.output`."""
    text = "print what was found as one JSON document on stdout, and all else on stderr"
    parser.add_argument("--json", action="store_true", help=text)
    text = "print nothing but errors and what was found: no progress, no messages"
    parser.add_argument("--quiet", action="store_true", help=text)


def shard(parser: argparse.ArgumentParser) -> None:
    """``--shard``."""
    text = (
        "whether processes share out the models' weights, and one alone leaves models in their files; auto: "
        "where a process's memory does not hold them"
    )
    parser.add_argument("--shard", choices=get_args(Shard), default="auto", help=text)


def orders(parser: argparse.ArgumentParser) -> None:
    """``--orders``."""
    parser.add_argument("--orders", type=positive, default=1, help="how many task orders (seeds 42, 43, …)")


def method_options(parser: argparse.ArgumentParser) -> None:
    """``--set``, once per option."""
    text = "a method option, such as steps=100 or constraint=hard"
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=text)


def parsed_options(args: argparse.Namespace) -> tuple[tuple[str, Any], ...]:
    """The options given by ``--set``, as names and YAML values.

    Raises:
        OptionError: no ``=``, a name that no method has as an option, or bad YAML.
    """
    known = sorted(
        {field for method in METHODS.values() for field in vars(method.Options)["__dataclass_fields__"]}
    )
    options = []
    for text in args.set:
        name, separator, value = text.partition("=")
        if not separator:
            raise OptionError(f"--set {text}: expected NAME=VALUE")
        if name not in known:
            raise OptionError(f"--set {name}: no method has this option; known are {', '.join(known)}")
        try:
            options.append((name, yaml.safe_load(value)))
        # ValueError: a date that does not exist, a number of too many digits
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise OptionError(f"--set {text}: {error}") from None
    return tuple(options)


def samples(parser: argparse.ArgumentParser) -> None:
    """``--suite``, ``--protocol`` and ``--samples-per-class``; see `overrides`."""
    parser.add_argument("--suite", help="where samples come from; by default the one used before")
    parser.add_argument("--protocol", choices=PROTOCOLS, help="by default the one used before")
    text = "seed samples per class; by default as many as before"
    parser.add_argument("--samples-per-class", type=positive, help=text)


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the options of `samples` that were given."""
    given = {
        "suite": args.suite,
        "protocol": args.protocol,
        "samples_per_class": args.samples_per_class,
    }
    return {name: value for name, value in given.items() if value is not None}


def names(text: str) -> tuple[str, ...]:
    """Comma-separated names, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def positive(text: str) -> int:
    """`text` as a whole number, 1 or more."""
    value = int(text)
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text}")
    return value
