"""Stand-ins for other libraries' quantizers, on the fused search: swap the import, keep the rest.

- `VectorQuantizer`: TokenFlow's (tokenflow/tokenizer/vq_model.py)
- `llamagen.VectorQuantizer`: LlamaGen's (tokenizer/tokenizer_image/vq_model.py)
- `VectorQuantizer2`: VAR's (models/quant.py), with its phi convolutions
- `VectorQuantize`, `ResidualVQ`, `GroupedResidualVQ`, `HierarchicalVQ`, `SimVQ`, `ResidualSimVQ`,
  `FSQ`, `ResidualFSQ`, `LFQ`, `ResidualLFQ`: those of vector-quantize-pytorch 1.32

Constructors, return values and the names in a `state_dict` are theirs, so that their checkpoints
load. The search never forms the matrix of distances. An option that needs it, or that is not
supported for another reason, raises NotImplementedError naming the option and what was given.
Running statistics are summed over all processes, by collectives that every process enters at every
step.
docs/guides/migration.md shows each swap and lists what differs.
"""

from . import llamagen
from .fsq import FSQ, ResidualFSQ
from .hierarchical_vq import HierarchicalVQ
from .lfq import LFQ, ResidualLFQ
from .residual_vq import GroupedResidualVQ, ResidualVQ
from .sim_vq import ResidualSimVQ, SimVQ
from .tokenflow import VectorQuantizer
from .var import VectorQuantizer2
from .vector_quantize import VectorQuantize

__all__ = [
    "FSQ",
    "LFQ",
    "GroupedResidualVQ",
    "HierarchicalVQ",
    "ResidualFSQ",
    "ResidualLFQ",
    "ResidualSimVQ",
    "ResidualVQ",
    "SimVQ",
    "VectorQuantize",
    "VectorQuantizer",
    "VectorQuantizer2",
    "llamagen",
]
