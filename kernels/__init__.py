"""The numerical kernels of mingle, installed as ``mingle.kernels``: pure functions of tensors.

`mingle.ops` puts autograd around them.

gated_experts/        the gated sum of low-rank experts: the formula (oracle), dense products, Triton kernels
relaxed_projection/   the null-space constraint with adaptive relaxation, likewise
tiles                 tile sizes of the Triton kernels; tile_rule says which is fastest by a model of the chip
launches              their launches, recorded once and repeated
chips                 what is known of the GPUs they run on
gemm                  dense products in the faster of the CPU's two libraries
prepack               copies of frozen factors in the layouts those are fastest with
store                 what was measured for this user and machine
dtypes                the dtype in which sums are kept
"""

#: transformers asks a package called kernels for its version, and from the root of a checkout it finds this
#: one, which must look too old to be used.
__version__ = "0"
