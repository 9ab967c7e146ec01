"""Measurements of the kernels against eager PyTorch; `pytest benchmarks` runs them all."""
