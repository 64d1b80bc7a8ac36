"""The peers of the kernels' benchmark compute the same function."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny_cases import CPU, tiny

from mingle.bench.gated_experts import check, handmade, inputs
from mingle.bench.gated_experts.cases import KernelCase
from mingle.bench.gated_experts.peers import PEERS, SLOW_TO_BUILD
from mingle.bench.measure import Unavailable
from mingle.kernels.gated_experts import reference

#: what has to run on any CPU, by what the gates are reduced over
EVERYWHERE = {"mingle", "mingle eager", "mingle grouped", "eager loop", "grouped eager", "peft x-lora"}


ALSO = {"token": set(), "sample": {"per-sample merge"}, "batch": {"fold eager", "dense merge"}}


def agreeing(case: KernelCase) -> set[str]:
    """The peers that can run and compute the case's function, once found to agree with the oracle."""
    case_inputs, agreed = inputs.make(case, CPU), set()
    for name, peer in PEERS.items():
        if name in SLOW_TO_BUILD:
            continue
        try:
            adapted = peer.adapt(case_inputs)
            run_once = peer.build(adapted)
        except Unavailable:
            continue
        if not peer.same(case):
            assert run_once()
            continue
        errors = check.Oracle(adapted).errors(run_once)
        assert errors.keys() == ({"y", *case_inputs.differentiated()} if case.backward else {"y"})
        assert max(errors.values()) <= check.tolerance(adapted.x.dtype, CPU), (name, errors)
        agreed.add(name)
    return agreed


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("reduce", reference.REDUCTIONS)
def test_peers_agree_with_the_oracle(reduce, backward):
    pytest.importorskip("peft")
    folded = {"folded weight"} if reduce == "batch" and not backward else set()
    assert agreeing(tiny(reduce, backward=backward)) >= EVERYWHERE | ALSO[reduce] | folded
    assert agreeing(tiny(reduce, backward=backward, dtype="bfloat16")) >= EVERYWHERE | ALSO[
        reduce
    ] | folded | {"eager loop fp32"}


@pytest.mark.parametrize("backward", [False, True])
def test_peers_agree_with_the_oracle_where_a_router_gives_the_gates(backward):
    pytest.importorskip("peft")
    routed = tiny(routed=True, samples=8, backward=backward)
    assert agreeing(routed) >= EVERYWHERE | ALSO["sample"] | {"mingle one expert"}


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="needs a C++ compiler")
def test_the_compiled_peer_agrees_with_the_oracle():
    case_inputs = inputs.make(tiny(), CPU)
    assert check.Oracle(case_inputs).errors(PEERS["grouped compiled"].build(case_inputs))["y"] < 2e-6


def test_every_sample_and_gradient_of_large_cases_is_checked():
    for reduce in reference.REDUCTIONS:
        case_inputs = inputs.make(tiny(reduce, samples=8, backward=True), CPU)
        dy, oracle = case_inputs.dy.clone(), check.Oracle(case_inputs)
        assert len(oracle.expected["y"]) == 8 and oracle.expected.keys() == {
            "y",
            "x",
            "gate_weight",
            "gate_bias",
        }
        right = PEERS["eager loop"].build(case_inputs)
        assert max(oracle.errors(right).values()) < 2e-6
        assert torch.equal(case_inputs.dy, dy)
        for name, found in right().items():  # an error anywhere is seen
            wrong = right() | {name: 1.01 * found}
            assert oracle.errors(lambda wrong=wrong: wrong)[name] > 5e-3


def test_the_handmade_chain_is_the_same_in_place_and_not():
    t = inputs.make(tiny("token"), CPU)
    down, up = t.side_by_side()
    torch.testing.assert_close(
        handmade.chain(t, down, up, in_place=True), handmade.chain(t, down, up, in_place=False)
    )
