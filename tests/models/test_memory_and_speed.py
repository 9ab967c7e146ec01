"""What makes a tokenizer cheaper to train leaves its numbers alone: recomputed activations,
compiled networks, half precision around a quantizer in float32."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tokenflow_ext import ops
from tokenflow_ext.models import (
    PixelConfig,
    QuantizerConfig,
    SemanticConfig,
    TokenFlowTokenizer,
    TokenizerConfig,
    TowerConfig,
)
from tokenflow_ext.models.losses.tokenizer import tokenizer_loss
from tokenflow_ext.models.tokenizer.model import PARTS
from tokenflow_ext.models.towers.teachers import build_teacher

TOWERS = {
    "clip": TowerConfig("clip", 32, 8, width=16, depth=2, heads=2, mlp_width=32),
    "siglip": TowerConfig("siglip", 32, 8, width=16, depth=3, heads=2, mlp_width=32),
    "vitamin": TowerConfig("vitamin", 64, 16, width=384, variant="vitamin_small_224"),
    "efficientnet_lite0": TowerConfig("efficientnet_lite0", 64, 16, width=112),
}


def build(kind: str, frozen: bool = False) -> TokenFlowTokenizer:
    tower = TOWERS[kind]
    multipliers = (1, 2, 2, 2) if tower.patch_size == 8 else (1, 1, 2, 2, 2)
    torch.manual_seed(0)
    config = TokenizerConfig(
        tower.image_size,
        PixelConfig(channels=8, multipliers=multipliers, res_blocks=1, z_channels=8, groups=4),
        SemanticConfig(
            tower, frozen=frozen, decoder_width=16, decoder_depth=2, decoder_heads=2, decoder_grid=4
        ),
        QuantizerConfig(codebook_size=64, scales=(1, 2, 4), scale_drop=0.0),
        dataclasses.replace(tower),
    )
    return TokenFlowTokenizer(config).train()


def pictures(model: TokenFlowTokenizer, count: int = 2) -> torch.Tensor:
    side = model.config.image_size
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5)) * 2 - 1


def gradients(model: TokenFlowTokenizer, images: torch.Tensor) -> dict[str, torch.Tensor]:
    out = model(images)
    target = torch.ones_like(out.semantic)
    tokenizer_loss(out, images, target, semantic_kind="l2").total.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def kept_bytes(model: TokenFlowTokenizer, images: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    return sum(kept.values())


@pytest.mark.once
@pytest.mark.parametrize("kind", TOWERS)
def test_recomputed_activations_change_no_gradient(kind):
    plain, again = build(kind), build(kind)
    names = list(again.state_dict())
    again.checkpoint_activations()
    assert list(again.state_dict()) == names
    images = pictures(plain)
    assert kept_bytes(again, images) < 0.6 * kept_bytes(plain, images)
    calls = []
    for block in again.blocks():
        next(block.children()).register_forward_hook(lambda module, *_: calls.append(module))
    expected, got = gradients(plain, images), gradients(again, images)
    assert len(calls) >= 2 * len(again.blocks())  # every block ran a second time
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        assert torch.equal(gradient, got[name]), name
    with torch.no_grad():
        calls.clear()
        again.encode(images)
    assert len(calls) == len(set(calls))  # no gradient, nothing twice


@pytest.mark.parametrize("kind", TOWERS)
def test_blocks_are_apart_and_hold_most_weights(kind):
    model = build(kind)
    inside = [p for block in model.blocks() for p in block.parameters()]
    assert len(inside) == len(set(inside))
    share = sum(p.numel() for p in inside) / sum(p.numel() for p in model.parameters())
    assert share > 0.75 if kind == "vitamin" else share > 0.4  # heads and codebooks of a toy


def test_parts_hold_every_parameter_once():
    model = build("clip")
    parts = model.parts()
    assert list(parts) == list(PARTS)
    together = [p for parameters in parts.values() for p in parameters]
    assert len(together) == len(set(together))
    assert set(together) == set(model.parameters())
    pixels = TokenizerConfig(32, PixelConfig(channels=8, multipliers=(1, 2), groups=4))
    present = ["pixel_encoder", "codebooks", "pixel_decoder"]
    assert list(TokenFlowTokenizer(pixels).parts()) == present


@pytest.mark.once
def test_compiled_networks_give_the_same_losses():
    plain, compiled = build("clip"), build("clip")
    names = list(compiled.state_dict())
    compiled.compile_networks(backend="aot_eager", fullgraph=True)  # no C++ to compile
    assert list(compiled.state_dict()) == names
    images = pictures(plain)
    expected, got = gradients(plain, images), gradients(compiled, images)
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradient, got[name], rtol=2e-3, atol=2e-5, msg=name)
    with torch.no_grad():
        a, b = (m.eval()(images) for m in (plain, compiled))
    torch.testing.assert_close(a.images, b.images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantization_and_losses_stay_in_float32(monkeypatch, dtype):
    model, teacher = build("clip"), build_teacher(TOWERS["clip"], random_init=True)
    images, seen = pictures(model), []
    quantize = ops.multiscale_quantize

    def spy(features, codebook, *rest):
        seen.append((features.detach().clone(), codebook.detach().clone(), features.dtype))
        return quantize(features, codebook, *rest)

    monkeypatch.setattr(ops, "multiscale_quantize", spy)
    inside = []
    teacher.tower.conv1.register_forward_hook(lambda _, given, out: inside.extend([*given, out]))
    with torch.autocast("cpu", dtype):
        target = teacher(images)
        out = model(images)
        parts = tokenizer_loss(out, images, target)
    assert inside[0] is images  # [-1, 1] as they are
    assert inside[1].dtype == dtype
    features, codebook, kind = seen[0]
    assert (kind, codebook.dtype) == (torch.float32, torch.float32)
    assert {value.dtype for value in parts} == {torch.float32}
    q = model.quantizer
    again = quantize(features, codebook, q.dims, q.scales, q.weights, q.l2_norm)
    assert torch.equal(again.indices, out.quantizer.indices)
    parts.total.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.quantizer.codebooks)
