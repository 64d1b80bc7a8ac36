"""A memory for what a model computes before its first expert, which every step of an adaptation repeats."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mingle.nn.early_stop import run_until
from mingle.nn.sharded import is_sharded

logger = logging.getLogger(__name__)

#: The largest size, in bytes, of the results kept for all samples together.
BUDGET = 2**30


@contextmanager
def frozen_prefix(
    model: nn.Module,
    experts: Iterable[nn.Module],
    run: Callable[[slice], Any],
    count: int,
    batch_size: int,
    budget: int = BUDGET,
) -> Iterator[Callable[[Tensor], None]]:
    """Inside the block, modules that finish before the first of `experts` begins answer from memory.

    Only modules whose result is one tensor with a row per sample, computed once per pass, are replaced.  The
    model must be in evaluation mode, and nothing in front of the experts may train.  Of a model whose blocks
    are shared out nothing is kept: its processes pass the blocks together.

    Args:
        model: the model that `run` calls.
        experts: the modules that change; what comes before all of them is the prefix.
        run: passes the samples of a slice through the model.
        count: how many samples there are.
        batch_size: of the passes that fill the memory.
        budget: in bytes; where all results together would take more, nothing is kept.

    Yields:
        A function to be called with the indices [n] of the samples in the next pass.
    """
    if is_sharded(model):
        yield lambda _: None
        return
    experts = list(experts)
    own: dict[nn.Module, Any] = {}  # the instances' own replacements of their class's `forward`
    modules = _per_sample(_candidates(model, set(experts)), run)
    results = _recorded(modules, experts, run, count, batch_size, budget)
    index = torch.zeros(0, dtype=torch.long)

    def select(chosen: Tensor) -> None:
        nonlocal index
        index = chosen

    def recall(kept: Tensor) -> Callable[..., Tensor]:
        return lambda *_args, **_kwargs: kept[index]

    try:
        for module, kept in results.items():
            own[module] = vars(module).get("forward")
            module.forward = recall(kept)
        yield select
    finally:
        for module, forward in own.items():
            del module.forward  # the class has it
            if forward is not None:
                module.forward = forward


def _candidates(model: nn.Module, experts: set[nn.Module]) -> list[nn.Module]:
    """The largest callable modules without an expert inside."""
    if not any(module in experts for module in model.modules()) and not isinstance(
        model, nn.ModuleList | nn.ModuleDict
    ):
        return [model]
    return [
        found for child in model.children() if child not in experts for found in _candidates(child, experts)
    ]


def _per_sample(modules: list[nn.Module], run: Callable[[slice], Any]) -> list[nn.Module]:
    """Those of `modules` that a pass of one sample calls exactly once, and that then return one row.

    A second call, perhaps behind an expert, has another input; and a result per position, such as a bias of
    attention, has as many rows for one sample as for all.
    """
    rows: dict[nn.Module, list[bool]] = {module: [] for module in modules}

    def note(module: nn.Module, _args: Any, result: Any) -> None:
        rows[module].append(isinstance(result, Tensor) and result.shape[:1] == (1,))

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        with torch.no_grad():
            run(slice(0, 1))
    finally:
        for handle in handles:
            handle.remove()
    return [module for module in modules if rows[module] == [True]]


def _recorded(
    modules: list[nn.Module],
    experts: Sequence[nn.Module],
    run: Callable[[slice], Any],
    count: int,
    batch_size: int,
    budget: int,
) -> dict[nn.Module, Tensor]:
    """Module of the prefix → its results for all samples [count, ...]; empty where no expert takes part."""
    parts: dict[nn.Module, list[Any]] = {module: [] for module in modules}

    def keep(module: nn.Module, _args: Any, _kwargs: Any, result: Any) -> None:
        if module in parts:
            parts[module].append(result)

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad():
            for passes, start in enumerate(range(0, count, batch_size), 1):
                rows = slice(start, min(start + batch_size, count))
                if not run_until(experts, partial(run, rows)):
                    return {}
                parts = {
                    module: results for module, results in parts.items() if _whole(results, passes, rows)
                }
                taken = sum(part.nbytes for results in parts.values() for part in results)
                if taken * count > budget * rows.stop:
                    too_large = "the results before the first expert are not kept: they take more than %d MiB"
                    logger.info(too_large, budget >> 20)
                    return {}
    finally:
        for handle in handles:
            handle.remove()
    return {module: torch.cat(results) for module, results in parts.items()}


def _whole(results: list[Any], passes: int, rows: slice) -> bool:
    """Whether a module returned one tensor per pass, the last with a row for each of its samples."""
    last = results[-1] if len(results) == passes else None
    return isinstance(last, Tensor) and last.shape[:1] == (rows.stop - rows.start,)
