"""The numerical kernels of mingle; installed as ``mingle.kernels``.

`reference` holds every operation in plain PyTorch: the specification in code, the oracle of the tests and the published eager baseline.
"""
