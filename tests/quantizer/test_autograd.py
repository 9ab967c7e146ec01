"""The operators as torch sees them: gradcheck, opcheck, compile, export, autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, nop
from quantizer.strategies import DEVICES
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from tokenflow_ext import MultiScaleQuantizer, QuantizerOutput, ops, reference

OPS = torch.ops.tokenflow_ext
SIZES = [(1, 1), (2, 3), (5, 4)]
FLAT = [1, 1, 2, 3, 5, 4]


@pytest.mark.parametrize("l2_norm", [True, False])
def test_gradcheck_of_the_losses(l2_norm: bool) -> None:
    """With one scale nothing is held back, so finite differences see the losses' gradients."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 6, 5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    codebook = torch.randn(9, 6, dtype=torch.float64, generator=generator, requires_grad=True)

    def run(h: torch.Tensor, codebook: torch.Tensor) -> ops.QuantizeResult:
        return ops.multiscale_quantize(h, codebook, [4, 2], SIZES[2:], [1.0, 0.5], l2_norm)

    assert torch.autograd.gradcheck(lambda h: run(h, codebook).row_error, (h,))
    assert torch.autograd.gradcheck(lambda codebook: run(h, codebook).code_error, (codebook,))


@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize("dropped", [-1, 1])
def test_gradcheck_of_the_whole_loop(l2_norm: bool, dropped: int) -> None:
    """The straight-through gradient is that of a smooth function: the loop with everything under
    sg held at its value. That function is checked by finite differences, and ours against it."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 6, 5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    codebook = torch.randn(9, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    dims = [4, 2]
    ours = ops.multiscale_quantize(
        h, codebook, dims, SIZES, [1.0, 0.5], l2_norm, torch.tensor(dropped)
    )
    index = ours.indices.split([a * b for a, b in SIZES], dim=1)

    def scales(h: torch.Tensor, codebook: torch.Tensor, held: list | None) -> list:
        """For each scale: what sg holds (residual's offset, q - z, q, z), upsampled, errors."""
        out, residual = [], h
        for number, size in enumerate(SIZES):
            if number == dropped:
                out.append(None)
                continue
            source = residual if held is None else h - held[number][0]
            rows = F.interpolate(source, size, mode="area").permute(0, 2, 3, 1).flatten(0, 2)
            z = reference.normalize_groups(rows, dims, l2_norm)
            q = reference.normalize_groups(codebook, dims, l2_norm)[index[number].flatten()]
            now = (h - residual, q - z, q, z)
            sg = now if held is None else held[number]
            grid = (z + sg[1]).view(2, *size, -1).permute(0, 3, 1, 2)
            u = F.interpolate(grid, h.shape[2:], mode="bicubic", align_corners=False)
            residual = residual - u
            out.append((*now, u, (q - sg[3]).square().mean(), (sg[2] - z).square().mean()))
        return out

    held = scales(h.detach(), codebook.detach(), None)

    def frozen(h: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kept = [scale for scale in scales(h, codebook, held) if scale is not None]
        return (
            torch.stack([scale[4] for scale in kept]).sum(0),
            torch.stack([scale[5] for scale in kept]),
            torch.stack([scale[6] for scale in kept]),
        )

    assert torch.autograd.gradcheck(frozen, (h, codebook))
    kept = torch.tensor([number for number in range(len(SIZES)) if number != dropped])
    got = (ours.quantized, ours.code_error[kept], ours.row_error[kept])
    expected = frozen(h, codebook)
    torch.testing.assert_close(got, expected)
    seeds = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in expected]
    torch.testing.assert_close(
        torch.autograd.grad(got, [h, codebook], seeds),
        torch.autograd.grad(expected, [h, codebook], seeds),
    )


def _samples() -> list[tuple]:
    h = torch.randn(2, 6, 5, 4)
    codebook = torch.randn(9, 6)
    indices = torch.randint(0, 9, (2, 27))
    dims = [4, 2]
    grads = (torch.randn_like(h), torch.rand(3), torch.rand(3))
    differentiable = (h.clone().requires_grad_(), codebook.clone().requires_grad_())
    dropped = torch.tensor(2)
    return [
        (OPS.nearest_code, (torch.randn(7, 6), codebook, dims, [1.0, 1.0], True)),
        (OPS.multiscale_quantize, (*differentiable, None, dims, [1.0, 1.0], FLAT, True)),
        (OPS.multiscale_quantize, (*differentiable, dropped, dims, [1.0, 0.0], FLAT, False)),
        (OPS.multiscale_quantize, (h.double(), codebook.double(), None, dims, [], FLAT, True)),
        (OPS.multiscale_quantize, (*differentiable, None, dims, [], FLAT, True, True)),
        (OPS.multiscale_quantize_backward, (h, codebook, indices, *grads, dims, FLAT, True)),
        (OPS.multiscale_quantize_backward, (h, codebook, indices, *grads, dims, FLAT, True, True)),
        (
            OPS.multiscale_quantize_backward,
            (h, codebook, indices, grads[0], None, grads[2], dims, FLAT, False),
        ),
        (OPS.multiscale_rows, (h, codebook, indices, dims, FLAT, True)),
        (OPS.multiscale_decode, (indices, codebook, dims, FLAT, 5, 4, True)),
        (OPS.segment_sum, (torch.randn(7, 3), torch.randint(-1, 4, (7,)), 4)),
        *_samples_of_several_codebooks(),
        *_scalar_samples(),
    ]


def _samples_of_several_codebooks() -> list[tuple]:
    h, codebook = torch.randn(2, 6, 5, 4), torch.randn(2, 9, 3)
    indices = torch.randint(0, 9, (2, 2, 27))
    grads = (torch.randn_like(h), torch.rand(2, 3), torch.rand(2, 3))
    differentiable = (h.clone().requires_grad_(), codebook.clone().requires_grad_())
    return [
        (OPS.nearest_code, (torch.randn(2, 7, 3), codebook, [3], [1.0], False, 2)),
        (OPS.multiscale_quantize, (*differentiable, None, [3], [1.0], FLAT, True, False, 2)),
        (OPS.multiscale_quantize_backward, (h, codebook, indices, *grads, [3], FLAT, True)),
        (OPS.multiscale_rows, (h, codebook, indices, [3], FLAT, True)),
        (OPS.multiscale_decode, (indices, codebook, [3], FLAT, 5, 4, True)),
    ]


def _scalar_samples() -> list[tuple]:
    h = torch.randn(2, 6, 5, 4, requires_grad=True)
    tables = (torch.zeros(2, 1, 6), torch.randn(2, 2, 6))
    curves = torch.rand(2, 4, 6)
    flips = torch.rand(2, 27, 6) < 0.5
    rows = torch.randn(2, 27, 6)
    rounds, slopes = [0, 1, 0], [1.0, 2.0, 3.0]
    wide = [h.detach().double(), *(t.double() for t in tables)]
    grads = [torch.randn_like(h), torch.randn_like(rows), torch.rand(3)]
    choices = [torch.rand(3), torch.rand(3, 6)]
    pyramid = [FLAT, 5, 4, rounds]
    return [
        (
            OPS.scalar_quantize,
            (h, *tables, None, None, FLAT, rounds, False, [1, 2, 4], 0, [], False, True),
        ),
        (
            OPS.scalar_quantize,
            (h, *tables, None, flips, FLAT, rounds, True, [1, 2, 4], 1, slopes, True, True),
        ),
        (
            OPS.scalar_quantize,
            (h.detach(), *tables, curves, None, FLAT, rounds, False, [1], 2, [], True, False),
        ),
        (
            OPS.scalar_quantize,
            (*wide, None, flips, FLAT, [0] * 3, True, [1, 2], 0, slopes, False, False),
        ),
        (
            OPS.scalar_quantize_backward,
            (rows, *tables, None, flips, *grads, *choices, *pyramid, False, 3, 1, slopes),
        ),
        (
            OPS.scalar_quantize_backward,
            (
                rows,
                *tables,
                curves,
                None,
                None,
                None,
                grads[2],
                None,
                None,
                *pyramid,
                True,
                6,
                3,
                [],
            ),
        ),
        (
            OPS.scalar_rows,
            (torch.randn(7, 6, requires_grad=True), *tables, curves, [1, 2, 4, 8, 16, 32], 2, True),
        ),
        (OPS.scalar_rows, (torch.randn(2, 3, 6), *tables, None, [], 0, False)),
        (OPS.scalar_rows_backward, (torch.randn(7, 6), *tables, curves, torch.randn(7, 6), 3)),
        (OPS.pack_digits, (torch.randint(0, 3, (2, 7, 6), dtype=torch.int16), [1, 3, 9])),
    ]


@pytest.mark.parametrize("number", range(26))
def test_opcheck(number: int) -> None:
    op, arguments = _samples()[number]
    torch.library.opcheck(op.default, arguments)


def test_opcheck_covers_every_operator() -> None:
    assert len(_samples()) == 26
    tested = {op._qualified_op_name for op, _ in _samples()}
    tested.add("tokenflow_ext::sample_top_k_top_p")  # tests/sampler
    tested.add("tokenflow_ext::sample_code")  # test_sample_code.py
    registered = {
        schema.name
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("tokenflow_ext::")
    }
    assert tested == registered


class Backwards(TorchDispatchMode):
    """Records the arguments of every multiscale_quantize_backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is OPS.multiscale_quantize_backward.default:
            names = [argument.name for argument in func._schema.arguments]
            self.calls.append(dict(zip(names, args, strict=False)))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(before)


def loss_of(out: QuantizerOutput) -> torch.Tensor:
    return out.quantized.square().mean() + out.vq_loss + out.commitment_loss


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("atomic", [False, True])
def test_atomic_codebook_gradient_reaches_the_backward(
    device: str, atomic: bool, deterministic
) -> None:
    torch.manual_seed(0)
    options = {"codebook_size": 32, "dims": (4, 2), "scales": SIZES, "scale_drop": 0.0}
    quantizer = MultiScaleQuantizer(**options, atomic_codebook_gradient=atomic).to(device)
    plain = MultiScaleQuantizer(**options).to(device)
    plain.load_state_dict(quantizer.state_dict())
    h = torch.randn(2, 6, 5, 4, device=device, requires_grad=True)
    parameters = [h, *quantizer.codebooks]
    expected = torch.autograd.grad(loss_of(plain(h)), [h, *plain.codebooks])
    with Backwards() as backward:
        gradients = torch.autograd.grad(loss_of(quantizer(h)), parameters)
    # An argument at its default is not recorded.
    assert [call.get("atomic_codebook_gradient", False) for call in backward.calls] == [atomic]
    torch.testing.assert_close(gradients, expected)
    if device == "cpu" or not atomic:  # the same sum in the same order
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))

    deterministic(True)
    out = quantizer(h)
    with Backwards() as backward:
        gradients = torch.autograd.grad(loss_of(out), parameters)
    assert [call.get("atomic_codebook_gradient", False) for call in backward.calls] == [False]
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_compiled_atomic_codebook_gradient(deterministic) -> None:
    """The option is in the compiled backward graph; asking for determinism compiles another."""
    torch._dynamo.reset()
    seen: list[bool] = []

    def record(graph: torch.fx.GraphModule, inputs: list):
        for node in graph.graph.nodes:
            if node.target is OPS.multiscale_quantize_backward.default:
                seen.append(len(node.args) > 9 and node.args[9])
        return make_boxed_func(graph.forward)

    quantizer = MultiScaleQuantizer(
        32, (4, 2), SIZES, scale_drop=0.0, atomic_codebook_gradient=True
    )
    h = torch.randn(2, 6, 5, 4, requires_grad=True)
    compiled = torch.compile(
        lambda h: loss_of(quantizer(h)),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=nop, bw_compiler=record),
    )
    for strict in (False, True):
        deterministic(strict)
        gradients = torch.autograd.grad(compiled(h), [h, *quantizer.codebooks])
        expected = torch.autograd.grad(loss_of(quantizer(h)), [h, *quantizer.codebooks])
        torch.testing.assert_close(gradients, expected)
    assert seen == [True, False]


def test_an_unwanted_codebook_gradient_is_not_computed() -> None:
    quantizer = MultiScaleQuantizer(32, (4, 2), SIZES, scale_drop=0.0)
    h = torch.randn(2, 6, 5, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(loss_of(quantizer(h)), h)
    quantizer.codebooks.requires_grad_(False)
    with Backwards() as backward:
        (gradient,) = torch.autograd.grad(loss_of(quantizer(h)), h)
    (call,) = backward.calls
    assert call["grad_code_error"] is None
    assert torch.equal(gradient, expected)
    grad_h, grad_codebook = OPS.multiscale_quantize_backward(*call.values())
    assert torch.equal(grad_h, expected)
    assert not grad_codebook.any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_compile_without_graph_breaks(training: bool, update: str) -> None:
    torch._dynamo.reset()
    quantizer = MultiScaleQuantizer(
        32, (4, 2), SIZES, codebook_update=update, scale_drop=0.5 if training else 0.0
    ).train(training)
    h = torch.randn(2, 6, 5, 4, requires_grad=True)

    def step(h: torch.Tensor):
        out = quantizer(h)
        return out.quantized, out.indices, out.vq_loss + out.commitment_loss, out.usage.perplexity

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    state = {name: value.clone() for name, value in quantizer.state_dict().items()}
    torch.manual_seed(0)
    expected = step(h)
    expected_state = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer.load_state_dict(state)
    torch.manual_seed(0)
    got = compiled(h)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    for name, value in quantizer.state_dict().items():
        torch.testing.assert_close(value, expected_state[name])
    gradient = torch.autograd.grad(got[0].sum() + got[2], h)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected[0].sum() + expected[2], h))


def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    quantizer = MultiScaleQuantizer(32, (4, 2), SIZES).eval()
    h = torch.randn(2, 6, 5, 4)
    compiled = torch.compile(lambda h: quantizer(h * 2).quantized + 1, fullgraph=True)
    torch.testing.assert_close(compiled(h), quantizer(h * 2).quantized + 1)


def test_export() -> None:
    quantizer = MultiScaleQuantizer(32, (4, 2), SIZES).eval()
    h = torch.randn(2, 6, 5, 4)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(quantizer, (h,), dynamic_shapes={"h": {0: batch}})
    h = torch.randn(5, 6, 5, 4)
    exported, eager = program.module()(h), quantizer(h)
    torch.testing.assert_close(exported.quantized, eager.quantized)
    assert torch.equal(exported.indices, eager.indices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    quantizer = MultiScaleQuantizer(200, (4, 2), SIZES, scale_drop=0.0)
    h = torch.randn(2, 6, 5, 4, dtype=dtype, requires_grad=True)
    wide = h.detach().float().requires_grad_()
    half, full = quantizer(h), quantizer(wide)
    assert half.quantized.dtype == dtype
    assert half.vq_loss.dtype == torch.float32
    assert torch.equal(half.indices, full.indices)
    assert torch.equal(half.quantized, full.quantized.to(dtype))
    weight = torch.randn_like(full.quantized)
    (half.quantized * weight.to(dtype)).sum().backward()
    (full.quantized * weight.to(dtype).float()).sum().backward()
    torch.testing.assert_close(h.grad, wide.grad.to(dtype))


def test_autocast() -> None:
    quantizer = MultiScaleQuantizer(200, (4, 2), SIZES, scale_drop=0.0)
    project = torch.nn.Conv2d(3, 6, 1)
    images = torch.randn(2, 3, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        features = project(images)
        out = quantizer(features)
        loss = out.quantized.float().square().mean() + out.vq_loss + out.commitment_loss
    assert features.dtype == torch.bfloat16
    assert out.vq_loss.dtype == torch.float32
    loss.backward()
    assert torch.isfinite(project.weight.grad).all()
    assert project.weight.grad.abs().sum() > 0
    expected = quantizer(features.detach().float())
    assert torch.equal(out.indices, expected.indices)


def test_strided_and_channels_last_inputs() -> None:
    quantizer = MultiScaleQuantizer(200, (4, 2), SIZES).eval()
    h = torch.randn(2, 6, 5, 4)
    expected = quantizer(h)
    for variant in (
        h.to(memory_format=torch.channels_last),
        torch.randn(2, 6, 5, 8)[..., ::2].copy_(h),
        h.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert torch.equal(quantizer(variant).quantized, expected.quantized)


# ---------------------------------------------------------------- higher derivatives and torch.func


def _problem(sizes: list, l2_norm: bool, dropped: int) -> tuple:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 6, 5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    codebook = torch.randn(9, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    seeds = [
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((2, 6, 5, 4), (len(sizes),), (len(sizes),))
    ]

    def ours(h: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = ops.multiscale_quantize(
            h, codebook, [4, 2], sizes, [1.0, 0.5], l2_norm, torch.tensor(dropped)
        )
        return out.quantized, out.code_error, out.row_error

    def eager(h: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = reference.multiscale_quantize(
            h, codebook, [4, 2], sizes, [1.0, 0.5], l2_norm, dropped
        )
        return out.quantized, out.code_error, out.row_error

    return h, codebook, seeds, ours, eager


@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize("dropped", [-1, 1])
def test_second_and_third_derivatives_are_the_eager_loops(l2_norm: bool, dropped: int) -> None:
    h, codebook, seeds, ours, eager = _problem(SIZES, l2_norm, dropped)

    def derivatives(run) -> list[torch.Tensor]:
        inputs, found = [h, codebook, *seeds], []
        grads = torch.autograd.grad(run(h, codebook), [h, codebook], seeds, create_graph=True)
        for order in (2, 3):
            found.extend(grads)
            total = sum((g * torch.linspace(-1, 2, g.numel()).view_as(g)).sum() for g in grads)
            # Without l2_norm the loop is of second degree: its third derivatives are no function
            # of anything.
            if not total.requires_grad:
                break
            grads = torch.autograd.grad(total.square(), inputs, create_graph=order == 2)
        return [*found, *grads]

    got, expected = derivatives(ours), derivatives(eager)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert any(bool(g.any()) for g in got[2:])


@pytest.mark.parametrize("l2_norm", [True, False])
def test_gradgradcheck(l2_norm: bool) -> None:
    """With one scale, and one of the inputs at a time, nothing is held back that the gradient
    depends on."""
    h, codebook, seeds, ours, _ = _problem(SIZES[2:], l2_norm, -1)
    fixed_h, fixed_codebook = h.detach(), codebook.detach()
    of_h = lambda h: ours(h, fixed_codebook)[::2]  # noqa: E731
    of_codebook = lambda codebook: ours(fixed_h, codebook)[1]  # noqa: E731
    assert torch.autograd.gradgradcheck(of_h, (h,), seeds[::2])
    assert torch.autograd.gradgradcheck(of_codebook, (codebook,), seeds[1:2])


def test_gradient_penalty_without_a_codebook_gradient() -> None:
    h, codebook, _, ours, eager = _problem(SIZES, True, -1)
    codebook = codebook.detach()

    def penalty(run) -> torch.Tensor:
        quantized, _, row_error = run(h, codebook)
        total = quantized.square().sum() + row_error.sum()
        (g,) = torch.autograd.grad(total, h, create_graph=True)
        return torch.autograd.grad(g.square().sum(), h)[0]

    torch.testing.assert_close(penalty(ours), penalty(eager))


@pytest.mark.parametrize("l2_norm", [True, False])
def test_torch_func(l2_norm: bool) -> None:
    h, codebook, _, ours, eager = _problem(SIZES, l2_norm, -1)
    h, codebook = h.detach(), codebook.detach()

    def scalar(run):
        return lambda h, codebook: sum(part.square().sum() for part in run(h, codebook))

    f, g = scalar(ours), scalar(eager)
    twice = lambda f: torch.func.grad(  # noqa: E731
        lambda h, c: torch.func.grad(f)(h, c).square().sum()
    )
    for got, expected in (
        (torch.func.grad(f, (0, 1)), torch.func.grad(g, (0, 1))),
        (twice(f), twice(g)),
    ):
        torch.testing.assert_close(got(h, codebook), expected(h, codebook))

    def flat(run):
        return lambda h: torch.cat([part.flatten() for part in run(h, codebook)])

    torch.testing.assert_close(
        torch.func.jacrev(flat(ours))(h[:1]), torch.autograd.functional.jacobian(flat(eager), h[:1])
    )
    # Each sample, and each codebook of a set, by itself.
    of_sample = lambda f: lambda x: f(x.unsqueeze(0), codebook)  # noqa: E731
    codebooks = torch.stack([codebook, codebook.flip(0) * 1.5])
    of_codebook = lambda f: lambda c: f(h, c)  # noqa: E731
    for mapped, alone, inputs in (
        (of_sample(f), of_sample(g), h),
        (torch.func.grad(of_sample(f)), torch.func.grad(of_sample(g)), h),
        (torch.func.grad(of_codebook(f)), torch.func.grad(of_codebook(g)), codebooks),
    ):
        torch.testing.assert_close(
            torch.func.vmap(mapped)(inputs), torch.stack([alone(x) for x in inputs])
        )


@pytest.mark.parametrize("number", range(4))
def test_vmap_of_the_operators_without_gradient(number: int) -> None:
    codebook, indices = torch.randn(9, 6), torch.randint(0, 9, (3, 2, 27))
    rows, h = torch.randn(5, 3, 6), torch.randn(3, 2, 6, 5, 4)
    function, in_dims, inputs = (
        (lambda r: ops.nearest_code(r, codebook, [4, 2]), (1,), (rows,)),
        (lambda i: ops.multiscale_decode(i, codebook, [4, 2], SIZES, (5, 4)), (0,), (indices,)),
        (lambda h, i: ops.multiscale_rows(h, codebook, i, [4, 2], SIZES), (0, 0), (h, indices)),
        (lambda r, i: ops.segment_sum(r, i, 9)[0], (1, 0), (rows, indices[:, 0, :5])),
    )[number]
    mapped = torch.func.vmap(function, in_dims)(*inputs)
    for entry in range(3):
        alone = (x.select(dim, entry) for x, dim in zip(inputs, in_dims, strict=True))
        assert torch.equal(mapped[entry], function(*alone))


def test_forward_mode_is_refused_never_zero() -> None:
    h, codebook, *_ = _problem(SIZES, True, -1)

    def run(h: torch.Tensor) -> torch.Tensor:
        return ops.multiscale_quantize(h, codebook.detach(), [4, 2], SIZES).quantized

    def sums(rows: torch.Tensor) -> torch.Tensor:
        return ops.segment_sum(rows, torch.tensor([0, 1, 0]), 2)[0]

    for function, x in ((run, h.detach()), (sums, torch.randn(3, 2))):
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(function, (x,), (torch.ones_like(x),))
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward"):
            function(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


def test_compiled_forward_mode_is_refused() -> None:
    codebook, h = torch.randn(9, 6), torch.randn(1, 6, 5, 4)

    def derivative(h: torch.Tensor) -> torch.Tensor:
        def run(h: torch.Tensor) -> torch.Tensor:
            return ops.multiscale_quantize(h, codebook, [4, 2], SIZES).quantized

        return torch.func.jvp(run, (h,), (torch.ones_like(h),))[1]

    torch._dynamo.reset()
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.compile(derivative, backend="aot_eager")(h)


def test_gradient_of_segment_sum() -> None:
    rows = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([0, 2, -1, 2, 3, 0, -1])
    assert torch.autograd.gradcheck(lambda r: ops.segment_sum(r, indices, 5)[0], rows)
    assert torch.autograd.gradgradcheck(lambda r: ops.segment_sum(r, indices, 5)[0], rows)


def test_what_is_not_differentiable_has_no_gradient_at_all() -> None:
    h = torch.randn(2, 6, 5, 4, requires_grad=True)
    codebook = torch.randn(9, 6, requires_grad=True)
    indices = torch.randint(0, 9, (2, 27))
    rows = ops.multiscale_rows(h, codebook, indices, [4, 2], SIZES)
    decoded = ops.multiscale_decode(indices, codebook, [4, 2], SIZES, (5, 4))
    assert not rows.requires_grad
    assert not decoded.requires_grad
