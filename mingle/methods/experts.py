"""From a task vector to an expert: remove what earlier experts do, keep the rest's leading directions.

These are Eqs. 3–4 of MINGLE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mingle import linalg, ranks
from mingle.io.lazy_tensors import LazyTensors, described
from mingle.linalg.arithmetic import buckets, stacked
from mingle.nn.low_rank_expert import LowRankExpert


def project_out_experts(delta: Tensor, B: Tensor, A: Tensor, *, drop_diagonal: bool = False) -> Tensor:
    """Δ without the block of the leading singular directions of the earlier experts' joint update B A.

    The number of these directions is the effective rank of B A.

    Args:
        delta: Δ [..., m, n].
        B: [..., m, R], the experts' own side by side.
        A: [..., R, n], the experts' own one above the other.
        drop_diagonal: see `mingle.linalg.project_out`.  It is in the paper's formula, but not behind the
            published numbers.
    """
    U, S, Vh = linalg.factored_svd(B, A)
    leading = linalg.effective_rank(S) if S.dim() == 1 else linalg.effective_ranks(S)
    return linalg.project_out(delta, U, S, Vh, leading, drop_diagonal=drop_diagonal)


def concatenated(experts: Sequence[LowRankExpert]) -> tuple[Tensor, Tensor]:
    """B [d_out, R] and A [R, d_in] with B A = Σ_i B_i A_i; of one expert or more."""
    return torch.cat([expert.B for expert in experts], 1), torch.cat([expert.A for expert in experts], 0)


def make_experts(
    deltas: Mapping[str, Tensor],
    earlier: Mapping[str, Sequence[LowRankExpert]],
    rank: int,
    *,
    drop_diagonal: bool = False,
    energy: float = 1.0,
) -> dict[str, LowRankExpert]:
    """The rank-`rank` experts of a task, for all layers together.

    A layer's Δ without the directions of earlier experts is ≈ Ũ Σ̃ Ṽᵀ, and its expert is B = Ũ [d_out, r]
    and A = Σ̃ Ṽᵀ [r, d_in].

    Args:
        deltas: Δ [d_out, d_in] by layer.
        earlier: the experts of earlier tasks by layer, the same number in each.
        rank: r; at most min(d_out, d_in) is used.
        drop_diagonal: see `project_out_experts`.
        energy: an expert has no more directions than hold this share of ‖Δ‖², of what is left of Δ.

    Raises:
        ValueError: a Δ with non-finite entries; the message names the layer.
    """
    names, matrices = list(deltas), list(deltas.values())
    projected = list(matrices)
    for places in buckets(matrices):
        if not earlier[names[places[0]]]:
            continue
        B, A = map(stacked, zip(*(concatenated(earlier[names[i]]) for i in places), strict=True))
        parts = project_out_experts(stacked([matrices[i] for i in places]), B, A, drop_diagonal=drop_diagonal)
        for i, part in zip(places, parts.view(len(places), *matrices[places[0]].shape), strict=True):
            projected[i] = part
    triplets = linalg.svd_lowrank(projected, rank, keys=names)
    experts = {}
    for name, delta, U, S, Vh in zip(names, projected, *triplets, strict=True):
        r = len(S) if energy == 1 else leading(S, energy * delta.double().square().sum())
        experts[name] = LowRankExpert(S[:r].unsqueeze(1) * Vh[:r], U[:, :r])
    return experts


def shared_experts(
    deltas: Mapping[str, Tensor],
    earlier: Mapping[str, Sequence[LowRankExpert]],
    rank: int,
    *,
    drop_diagonal: bool = False,
    energy: float = 1.0,
) -> dict[str, LowRankExpert]:
    """The same as `make_experts`, bit for bit, by all processes together; see `mingle.ranks`.

    Each makes those of some layers, and tells the others.  Deltas that are made when they are asked for are
    in memory one at a time.

    Args:
        deltas, rank, drop_diagonal, energy: see `make_experts`; the same in every process.
        earlier: the experts of the layers that this process has, see `own_layers`.
    """
    lazy = isinstance(deltas, LazyTensors)
    if ranks.size() == 1 and not lazy:  # nobody to tell, and experts stay on their device
        return make_experts(deltas, earlier, rank, drop_diagonal=drop_diagonal, energy=energy)
    made: dict[str, LowRankExpert] = {}
    for names in _own_units(deltas):
        part = {name: deltas[name] for name in names}
        made |= make_experts(part, earlier, rank, drop_diagonal=drop_diagonal, energy=energy)
    found = ranks.gather({name: (expert.A.cpu(), expert.B.cpu()) for name, expert in made.items()})
    of_all = {name: expert for each in found for name, expert in each.items()}
    place = {name: torch.device("cpu") if lazy else deltas[name].device for name in deltas}
    return {name: LowRankExpert(*(part.to(place[name]) for part in of_all[name])) for name in deltas}


def own_layers(deltas: Mapping[str, Tensor]) -> list[str]:
    """The layers whose experts this process makes in `shared_experts`."""
    return [name for names in _own_units(deltas) for name in names]


def _own_units(deltas: Mapping[str, Tensor]) -> list[list[str]]:
    """The same, with what is decomposed together; that stays so, for the same bits."""
    names, matrices = list(deltas), [described(deltas, name) for name in deltas]
    lazy = isinstance(deltas, LazyTensors)
    units = [[i] for i in range(len(names))] if lazy else list(buckets(matrices))
    mine = ranks.dealt([sum(matrices[i].numel() for i in unit) for unit in units])[ranks.rank()]
    return [[names[i] for i in units[number]] for number in mine]


def leading(S: Tensor, energy: Tensor) -> int:
    """How many of the singular values S [k], 1 or more, have squares that add up to `energy`; at most all."""
    return min(int((S.double().square().cumsum(0) < energy).sum()) + 1, len(S))
