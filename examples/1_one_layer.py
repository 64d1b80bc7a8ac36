"""A frozen linear layer takes on one low-rank expert after another; only the newest gate ever trains."""

import torch

import mingle

torch.manual_seed(0)
layer = mingle.MingleLinear.from_linear(torch.nn.Linear(64, 32))
x = torch.randn(256, 4, 64)  # 256 samples of 4 tokens
before = layer(x)

# An expert is a pair of factors, or the best approximation of a dense update.
layer.add_expert(A=torch.randn(4, 64), B=torch.randn(32, 4))
layer.add_expert(*mingle.LowRankExpert.from_dense(torch.randn(32, 64), rank=4))
trainable, total = mingle.count_parameters(layer)
print(f"{layer.num_experts} experts, {trainable} of {total} parameters train")

# Teach the newest gate how much of its expert is wanted: here, all of it.
wanted = layer(x).detach() + (x @ layer.A[1].mT) @ layer.B[1].mT
optimizer = torch.optim.Adam([layer.gate_weight, layer.gate_bias], lr=0.05)
for _ in range(300):
    loss = torch.nn.functional.mse_loss(layer(x), wanted)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.4f}, bias of the gate {layer.gate_bias.item():.2f}")

# Gates may come from any other router: zeros give back the base layer.
gates = torch.zeros(layer.num_experts)
y = mingle.functional.gated_experts(x, layer.weight, layer.bias, layer.A, layer.B, None, None, gates=gates)
print(f"base layer again: {torch.allclose(y, before, atol=1e-6)}")
