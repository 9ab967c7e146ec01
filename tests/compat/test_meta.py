"""Stand-ins made on the meta device are whole after ``to_empty`` and every ``reset_parameters``."""

from __future__ import annotations

import pytest
import torch

from tokenflow_ext import compat
from tokenflow_ext.compat import llamagen

BUILDERS = {
    "VectorQuantize": lambda: compat.VectorQuantize(dim=12, codebook_size=8, codebook_dim=6),
    "cosine": lambda: compat.VectorQuantize(dim=12, codebook_size=8, use_cosine_sim=True),
    "learnable": lambda: compat.VectorQuantize(
        dim=12, codebook_size=8, learnable_codebook=True, ema_update=False
    ),
    "k-means": lambda: compat.VectorQuantize(dim=12, codebook_size=8, kmeans_init=True),
    "heads": lambda: compat.VectorQuantize(
        dim=12, codebook_size=8, heads=2, separate_codebook_per_head=True
    ),
    "ResidualVQ": lambda: compat.ResidualVQ(dim=12, codebook_size=8, num_quantizers=2),
    "GroupedResidualVQ": lambda: compat.GroupedResidualVQ(
        dim=12, groups=3, codebook_size=8, num_quantizers=2
    ),
    "SimVQ": lambda: compat.SimVQ(12, 8, frozen_codebook_dim=5),
    "ResidualSimVQ": lambda: compat.ResidualSimVQ(dim=12, codebook_size=8, num_quantizers=2),
    "HierarchicalVQ": lambda: compat.HierarchicalVQ(
        dim=12, codebook_size=8, scales=(1, 2), accept_image_fmap=True
    ),
    "FSQ": lambda: compat.FSQ([5, 5, 4], dim=12, orthogonal_rotation=True),
    "ResidualFSQ": lambda: compat.ResidualFSQ(levels=[5, 5, 4], dim=12, num_quantizers=2),
    "LFQ": lambda: compat.LFQ(dim=12, codebook_size=16, orthogonal_rotation=True),
    "LFQ, cosine": lambda: compat.LFQ(dim=12, codebook_size=16, cosine_sim_project_in=True),
    "ResidualLFQ": lambda: compat.ResidualLFQ(dim=12, codebook_size=16, num_quantizers=2),
    "TokenFlow": lambda: compat.VectorQuantizer(8, 12, 0.25, 0.0, True, True, split=[8, 4]),
    "VAR": lambda: compat.VectorQuantizer2(8, 12, True, v_patch_nums=(1, 2)),
    "LlamaGen": lambda: llamagen.VectorQuantizer(8, 12, 0.25, 0.0, True, True),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_reset_parameters_fills_what_to_empty_made(name: str) -> None:
    with torch.device("meta"):
        module = BUILDERS[name]()
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    # Random, and what they are made into.
    codes = {"embed", "embed_avg", "frozen_codebook", "orthogonal_rot"}
    for name_, parameter in module.named_parameters():
        assert bool(parameter.isfinite().all()), name_
    fresh = dict(BUILDERS[name]().named_buffers())
    for name_, buffer in module.named_buffers():
        if name_.rpartition(".")[2] in codes:
            assert bool(buffer.isfinite().all()), name_
        else:
            assert torch.equal(buffer, fresh[name_]), name_

    sides = {"TokenFlow": 4, "LlamaGen": 4, "HierarchicalVQ": 4, "VAR": 2}
    side = sides.get(name)
    x = torch.randn(2, 12, side, side) if side else torch.randn(2, 5, 12)
    assert bool(module(x)[0].isfinite().all())


@pytest.mark.parametrize("name", ["FSQ", "ResidualFSQ", "LFQ", "ResidualLFQ"])
def test_scalar_codes_on_the_meta_device(name: str) -> None:
    x = torch.randn(2, 5, 12)
    with torch.device("meta"):
        module = BUILDERS[name]()
    expected = BUILDERS[name]()(x)
    for part, other in zip(module(x.to("meta")), expected, strict=True):
        assert (part.device.type, part.shape, part.dtype) == ("meta", other.shape, other.dtype)
    codebook = {"FSQ": "implicit_codebook", "LFQ": "codebook"}.get(name, "codebooks")
    assert getattr(module, codebook).is_meta
