"""The peers of the kernels' benchmark compute the same function."""

from __future__ import annotations

import shutil
import sys

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


class StandIn:
    """What `vllm.lora.ops.triton_ops` offers, as of vLLM 0.33, in plain PyTorch."""

    class LoRAKernelMeta:
        @classmethod
        def make(cls, max_loras: int, max_num_tokens: int, device: torch.device) -> StandIn.LoRAKernelMeta:
            assert device == CPU
            return cls()

        def prepare_tensors(self, token_lora_mapping: torch.Tensor) -> None:
            self.mapping = token_lora_mapping

        def meta_args(self, token_nums: int, specialize_active_lora: bool) -> list[torch.Tensor]:
            assert token_nums == len(self.mapping)
            return [self.mapping, *[torch.empty(1)] * 6]

    @staticmethod
    def lora_shrink(inputs, lora_a_weights, output_tensor, mapping, _1, _2, _3, _4, _5, _6, scaling):
        (weights,) = lora_a_weights  # [adapters, r, d_in]
        assert inputs.dtype == weights.dtype == torch.bfloat16 and weights.is_contiguous()
        hidden = torch.einsum("nk,nrk->nr", inputs.float(), weights[mapping].float())
        output_tensor.copy_(scaling * hidden[None])

    @staticmethod
    def lora_expand(
        inputs,
        lora_b_weights,
        output_tensor,
        mapping,
        _1,
        _2,
        _3,
        _4,
        _5,
        _6,
        offset_start=0,
        add_inputs=False,
    ):
        (weights,) = lora_b_weights  # [adapters, d_out, r]
        assert inputs.shape[0] == 1 and weights.dtype == torch.bfloat16 and weights.is_contiguous()
        assert add_inputs and offset_start == 0 and output_tensor.shape[1] == weights.shape[1]
        output_tensor += torch.einsum("nr,nor->no", inputs[0], weights[mapping].float()).bfloat16()


def test_vllm_is_driven_as_its_kernels_want_it(monkeypatch):
    routed = inputs.make(tiny(routed=True, samples=8, dtype="bfloat16"), CPU)
    vllm = PEERS["vllm lora"]
    monkeypatch.setitem(sys.modules, "vllm.lora.ops.triton_ops", None)
    with pytest.raises(Unavailable, match="vllm is not installed"):
        vllm.build(routed)
    for name in ("vllm", "vllm.lora", "vllm.lora.ops", "vllm.lora.ops.triton_ops"):
        monkeypatch.setitem(sys.modules, name, StandIn)
    errors = check.Oracle(routed).errors(vllm.build(routed))
    assert errors["y"] <= check.tolerance(torch.bfloat16, CPU)
    for other, reason in (
        (tiny(dtype="bfloat16"), "one adapter"),
        (tiny(routed=True, samples=8, dtype="bfloat16", backward=True), "no gradient"),
        (tiny(routed=True, samples=8), "half precision"),
    ):
        with pytest.raises(Unavailable, match=reason):
            vllm.build(inputs.make(other, CPU))


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
