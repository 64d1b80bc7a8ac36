"""A whole merge against the paper's formulas, written a second time."""

from __future__ import annotations

import math

import pytest
import torch
from small_merges import NAMES, SETTINGS
from transformers import CLIPModel

import mingle
from mingle.tasks import TaskData


def test_a_whole_merge_by_a_plain_second_implementation(base_model, tuned_states, samples):
    """Projection, experts, gates, adaptation, relaxation and subspaces, written again without the library's
    parts.
    """
    torch.set_default_dtype(torch.float64)
    try:
        base = CLIPModel(base_model.config).double().eval()
        base.load_state_dict(base_model.state_dict())
        tuned = [{k: v.double() for k, v in state.items()} for state in tuned_states]
        data = [
            TaskData(
                {k: v.double() for k, v in s.inputs.items()}, {k: v.double() for k, v in s.shared.items()}
            )
            for s in samples
        ]
        merger = mingle.Merger(
            base,
            "mingle",
            **(SETTINGS | dict(steps=6, gate_init="zeros", batch_size=24, layers=("mlp.fc1", "q_proj"))),
        )
        plain = PlainMingle(base, ("mlp.fc1", "self_attn.q_proj"), rank=4, steps=6, lr=5e-3)
        for i in range(3):
            merger.add(NAMES[i], tuned[i], data[i])
            plain.add(tuned[i], data[i].inputs["pixel_values"], data[i].shared["text_embeds"])
    finally:
        torch.set_default_dtype(torch.float32)
    for name, layer in merger.method.layers.items():
        weight, bias = layer.all_gates()
        torch.testing.assert_close(
            weight, torch.stack([w for w, _ in plain.gates[name]]), rtol=1e-6, atol=1e-9
        )
        torch.testing.assert_close(bias, torch.stack([b for _, b in plain.gates[name]]), rtol=1e-6, atol=1e-9)
        U, V = merger.method.bases[name], plain.bases[name]
        torch.testing.assert_close(U @ U.T, V @ V.T, rtol=0, atol=1e-7)


class PlainMingle:
    """The method as the paper's formulas read: dense experts, hooks for the gated sum, Adam and projection by
    hand.
    """

    def __init__(self, base, suffixes, rank, steps, lr, k=3, gamma=1.0, beta=0.99, temperature=2.0):
        self.base, self.rank, self.steps, self.lr = base, rank, steps, lr
        self.k, self.gamma, self.beta, self.temperature = k, gamma, beta, temperature
        self.linears = {n: m for n, m in base.vision_model.named_modules() if n.endswith(suffixes)}
        self.dense = {n: [] for n in self.linears}
        self.gates = {n: [] for n in self.linears}
        self.bases = {n: torch.zeros(m.in_features, 0) for n, m in self.linears.items()}

    def logits(self, pixels, head, inputs=None):
        def hook(name):
            def gated(module, args, output):
                x = args[0]
                if inputs is not None:
                    inputs.setdefault(name, []).append(x.detach().reshape(-1, x.shape[-1]))
                for (w, b), D in zip(self.gates[name], self.dense[name], strict=True):
                    output = output + (x.mean(1) @ w + b)[:, None, None] * (x @ D.T)
                return output

            return gated

        handles = [m.register_forward_hook(hook(n)) for n, m in self.linears.items()]
        image = self.base.visual_projection(self.base.vision_model(pixel_values=pixels).pooler_output)
        for handle in handles:
            handle.remove()
        return self.base.logit_scale.exp() * (image / image.norm(dim=-1, keepdim=True)) @ head.T

    def add(self, tuned, pixels, head):
        own = {k: v.clone() for k, v in self.base.vision_model.state_dict().items()}
        experts, old_gates = self.dense, self.gates
        self.dense, self.gates = {n: [] for n in self.linears}, {n: [] for n in self.linears}
        self.base.vision_model.load_state_dict(tuned)
        with torch.no_grad():
            target = torch.softmax(self.logits(pixels, head) / self.temperature, -1)
        self.base.vision_model.load_state_dict(own)
        self.dense, self.gates = experts, old_gates
        parameters = []
        for n, m in self.linears.items():
            delta = tuned[f"{n}.weight"] - own[f"{n}.weight"]
            if self.dense[n]:
                U, S, Vh = torch.linalg.svd(sum(self.dense[n]))
                p = S / S.sum()
                alpha = int(math.exp(-sum(v * math.log(v) for v in p.tolist() if v > 0)))
                core = U.T @ delta @ Vh.T
                core[:alpha, :alpha] = 0
                delta = U @ core @ Vh
            U, S, Vh = torch.linalg.svd(delta)
            self.dense[n].append(U[:, : self.rank] * S[: self.rank] @ Vh[: self.rank])
            gate = torch.zeros(m.in_features, requires_grad=True), torch.zeros((), requires_grad=True)
            self.gates[n].append(gate)
            parameters.append((n, gate))
        first = {id(p): torch.zeros_like(p) for _, gate in parameters for p in gate}
        second = {id(p): torch.zeros_like(p) for _, gate in parameters for p in gate}
        S_all = {n: torch.zeros(self.bases[n].shape[1]) for n in self.linears}
        for step in range(1, self.steps + 1):
            loss = (
                -(target * torch.log_softmax(self.logits(pixels, head) / self.temperature, -1)).sum(-1).mean()
            )
            grads = torch.autograd.grad(loss, [p for _, gate in parameters for p in gate])
            with torch.no_grad():
                for i, (n, gate) in enumerate(parameters):
                    g, U = grads[2 * i], self.bases[n]
                    S_all[n] = self.beta * S_all[n] + (1 - self.beta) * (g @ U).abs() / (g.norm() + 1e-12)
                    g = g - U @ (torch.exp(-self.gamma * S_all[n]) * (U.T @ g))
                    for p, gradient in zip(gate, (g, grads[2 * i + 1]), strict=True):
                        first[id(p)] = 0.9 * first[id(p)] + 0.1 * gradient
                        second[id(p)] = 0.999 * second[id(p)] + 0.001 * gradient**2
                        p -= (
                            self.lr
                            * (first[id(p)] / (1 - 0.9**step))
                            / ((second[id(p)] / (1 - 0.999**step)).sqrt() + 1e-8)
                        )
        inputs = {}
        with torch.no_grad():
            for n, gate in parameters:
                self.gates[n][-1] = tuple(p.detach() for p in gate)
            self.logits(pixels, head, inputs)
            for n, chunks in inputs.items():
                new = torch.linalg.svd(torch.cat(chunks), full_matrices=False).Vh[: self.k].T
                self.bases[n] = torch.linalg.qr(torch.cat([self.bases[n], new], 1)).Q


def test_batch_gates_need_whole_batches(base_folder):
    with pytest.raises(ValueError, match="micro_batch_size=2: with batch gates .* take sample gates"):
        mingle.Merger(base_folder, "mingle", reduce="batch", micro_batch_size=2)
    with pytest.raises(ValueError, match="micro_batch_size=0: expected a positive integer"):
        mingle.Merger(base_folder, "mingle", micro_batch_size=0)
