"""Losses and metrics against values worked out another way."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenflow_ext.models import TokenizerOutput, WeightsError
from tokenflow_ext.models.losses.tokenizer import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    LPIPS,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
    semantic_loss,
    tokenizer_loss,
)
from tokenflow_ext.models.metrics import cosine, psnr, to_uint8


def test_semantic_loss():
    pred = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]], requires_grad=True)
    target = torch.tensor([[[4.0, 3.0], [-2.0, 0.0]]], requires_grad=True)
    loss = semantic_loss(pred, target)
    assert loss.item() == pytest.approx(((1 - 24 / 25) + 2) / 2)
    loss.backward()
    assert target.grad is None
    assert semantic_loss(pred, target, "l2").item() == pytest.approx((1 + 1 + 9 + 0) / 4)
    assert cosine(pred, target).item() == pytest.approx((24 / 25 - 1) / 2)
    with pytest.raises(ValueError, match="kind must be 'cosine' or 'l2', got 'l1'"):
        semantic_loss(pred, target, "l1")
    with pytest.raises(ValueError, match=r"\(1, 2, 2\) and \(1, 1, 2\)"):
        semantic_loss(pred, target[:, :1])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# By their definitions, in probabilities; LlamaGen's halves come from taming-transformers.
D_LOSSES = {
    "hinge": lambda r, f: 0.5 * (np.maximum(0, 1 - r).mean() + np.maximum(0, 1 + f).mean()),
    "vanilla": lambda r, f: -0.5 * (np.log(sigmoid(r)).mean() + np.log(1 - sigmoid(f)).mean()),
}
D_LOSSES["non-saturating"] = D_LOSSES["vanilla"]
G_LOSSES = {
    "hinge": lambda f: -f.mean(),
    "non-saturating": lambda f: -np.log(sigmoid(f)).mean(),
}


def test_adversarial_losses():
    generator = np.random.default_rng(0)
    real, fake = generator.normal(0, 2, (4, 1, 3, 3)), generator.normal(0, 2, (4, 1, 3, 3))
    assert D_LOSSES.keys() == DISCRIMINATOR_LOSSES.keys()
    for kind, expected in D_LOSSES.items():
        got = discriminator_loss(torch.from_numpy(real), torch.from_numpy(fake), kind)
        assert got.item() == pytest.approx(expected(real, fake), rel=1e-6), kind
    assert G_LOSSES.keys() == GENERATOR_LOSSES.keys()
    for kind, expected in G_LOSSES.items():
        got = generator_loss(torch.from_numpy(fake), kind)
        assert got.item() == pytest.approx(expected(fake), rel=1e-6), kind
    with pytest.raises(ValueError, match="hinge, vanilla, non-saturating, got 'wasserstein'"):
        discriminator_loss(torch.zeros(1), torch.zeros(1), "wasserstein")
    with pytest.raises(ValueError, match="hinge, non-saturating, got 'vanilla'"):
        generator_loss(torch.zeros(1), "vanilla")


@pytest.mark.parametrize("kind", D_LOSSES)
def test_far_logits_have_finite_losses(kind):
    """A probability rounds to 0 or 1 there; its logarithm is taken before that."""
    far = torch.tensor([-200.0, 200.0], requires_grad=True)
    loss = discriminator_loss(far, -far, kind)
    loss.backward()
    assert loss.item() == pytest.approx(100.5 if kind == "hinge" else 100.0)
    assert torch.isfinite(far.grad).all()
    assert generator_loss(torch.tensor([-200.0]), "non-saturating").item() == 200.0


def test_adaptive_weight_is_the_ratio_of_gradients():
    layer = torch.tensor([1.0, 2.0], requires_grad=True)
    first, second = (layer * torch.tensor([3.0, 4.0])).sum(), (layer * 2.0).sum()
    weight = adaptive_weight(first, second, layer)
    assert not weight.requires_grad
    assert weight.item() == pytest.approx(5 / (math.sqrt(8) + 1e-4))
    assert adaptive_weight(first, 0.0 * second, layer, maximum=7.0).item() == 7.0
    (first + weight * second).backward()  # both graphs are still there
    assert layer.grad is not None


class Quantized:
    vq_loss = torch.tensor(0.25)
    commitment_loss = torch.tensor(0.5)


def test_total_is_the_weighted_sum():
    torch.manual_seed(0)
    last = torch.nn.Parameter(torch.rand(3, 1, 1))
    images = torch.rand(2, 3, 8, 8)
    output = TokenizerOutput(last * torch.rand(2, 3, 8, 8), torch.randn(2, 4, 5), Quantized())
    teacher = torch.randn(2, 4, 5)
    logits = output.images.sum(1, keepdim=True)

    def perceptual(a, b):
        return (a - b).abs().mean()

    l2 = ((output.images - images) ** 2).mean()
    near = (output.images - images).abs().mean()
    sem = semantic_loss(output.semantic, teacher)
    parts = tokenizer_loss(output, images, teacher, perceptual=perceptual, fake_logits=logits)
    expected = sem + 0.75 + l2 + near - 0.5 * logits.mean()
    torch.testing.assert_close(parts.total, expected)
    torch.testing.assert_close(parts.vq, torch.tensor(0.75))

    ratio = adaptive_weight(l2 + near, -logits.mean(), last)
    scaled = tokenizer_loss(
        output, images, teacher, perceptual=perceptual, fake_logits=logits, adaptive_layer=last
    )
    torch.testing.assert_close(scaled.total, expected + (0.5 - 0.5 * ratio) * logits.mean())

    other = tokenizer_loss(
        output, images, vq_weight=0.0, fake_logits=logits, generator_kind="non-saturating"
    )
    softplus = (1 + (-logits).exp()).log().mean()
    torch.testing.assert_close(other.total, l2 + 0.5 * softplus)
    torch.testing.assert_close(other.generator, softplus)

    bare = tokenizer_loss(output, images, vq_weight=0.0)
    torch.testing.assert_close(bare.total, l2)
    assert bare.semantic.item() == bare.vq.item() == bare.lpips.item() == bare.generator.item() == 0
    torch.testing.assert_close(reconstruction_loss(output.images, images), l2)


def test_without_decoded_images_there_is_no_pixel_part():
    output = TokenizerOutput(None, torch.randn(2, 4, 5), Quantized())
    teacher = torch.randn(2, 4, 5)
    parts = tokenizer_loss(output, torch.rand(2, 3, 8, 8), teacher, perceptual=reconstruction_loss)
    assert parts.l2.item() == parts.lpips.item() == 0
    torch.testing.assert_close(parts.total, semantic_loss(output.semantic, teacher) + 0.75)


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    from torchvision.models import vgg16

    with torch.device("meta"):
        shapes = {k: v.shape for k, v in vgg16(weights=None).features.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {
        f"features.{k}": torch.randn(s, generator=generator) * (2 / s[1:].numel()) ** 0.5
        if len(s) > 1
        else torch.randn(s, generator=generator) * 0.1
        for k, s in shapes.items()
    }
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path)
    return path


def test_lpips_with_the_users_vgg(vgg_file):
    """Against LPIPS written out: five feature maps, unit channels, linear heads."""
    lpips = pytest.importorskip("lpips")
    state = torch.load(vgg_file, weights_only=True)
    heads = torch.load(
        Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth",
        map_location="cpu",
        weights_only=True,
    )
    mean = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    deviation = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)

    def maps(images):
        x, out = (images - mean) / deviation, []
        for stage in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
            if out:
                x = torch.nn.functional.max_pool2d(x, 2)
            for i in stage:
                w, b = state[f"features.{i}.weight"], state[f"features.{i}.bias"]
                x = torch.nn.functional.conv2d(x, w, b, padding=1).relu()
            out.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return out

    torch.manual_seed(0)
    a = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    b = torch.rand(2, 3, 32, 32) * 2 - 1
    loss = LPIPS(vgg_file).train()(a, b)
    expected = torch.zeros(())
    for i, (x, y) in enumerate(zip(maps(a), maps(b), strict=True)):
        distance = (x - y).square() * heads[f"lin{i}.model.1.weight"]
        expected = expected + distance.sum(1).mean()
    assert loss.dim() == 0
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert a.grad.abs().sum() > 0


def test_lpips_asks_for_its_file(tmp_path):
    with pytest.raises(WeightsError, match=r"LPIPS needs torchvision's VGG16.*give the file's"):
        LPIPS(None)
    missing = tmp_path / "vgg16.pth"
    with pytest.raises(WeightsError, match=f"LPIPS: no file at {missing}: put there"):
        LPIPS(missing)
    torch.save({"features.0.weight": torch.zeros(1)}, missing)
    with pytest.raises(WeightsError, match=r"is not torchvision's VGG16.*features\.0\.weight"):
        LPIPS(missing)


def test_psnr_is_skimages():
    metrics = pytest.importorskip("skimage.metrics")
    generator = np.random.default_rng(0)
    a = generator.uniform(-1, 1, (3, 3, 16, 16)).astype(np.float32)
    b = np.clip(a + generator.normal(0, 0.1, a.shape), -1, 1).astype(np.float32)
    expected = [
        metrics.peak_signal_noise_ratio(x, y, data_range=2.0) for x, y in zip(a, b, strict=True)
    ]
    got = psnr(torch.from_numpy(a), torch.from_numpy(b), reduction="none")
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)
    mean = psnr(torch.from_numpy(a), torch.from_numpy(b))
    assert mean.item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_psnr_ends():
    ones = torch.ones(1, 3, 4, 4)
    assert psnr(ones, -ones).item() == pytest.approx(0.0)
    assert psnr(ones, 3 * ones).item() == math.inf  # clamped to [-1, 1]
    with pytest.raises(ValueError, match="one shape"):
        psnr(ones, ones[:, :1])
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'none', got 'sum'"):
        psnr(ones, ones, reduction="sum")


def test_eight_bits():
    values = torch.tensor([-2.0, -1.0, -0.004, 0.0, 0.5, 0.999, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 127, 128, 191, 255, 255, 255]
