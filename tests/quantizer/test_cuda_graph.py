"""Nothing waits for the host: whole calls are captured in a CUDA graph and replayed."""

from __future__ import annotations

import pytest
import torch

from tokenflow_ext import MultiScaleQuantizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def quantizer_and_features() -> tuple[MultiScaleQuantizer, torch.Tensor]:
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(1000, (32, 8), (1, 2, 4, 6), scale_drop=0.0).cuda()
    return quantizer, torch.randn(2, 40, 6, 6, device="cuda")


def test_forward() -> None:
    quantizer, h = quantizer_and_features()
    quantizer.eval()
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            quantizer(h)  # lazy state is made outside the capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = quantizer(h)
        for seed in (1, 2):
            h.copy_(torch.randn(h.shape, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            expected = quantizer(h)
            assert torch.equal(captured.indices, expected.indices)
            assert torch.equal(captured.quantized, expected.quantized)


@pytest.mark.parametrize("atomic", [False, True])
def test_backward(atomic: bool) -> None:
    quantizer, h = quantizer_and_features()
    quantizer.atomic_codebook_gradient = atomic
    h.requires_grad_(True)
    wanted = [h, *quantizer.codebooks]

    def step() -> tuple[torch.Tensor, ...]:
        out = quantizer(h)
        loss = out.quantized.square().mean() + out.vq_loss + out.commitment_loss
        return torch.autograd.grad(loss, wanted)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        h.copy_(torch.randn(h.shape, generator=torch.Generator().manual_seed(3)))
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5 if atomic else 0, atol=1e-7 * atomic)
