"""The CUDA extension ``mingle._C``: whether it can serve a device, and why not.

Installing mingle builds it where it can and records in ``_build.json`` what came of that; a module is
imported only where the record says that it was built.  ``MINGLE_EXTENSION=0``, set before the first use,
disables it.  Nothing here raises: a missing or broken extension costs speed on a GPU, never a result, and one
message says why.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

logger = logging.getLogger(__name__)

RECORD = Path(__file__).parents[1] / "_build.json"


def load(device: torch.device) -> ModuleType | None:
    """``mingle._C`` where its kernels can run on `device`, else None; decided and told once per device."""
    reason = why_not(device)
    if reason is None:
        return _module()
    _tell(device, reason)
    return None


@cache
def _tell(device: torch.device, reason: str) -> None:
    logger.info("small factorisations on %s are computed by plain torch: %s", device, reason)


@cache
def why_not(device: torch.device) -> str | None:
    """In one sentence why the extension cannot serve `device`; None where it can."""
    if os.environ.get("MINGLE_EXTENSION") == "0":
        return "MINGLE_EXTENSION=0 disables mingle._C"
    if reason := left_out():
        return reason
    if not torch.cuda.is_available():
        return "no CUDA device"
    if device.type != "cuda":
        return f"the tensors are on {device.type}, the kernels run on CUDA devices"
    if reason := _mismatch(torch.cuda.get_device_capability(device)):
        return reason
    try:
        _module().check(torch.cuda.current_device() if device.index is None else device.index)
    except Exception as error:
        return f"mingle._C cannot run on {torch.cuda.get_device_name(device)}: {error}"
    return None


def left_out() -> str | None:
    """Why there is no extension to load on any device; None where there is one."""
    try:
        record = _record()
    except FileNotFoundError:
        return f"mingle._C was not built: {RECORD.name}, which an installation writes, is missing"
    except (OSError, ValueError) as error:
        return f"mingle._C is not used: {RECORD}: {error}"
    if record.get("extension") != "built":
        return f"mingle._C was left out when mingle was installed: {record.get('reason')}"
    try:
        _module()
    except Exception as error:
        return f"mingle._C cannot be loaded: {error}"
    return None


def summary() -> str:
    """One line for bug reports."""
    if reason := left_out():
        return reason
    built = f"built for {_names()} by CUDA {_module().cuda_version}"
    reason = why_not(torch.device("cuda"))
    return f"{built}; not used: {reason}" if reason else built


def _mismatch(capability: tuple[int, int]) -> str | None:
    """Why no code in the module fits a GPU of this compute capability.

    Machine code runs on its own major version from its own minor one on; the last architecture's portable
    code on all later ones.
    """
    own = 10 * capability[0] + capability[1]
    built = [int("".join(filter(str.isdigit, name))) for name in _module().architectures]
    if own >= built[-1] or any(own // 10 == number // 10 and own >= number for number in built):
        return None
    return f"mingle._C was built for {_names()}; this GPU is sm_{own}"


def _names() -> str:
    return ", ".join(f"sm_{name}" for name in _module().architectures)


@cache
def _record() -> dict[str, Any]:
    record = json.loads(RECORD.read_text())
    if not isinstance(record, dict):
        raise ValueError("expected a JSON object")
    return record


@cache
def _module() -> ModuleType:
    return importlib.import_module("mingle._C")
