"""The numerical kernels of mingle, installed as ``mingle.kernels``: pure functions of tensors; `mingle.ops` puts autograd around them.

reference       every operation in plain PyTorch: the specification in code, the oracle of the tests and the published eager baseline
gated_experts   Triton: shrink, expand and their backward
fold            Triton: one weight for tokens that share their gates
grouped         the same operations as dense products, for any device
gemm            dense products in the faster of the CPU's two libraries
prepack         copies of frozen factors in the layouts those are fastest with
configs         tile sizes of the Triton kernels
store           what was measured for this user and machine
"""
