"""What features are called, and other names that are known without transformers."""

FEATURES = ("last", "full", "residual", "semantic", "continuous")
"""What a language model reads, rows by position (arXiv 2412.03069, table 8).

- ``last``: f^ of all scales, every channel.
- ``full``: f^ of the first scale, of the first two, and so on, each at the size of its last scale.
- ``residual``: the codes of each scale alone.
- ``semantic``: ``last``, its semantic channels alone.
- ``continuous``: the features before quantization, an upper bound for ``last``.
"""

DTYPES = ("float32", "bfloat16", "float16")
"""What a tokenizer's encoders and codebook may be rounded to."""

WINDOWS = (1, 3, 5, 7)
"""Sides of the neighbourhood that a position's row may hold."""
