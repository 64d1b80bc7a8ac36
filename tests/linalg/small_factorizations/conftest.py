"""One build of csrc for the host, for all tests of a session, and one thread: small matrices are slower on
several.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from host_build import CSRC, MISSING, Host


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    if MISSING:
        pytest.skip(MISSING)
    folder: Path = tmp_path_factory.mktemp("host")
    return Host(CSRC / "host.cpp", folder / "host.so", "-O2")
