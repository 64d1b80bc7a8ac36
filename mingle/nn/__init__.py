"""Layers that take on experts: `MingleLinear`, how it gets into a model, and adapters of other libraries."""
