"""Operators: a PyTorch reference that is the specification, and kernels beside it."""
