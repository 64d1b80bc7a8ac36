"""The options that a method runs with, in every command alike.

The suite's recommendations replace the published settings, and the user's own options replace both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from mingle import methods
from mingle.ops import dispatch
from mingle.options import OptionError, build, nearest
from mingle.runs import devices
from mingle.suites import Suite
from mingle.suites.protocol import PROTOCOLS


def known(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that the method has."""
    names = {field.name for field in fields(methods.get(method).Options)}
    return {name: value for name, value in options.items() if name in names}


@dataclass(frozen=True)
class Setting:
    """The value of an option, and who says so, in words."""

    value: Any
    source: str


def sources(
    method: str, *, task_type: str, tasks: int, protocol: str, suite: Suite | None, given: Mapping[str, Any]
) -> dict[str, Setting]:
    """All options of a method by name, each with where it comes from.

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
    rising = {
        f"published for {task_type}, {tasks} task{'' if tasks == 1 else 's'}": known(
            method, methods.published(method, task_type, tasks)
        ),
        f"recommended by the suite {suite.name if suite else ''}": known(method, recommended),
        f"protocol {protocol}": known(method, {"reduce": PROTOCOLS[protocol]}),
        "yours": given,
    }
    source = {name: whose for whose, options in rising.items() for name in options}
    chosen = {name: value for options in rising.values() for name, value in options.items()}
    resolved = asdict(build(methods.get(method).Options, chosen, f"method {method!r}"))
    _check_backend(resolved.get("backend", "auto"), f"method {method!r}")
    return {name: Setting(value, source.get(name, "the method's own")) for name, value in resolved.items()}


def resolve(method: str, **circumstances: Any) -> dict[str, Any]:
    """All options of a method by name; the arguments are those of `sources`."""
    return {name: setting.value for name, setting in sources(method, **circumstances).items()}


def _check_backend(backend: str, where: str) -> None:
    """Refuse a backend that does not exist, or that no device here can run."""
    if backend not in dispatch.BACKENDS:
        expected = f"expected one of {', '.join(dispatch.BACKENDS)}"
        raise OptionError(f"{where}: backend: {backend!r}{nearest(backend, dispatch.BACKENDS)}; {expected}")
    if backend == "triton" and (reason := dispatch.without_triton(devices.usual(), torch.float32)):
        raise OptionError(f"{where}: backend: 'triton' cannot run: {reason}")


def for_suite(method: str, suite: Suite, given: Mapping[str, Any]) -> dict[str, Any]:
    """The same for all tasks of a suite, under its own protocol."""
    protocol = suite.request.protocol
    return resolve(
        method, task_type=suite.task_type, tasks=len(suite), protocol=protocol, suite=suite, given=given
    )
