"""The options that a method runs with, in every command alike.

The suite's recommendations replace the published settings, and the user's own options replace both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from mingle import methods
from mingle.options import build
from mingle.suites import Suite
from mingle.suites.protocol import PROTOCOLS


def known(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that the method has."""
    names = {field.name for field in fields(methods.get(method).Options)}
    return {name: value for name, value in options.items() if name in names}


def resolve(
    method: str, *, task_type: str, tasks: int, protocol: str, suite: Suite | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """All options of a method by name.

    Args:
        method: a name in `mingle.methods.METHODS`.
        task_type: of the base model.
        tasks: how many will be merged; some published settings depend on it.
        protocol: ``strict`` or ``official``; decides what gates see, unless `given` does.
        suite: gives its recommendations for its own models; None gives none.
        given: the user's own options, which the method must have.

    Raises:
        OptionError: an option that the method does not have, or a value that it cannot have.
    """
    recommended = {} if suite is None else suite.settings.get(method, {})
    defaults = methods.published(method, task_type, tasks) | recommended | {"reduce": PROTOCOLS[protocol]}
    options = known(method, defaults) | dict(given)
    return asdict(build(methods.get(method).Options, options, f"method {method!r}"))


def for_suite(method: str, suite: Suite, given: Mapping[str, Any]) -> dict[str, Any]:
    """The same for all tasks of a suite, under its own protocol."""
    protocol = suite.request.protocol
    return resolve(
        method, task_type=suite.task_type, tasks=len(suite), protocol=protocol, suite=suite, given=given
    )
