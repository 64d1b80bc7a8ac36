"""The gated sum of low-rank experts: y = x W₀ᵀ + b + Σ_i g_i(x) · (x A_iᵀ) B_iᵀ (MINGLE Eqs. 2 and 5).

reference   the formula, expert by expert: the oracle of the tests, backend "eager"
grouped     dense products over concatenated experts, for any device: backend "grouped"
triton      the fused kernels: backend "triton"
shrink, expand, upstream
            its kernels, each with its launcher
listed      its kernels that pass over gates of 0
active      which experts those leave, and whether tokens are sorted by them
gates       its kernels for the gate values
descriptors its kernels for large products on Hopper and later
common      what those kernels share
cost        operations and bytes of a call, whatever computes it
fold        one weight W_eff for tokens that share their gates, in Triton; dense: `grouped.fold`

`mingle.ops` puts autograd around them and chooses between them; `mingle.functional.gated_experts` is public.
"""
