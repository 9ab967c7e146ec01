"""The module of signs and levels, and the entropies of signs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tokenflow_ext.codes import Entropy, Levels, Signs
from tokenflow_ext.scalar_quantizer import ScalarQuantizer
from tokenflow_ext.sign_entropy import sign_entropies


@pytest.mark.parametrize(
    "code", [Signs(4), Signs(4, spherical=True, little_endian=False), Levels((5, 4, 3, 7))]
)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_module(code: Signs | Levels, depth: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    quantizer = ScalarQuantizer(code, 2, (1, 3, 5), depth=depth, upsampling="bilinear")
    h = torch.randn(3, 8, 5, 5).to(dtype).requires_grad_()
    out = quantizer(h)
    assert out.quantized.dtype == dtype
    assert out.indices.shape == (3, 2, depth * 35)
    assert torch.equal(quantizer.encode(h), out.indices)
    exact = {torch.bfloat16: 3e-2}.get(dtype, 1e-5)
    decoded = quantizer.decode(out.indices)
    torch.testing.assert_close(decoded, out.quantized.detach().float(), rtol=exact, atol=exact)
    codes = quantizer.codes(out.indices)
    assert torch.equal(quantizer.nearest(codes), out.indices)
    out.quantized.sum().backward()
    assert h.grad is not None
    assert h.grad.isfinite().all()
    upto = torch.stack(quantizer.maps(codes, (5, 5))[: 2 * depth]).sum(0)
    torch.testing.assert_close(quantizer.decode(out.indices, upto=2), upto)
    inputs = quantizer.next_scale_inputs(out.indices)
    assert inputs.shape == (3, 34, 8)
    torch.testing.assert_close(inputs[:, -25:], upto.flatten(2).mT)
    assert int(quantizer.usage_window().hits.sum()) == out.indices.numel()
    assert int(quantizer.usage_window().hits.sum()) == 0


def test_spherical_gradient_and_losses() -> None:
    """One scale: against BSQ written out."""
    torch.manual_seed(1)
    quantizer = ScalarQuantizer(Signs(6, spherical=True), scales=(4,), beta=0.5, entropy=Entropy(2))
    h = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    x = h.detach().clone().requires_grad_()
    z = F.normalize(x, dim=1)
    q = torch.where(z > 0, 6**-0.5, -(6**-0.5)).to(z.dtype)
    expected = z + (q - z).detach()
    bits = torch.arange(64).unsqueeze(1) >> torch.arange(6) & 1
    codes = 6**-0.5 * (2 * bits - 1).double()
    p = F.softmax(2 * z.permute(0, 2, 3, 1).reshape(-1, 6) @ codes.T / 0.01, dim=1)
    entropy = torch.special.entr(p).sum(1).mean() + (p.mean(0) * (p.mean(0) + 1e-5).log()).sum()
    commitment = 0.5 * (z - q.detach()).square().mean()
    out = quantizer(h)
    torch.testing.assert_close(out.quantized, expected)
    torch.testing.assert_close(out.commitment_loss, commitment)
    torch.testing.assert_close(out.entropy_loss, 2 * entropy)
    seed = torch.randn_like(x)
    wanted = torch.autograd.grad((expected * seed).sum() + commitment + 2 * entropy, x)
    got = torch.autograd.grad(
        (out.quantized * seed).sum() + out.commitment_loss + out.entropy_loss, h
    )
    torch.testing.assert_close(got, wanted)
    assert quantizer.eval()(h).entropy_loss == 0


def test_level_gradient() -> None:
    """One scale and two rounds: against residual FSQ written out."""
    torch.manual_seed(2)
    quantizer = ScalarQuantizer(Levels((5, 4), "symmetric"), scales=(3,), depth=2, beta=0)
    h = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    x = h.detach().clone().requires_grad_()
    counts = torch.tensor([5.0, 4.0], dtype=torch.float64).view(1, 2, 1, 1)
    residual, total = x, 0
    for number in range(2):
        finer = counts**-number
        bounded = (residual / finer).tanh()
        rounded = 2 / (counts - 1) * ((counts - 1) * (bounded + 1) / 2 + 0.5).floor() - 1
        code = (bounded + (rounded - bounded).detach()) * finer
        residual, total = residual - code.detach(), total + code
    out = quantizer(h)
    torch.testing.assert_close(out.quantized, total)
    seed = torch.randn_like(x)
    torch.testing.assert_close(
        torch.autograd.grad(out.quantized, h, seed), torch.autograd.grad(total, x, seed)
    )


def test_flips() -> None:
    quantizer = ScalarQuantizer(Signs(8), scales=(1, 2, 4), flips=0.5)
    h = torch.randn(4, 8, 4, 4)
    assert not torch.equal(quantizer(h).indices, quantizer(h).indices)
    out = quantizer(h)  # what is flipped is what is decoded
    torch.testing.assert_close(quantizer.decode(out.indices), out.quantized)
    quantizer.eval()
    assert torch.equal(quantizer(h).indices, quantizer(h).indices)


@pytest.mark.parametrize("factorized", [False, True])
def test_compiled(factorized: bool) -> None:
    """Without graph breaks, forward and backward."""
    torch._dynamo.reset()
    entropy = Entropy(0.1, factorized=factorized)
    quantizer = ScalarQuantizer(Signs(8, spherical=True), scales=(1, 2, 4), entropy=entropy)
    h = torch.randn(2, 8, 4, 4, requires_grad=True)
    quantizer.tables(h)
    compiled = torch.compile(lambda h: tuple(quantizer(h)[:4]), backend="aot_eager", fullgraph=True)
    expected, got = tuple(quantizer(h)[:4]), compiled(h)
    torch.testing.assert_close(got, expected)
    gradients = [
        torch.autograd.grad(out[0].square().sum() + out[2] + out[3], h) for out in (got, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_exported() -> None:
    quantizer = ScalarQuantizer(Levels((5, 4)), scales=(1, 2)).eval()
    h = torch.randn(2, 2, 4, 4)
    quantizer.tables(h)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(quantizer, (h,), dynamic_shapes={"h": {0: batch}})
    h = torch.randn(5, 2, 4, 4)
    assert torch.equal(program.module()(h).indices, quantizer(h).indices)


def test_as_many_threads_as_there_are() -> None:
    """The same bits with one thread and with several, from any split of the maps."""
    quantizer = ScalarQuantizer(
        Signs(7, spherical=True), 2, (1, 3, 8), entropy=Entropy(1, factorized=True)
    )
    h = torch.randn(5, 14, 8, 8, requires_grad=True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = quantizer(h)
            total = out.quantized.sum() + out.commitment_loss + out.entropy_loss
            found.append((*out[:4], *torch.autograd.grad(total, h)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"code": Levels((3, 3)), "entropy": Entropy(1)}, "only Signs have an entropy"),
        ({"code": Levels((3, 3)), "flips": 0.1}, "only Signs have an entropy and flips"),
        ({"code": Signs(3), "flips": 1.5}, r"flips must be in \[0, 1\], got 1.5"),
        ({"code": Signs(3), "groups": 0}, "groups must be at least 1"),
        ({"code": Signs(3), "depth": 0}, "depth must be at least 1"),
        ({"code": Signs(3), "scales": ()}, "scales must hold"),
        ({"code": Signs(3), "upsampling": "nearest"}, "upsampling must be"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScalarQuantizer(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Signs(64), "dim of Signs must be 1 to 63"),
        (lambda: Levels((1, 3)), "levels must hold one or more numbers from 2"),
        (lambda: Levels(()), "levels must hold one or more numbers"),
        (lambda: Levels((3,), "sigmoid"), "bound must be one of tanh, symmetric, clamp"),
        (lambda: Levels((32768,) * 5), r"at most 2\^63 codes"),
        (lambda: Entropy(1, temperature=0), "temperature must be positive"),
    ],
)
def test_bad_codes(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_tokens_and_features() -> None:
    quantizer = ScalarQuantizer(Levels((3, 3)), scales=(2,))
    with pytest.raises(ValueError, match=r"indices must have shape \[B, 1, 4\]"):
        quantizer.decode(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"indices must be in \[0, 9\), got 0 to 9"):
        quantizer.decode(torch.tensor([[[0, 1, 2, 9]]]))
    with pytest.raises(ValueError, match="upto must be 1 to 1"):
        quantizer.decode(torch.zeros(1, 1, 4, dtype=torch.int64), upto=2)
    with pytest.raises(ValueError, match="rounds must be 1 to 1, got 2"):
        quantizer.decode(torch.zeros(1, 1, 4, dtype=torch.int64), rounds=2)
    with pytest.raises(ValueError, match=r"h must have shape \[B, 2, H, W\]"):
        quantizer(torch.zeros(1, 3, 2, 2))
    with pytest.raises(TypeError, match="floating-point"):
        quantizer(torch.zeros(1, 2, 2, 2, dtype=torch.int64))


@pytest.mark.parametrize("dim", [1, 2, 5, 8])
@pytest.mark.parametrize("clamp", [False, True])
def test_entropies(dim: int, clamp: bool) -> None:
    """Against the softmax over all codes, with gradients."""
    torch.manual_seed(dim)
    z = (0.05 * torch.randn(40, dim, dtype=torch.float64)).requires_grad_()
    bits = torch.arange(2**dim).unsqueeze(1) >> torch.arange(dim) & 1
    codes = 0.5 * (2 * bits - 1).double()
    log_p = F.log_softmax(2 * z @ codes.T / 0.01, dim=1)
    sample = -(log_p.exp() * log_p).sum(1).mean()
    mean = log_p.exp().mean(0)
    log = mean.clamp(min=1e-5).log() if clamp else (mean + 1e-5).log()
    codebook = -(mean * log).sum()
    found = sign_entropies(z, value=0.5, clamp=clamp)
    torch.testing.assert_close((found.per_sample, found.codebook), (sample, codebook))
    wanted = torch.autograd.grad(sample - 0.7 * codebook, z, retain_graph=True)
    got = torch.autograd.grad(found.per_sample - 0.7 * found.codebook, z)
    torch.testing.assert_close(got, wanted)
    # The bound of the sum of channels: exact where channels are independent.
    bound = sign_entropies(z, value=0.5, factorized=True)
    assert bound.codebook >= -torch.special.xlogy(mean, mean).sum() - 1e-9
    if dim == 1:
        torch.testing.assert_close(bound.codebook, -torch.special.xlogy(mean, mean).sum())


def test_entropies_of_certain_choices_are_finite() -> None:
    z = torch.tensor([[50.0, -50.0], [0.0, 1e-8]]).requires_grad_()
    found = sign_entropies(z)
    (grad,) = torch.autograd.grad(found.per_sample + found.codebook, z)
    assert grad.isfinite().all()
    bound = sign_entropies(z, factorized=True)
    assert torch.autograd.grad(bound.codebook, z)[0].isfinite().all()
    entropy = Entropy(1.0, factorized=True)
    quantizer = ScalarQuantizer(Signs(2), scales=(1,), entropy=entropy)
    h = torch.tensor([50.0, -50.0]).view(1, 2, 1, 1).requires_grad_()
    (grad,) = torch.autograd.grad(quantizer(h).entropy_loss, h)
    assert grad.abs().max() < 1e-30
    with pytest.raises(ValueError, match=r"2\^25 codes are too many"):
        sign_entropies(torch.zeros(2, 25))
    assert sign_entropies(torch.zeros(2, 25), factorized=True).codebook > 17
