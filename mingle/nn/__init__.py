"""Layers that take on experts: `MingleLinear`, its way into a model, and adapters of other libraries."""
