"""Groups of several processes in a test: forked, as torchrun starts them, and what each of them returned."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from mingle import ranks
from mingle.ranks import watch


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def world(
    size: int, work: Callable[[], Any], seconds: float = 120, lost: float = 30.0, *, joined: bool = True
) -> list[Any]:
    """What `work` returns or raises on every rank; None of a rank that was killed.

    Args:
        size: how many processes.
        work: done by each within `ranks.joined`, one of which has no launcher at all.
        seconds: within which all have to end; else they are killed, and the test fails.
        lost: after so many seconds without a sign a rank counts as ended.
        joined: off where the work itself joins.
    """
    fork, port = multiprocessing.get_context("fork"), free_port()
    pipes = [fork.Pipe(duplex=False) for _ in range(size)]
    processes = [
        fork.Process(target=_run, args=(number, size, port, work, pipe[1], lost, joined), daemon=True)
        for number, pipe in enumerate(pipes)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()
    end = time.monotonic() + seconds
    try:
        found = []
        for receiver, _ in pipes:
            assert receiver.poll(max(0.0, end - time.monotonic())), "a rank hangs"
            try:
                found.append(pickle.loads(receiver.recv_bytes()))
            except EOFError:
                found.append(None)
        return found
    finally:
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
            process.kill()


def _run(
    number: int, size: int, port: int, work: Callable[[], Any], pipe: Any, lost: float, joined: bool
) -> None:
    torch.set_num_threads(1)
    watch.BEAT, watch.LOST, watch.HEARD = 0.1, lost, 1.0
    if size > 1:
        os.environ |= {"RANK": str(number), "WORLD_SIZE": str(size), "LOCAL_RANK": str(number)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with ranks.joined() if joined else nullcontext():
            found = work()
    except BaseException as error:
        found = error
    pipe.send_bytes(pickle.dumps(found))
