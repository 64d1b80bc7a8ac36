"""The null-space constraint with adaptive relaxation: G ← G − (G U) diag(λ) Uᵀ (MINGLE Eqs. 8–11).

reference   one layer by the formula: the oracle of the tests, backend "eager"
triton      all layers at once, in two launches: backend "triton"

`mingle.adaptation.projector` chooses between them.
"""
