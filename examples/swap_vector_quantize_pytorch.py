"""From vector-quantize-pytorch: its classes beside ours, with the same weights and input.

    python examples/swap_vector_quantize_pytorch.py

Needs `pip install vector-quantize-pytorch`. For each class it prints how many indices are the same.
"""

import sys

import torch

from tokenflow_ext import compat

try:
    import vector_quantize_pytorch
except ImportError as error:
    sys.exit(f"error: {error}: pip install vector-quantize-pytorch")

table = {"dim": 32, "codebook_size": 512}
classes = {
    "VectorQuantize": table,
    "ResidualVQ": {**table, "num_quantizers": 4},
    "GroupedResidualVQ": {**table, "groups": 2, "num_quantizers": 4},
    "SimVQ": table,
    "ResidualSimVQ": {**table, "num_quantizers": 4},
    "FSQ": {"dim": 32, "levels": [8, 8, 8, 6, 5]},
    "ResidualFSQ": {"dim": 32, "levels": [5, 5, 5, 5], "num_quantizers": 3},
    "LFQ": {"dim": 32, "codebook_size": 512},
    "ResidualLFQ": {"dim": 32, "codebook_size": 512, "num_quantizers": 3},
}

torch.manual_seed(0)
x = torch.randn(2, 100, 32)
for name, options in classes.items():
    theirs = getattr(vector_quantize_pytorch, name)(**options).eval()
    ours = getattr(compat, name)(**options).eval()
    ours.load_state_dict(theirs.state_dict())
    same = theirs(x)[1] == ours(x)[1]
    print(f"{name}: {same.sum()} of {same.numel()} indices are the same")
