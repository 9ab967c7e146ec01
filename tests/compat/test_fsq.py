"""FSQ and ResidualFSQ against vector-quantize-pytorch's."""

from __future__ import annotations

import pytest
import torch
from compat.helpers import copies
from compat.pairs import pair, same_seed
from torch import Tensor

from tokenflow_ext import compat

OPTIONS: list[tuple[dict, tuple[int, ...]]] = [
    ({"levels": [8, 8, 8, 6, 5]}, (2, 30, 5)),
    ({"levels": [8, 5, 5]}, (2, 3, 6, 7)),
    ({"levels": (3, 4), "dim": 9}, (2, 30, 9)),
    ({"levels": [4, 3], "dim": 6, "projection_has_bias": False}, (1, 6, 2, 3, 4)),
    ({"levels": [7, 4], "num_codebooks": 3}, (2, 11, 6)),
    ({"levels": [7, 4], "num_codebooks": 3}, (2, 6, 4, 5)),
    ({"levels": [5, 5], "keep_num_codebooks_dim": True}, (2, 11, 2)),
    ({"levels": [5, 5], "channel_first": True}, (2, 2, 11)),
    ({"levels": [5, 5], "channel_first": True}, (7, 2)),
    ({"levels": [5, 5], "force_quantization_f32": False}, (2, 11, 2)),
    ({"levels": [5, 5], "allowed_dtypes": (torch.float32,)}, (2, 11, 2)),
    ({"levels": [8, 6]}, (2, 0, 2)),
    ({"levels": [8, 6]}, (1, 331, 2)),
    ({"levels": [5, 5], "return_indices": False}, (2, 11, 2)),
    ({"levels": [2, 5, 4], "preserve_symmetry": True}, (2, 40, 3)),
    ({"levels": [5, 4], "preserve_symmetry": True, "bound_hard_clamp": True}, (2, 40, 2)),
    ({"levels": [5, 4], "preserve_symmetry": True, "noise_dropout": 0.5}, (2, 40, 2)),
    ({"levels": [5, 5, 5], "orthogonal_rotation": True}, (2, 40, 3)),
]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FSQ", {"levels": [4, 4], "dim": 5, "orthogonal_rotation": True}),
        ("ResidualFSQ", {"levels": [4, 4], "dim": 5, "num_quantizers": 2}),
    ],
)
def test_a_seed_gives_their_state(name: str, options: dict) -> None:
    same_seed(name, options)


@pytest.mark.parametrize("name", ["FSQ", "ResidualFSQ"])
def test_copies_and_compilation(name: str) -> None:
    options = {"levels": [5, 4], "dim": 6} | ({"num_quantizers": 2} if "R" in name else {})
    module, x = getattr(compat, name)(**options), torch.randn(2, 9, 6)
    for other in copies(module):
        (mine, grads), (expected, their_grads) = both(other, module, x)
        torch.testing.assert_close(mine, expected)
        torch.testing.assert_close(grads, their_grads)


def test_gradients_far_out_and_of_gradients() -> None:
    ours, theirs = pair("FSQ", {"levels": [8, 5]})
    x = torch.linspace(-12, 12, 2000, dtype=torch.float64).view(1, -1, 2)
    (_, (mine,)), (_, (expected,)) = both(ours.double(), theirs.double(), x)
    torch.testing.assert_close(mine, expected)
    near = x[:, 400:600].clone().requires_grad_()
    seconds = []
    for module in (ours, theirs):
        (grad,) = torch.autograd.grad(module(near)[0].pow(3).sum(), near, create_graph=True)
        seconds.append(torch.autograd.grad(grad.square().sum(), near)[0])
    assert seconds[0].abs().sum() > 0
    # Theirs has its constants in float32.
    torch.testing.assert_close(*seconds, rtol=1e-5, atol=1e-6)


def both(ours, theirs, x: Tensor, **arguments) -> list[tuple]:
    """What each returns, and the gradient of its output to x and its parameters."""
    found = []
    for module in (ours, theirs):
        torch.manual_seed(7)
        inputs = x.detach().clone().requires_grad_()
        out = module(inputs, **arguments)
        leaves = [inputs, *module.parameters()]
        seed = torch.linspace(-1, 1, out[0].numel()).view(out[0].shape).to(out[0])
        grads = torch.autograd.grad((out[0] * seed).sum(), leaves, allow_unused=True)
        found.append((out, grads))
    return found


@pytest.mark.parametrize(("options", "shape"), OPTIONS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fsq(options: dict, shape: tuple, training: bool, dtype: torch.dtype) -> None:
    ours, theirs = pair("FSQ", options)
    for module in (ours, theirs):
        module.train(training).to(dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (mine, my_grads), (others, their_grads) = both(ours, theirs, x)
    if options.get("return_indices", True):
        assert mine[1].dtype == others[1].dtype
        assert torch.equal(mine[1], others[1])
    else:
        assert mine[1] is others[1] is None
    torch.testing.assert_close(mine[0], others[0])
    # Theirs has 2 / (levels - 1) in float32, so that in float64 its largest value is beyond the
    # clamp that follows noise, which stops the gradient.
    if not (dtype == torch.float64 and options.get("noise_dropout")):
        torch.testing.assert_close(my_grads, their_grads, rtol=1e-4, atol=1e-5)
    if mine[1] is not None:
        codes = ours.float().indices_to_codes(mine[1])
        torch.testing.assert_close(codes, theirs.float().indices_to_codes(others[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    ours, theirs = pair("FSQ", {"levels": [8, 5, 5]})
    x = torch.randn(2, 50, 3).to(dtype)
    mine, others = ours(x), theirs(x)
    assert mine[0].dtype == dtype
    assert torch.equal(mine[0], others[0])
    assert torch.equal(mine[1], others[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(x)[1], mine[1])


def test_attributes_and_conversions() -> None:
    ours, theirs = pair("FSQ", {"levels": [4, 3, 5], "dim": 7, "num_codebooks": 2})
    for name in (
        "dim",
        "codebook_dim",
        "num_codebooks",
        "effective_codebook_dim",
        "codebook_size",
        "keep_num_codebooks_dim",
        "has_projections",
        "channel_first",
        "scale",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    torch.testing.assert_close(ours.implicit_codebook, theirs.implicit_codebook)
    indices = torch.arange(60)
    levels = ours.indices_to_level_indices(indices)
    assert torch.equal(levels, theirs.indices_to_level_indices(indices).long())
    for symmetric in (False, True):
        ours, theirs = pair("FSQ", {"levels": [4, 3, 5], "preserve_symmetry": symmetric})
        codes = theirs.implicit_codebook
        assert torch.equal(ours.codes_to_indices(codes), theirs.codes_to_indices(codes))
        z = torch.randn(9, 3)
        torch.testing.assert_close(ours.quantize(z), theirs.quantize(z))


def test_numbers_far_out_and_at_zero() -> None:
    ours, theirs = pair("FSQ", {"levels": [8, 5]})
    x = torch.tensor([[[0.0, 0.0], [1e30, -1e30], [torch.inf, -torch.inf], [-0.0, 3.0]]])
    assert torch.equal(ours(x)[1], theirs(x)[1])
    assert int(ours(torch.full((1, 1, 2), torch.nan))[1]) == 0


RESIDUAL: list[tuple[dict, tuple[int, ...]]] = [
    ({"levels": [5, 4, 3], "num_quantizers": 3}, (2, 20, 3)),
    ({"levels": [8, 8], "num_quantizers": 2, "dim": 5}, (2, 20, 5)),
    ({"levels": [5, 5], "num_quantizers": 2, "is_channel_first": True}, (2, 2, 4, 3)),
    ({"levels": [5, 5], "num_quantizers": 4, "bound_hard_clamp": False}, (2, 20, 2)),
    (
        {
            "levels": [5, 5],
            "num_quantizers": 2,
            "bound_hard_clamp": False,
            "soft_clamp_input_value": [2.0, 3.0],
        },
        (2, 20, 2),
    ),
    ({"levels": [5, 5, 5], "num_quantizers": 2, "orthogonal_rotation": True}, (2, 20, 3)),
    ({"levels": [3, 3], "num_quantizers": 3, "noise_dropout": 0.3}, (2, 20, 2)),
    ({"levels": [5, 5], "num_quantizers": 2, "keep_num_codebooks_dim": True}, (2, 20, 2)),
    ({"levels": [5, 5], "num_quantizers": 2, "force_quantization_f32": False}, (2, 20, 2)),
    ({"levels": [8, 8, 8, 6, 5], "num_quantizers": 3}, (1, 331, 5)),
    ({"levels": [5, 5], "num_quantizers": 3}, (2, 0, 2)),
]


@pytest.mark.parametrize(("options", "shape"), RESIDUAL)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residual(options: dict, shape: tuple, training: bool, dtype: torch.dtype) -> None:
    if options.get("noise_dropout"):
        dtype = torch.float32  # theirs clamps values beyond 1 by its factors of float32
    ours, theirs = pair("ResidualFSQ", options)
    for module in (ours, theirs):
        module.train(training).to(dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    whole = x.numel() > 0 and not options.get("is_channel_first")  # theirs fails at that
    (mine, my_grads), (others, their_grads) = both(ours, theirs, x, return_all_codes=whole)
    assert mine[1].dtype == others[1].dtype
    assert torch.equal(mine[1], others[1])
    torch.testing.assert_close(mine[0], others[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(my_grads, their_grads, rtol=1e-4, atol=1e-4)
    if whole:
        torch.testing.assert_close(mine[2], others[2], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            ours.get_output_from_indices(mine[1]),
            theirs.get_output_from_indices(others[1]),
            rtol=1e-5,
            atol=1e-5,
        )
    # In float64 theirs are those of float32.
    torch.testing.assert_close(ours.codebooks, theirs.codebooks, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.scales, theirs.scales)
    assert ours.half().codebooks.dtype == theirs.half().codebooks.dtype == torch.float16


@pytest.mark.parametrize("seed", range(4))
def test_dropped_layers(seed: int) -> None:
    options = {
        "levels": [5, 4],
        "num_quantizers": 4,
        "quantize_dropout": True,
        "quantize_dropout_cutoff_index": 1,
    }
    ours, theirs = pair("ResidualFSQ", options)
    x = torch.randn(2, 20, 2)
    (mine, _), (others, _) = both(ours, theirs, x, rand_quantize_dropout_fixed_seed=seed)
    assert mine[1].dtype == others[1].dtype
    assert torch.equal(mine[1], others[1])
    torch.testing.assert_close(mine[0], others[0])
    codes = ours.get_codes_from_indices(mine[1][..., :2])
    assert (codes[2:] == 0).all()


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("FSQ", {"levels": [2, 5]}, ValueError, "levels of 2 need preserve_symmetry"),
        ("FSQ", {"levels": [1, 5]}, ValueError, "levels must hold"),
        ("FSQ", {"levels": [5], "noise_dropout": 0.1}, ValueError, "noise_dropout=0.1 needs"),
        ("FSQ", {"levels": [5], "bound_hard_clamp": True}, NotImplementedError, "bound_hard_clamp"),
        ("FSQ", {"levels": [1 << 15] * 3}, ValueError, r"fewer than 2\^31 codes"),
        ("FSQ", {"levels": [5], "num_codebooks": 0}, ValueError, "num_codebooks of FSQ"),
        (
            "FSQ",
            {"levels": [5], "num_codebooks": 2, "keep_num_codebooks_dim": False},
            ValueError,
            "keep_num_codebooks_dim=False of FSQ is for one codebook, got 2",
        ),
        ("FSQ", {"levels": [5], "dims": 3}, TypeError, "dims"),
        ("ResidualFSQ", {"levels": [5], "num_quantizers": 0}, ValueError, "num_quantizers"),
        (
            "ResidualFSQ",
            {"levels": [5], "num_quantizers": 1, "num_codebooks": 2},
            ValueError,
            "num_codebooks of ResidualFSQ must be 1, got 2",
        ),
        (
            "ResidualFSQ",
            {"levels": [5], "num_quantizers": 1, "return_indices": False},
            ValueError,
            "return_indices of ResidualFSQ must be True",
        ),
        ("ResidualFSQ", {"levels": [5], "num_quantizers": 1, "dims": 3}, TypeError, "dims"),
        (
            "ResidualFSQ",
            {"levels": [5], "num_quantizers": 1, "soft_clamp_input_value": 2.0},
            ValueError,
            "is set by bound_hard_clamp",
        ),
        (
            "ResidualFSQ",
            {"levels": [5], "num_quantizers": 1, "preserve_symmetry": False},
            TypeError,
            "sets preserve_symmetry of its layers",
        ),
    ],
)
def test_bad_options(name: str, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(compat, name)(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"force_quantization_f32": False},
            "FSQ does not support force_quantization_f32=False for",
        ),
        ({"allowed_dtypes": (torch.float16,)}, "FSQ does not support allowed_dtypes="),
    ],
)
def test_quantization_in_half_precision(options: dict, message: str) -> None:
    x = torch.randn(2, 9, 1)
    for module in (
        compat.FSQ([5], **options),
        compat.ResidualFSQ(levels=[5], num_quantizers=2, **options).half(),
    ):
        with pytest.raises(NotImplementedError, match=message):
            module(x.half())
        assert module.float()(x)[1].shape[:2] == (2, 9)


def test_bad_inputs() -> None:
    with pytest.raises(
        ValueError, match="x must be floating-point with at least 3 dimensions and 2"
    ):
        compat.FSQ([5, 5])(torch.randn(3, 4, 3))
    with pytest.raises(ValueError, match="zhat must have 2 channels"):
        compat.FSQ([5, 5]).codes_to_indices(torch.randn(3, 3))
    with pytest.raises(ValueError, match="x must have 2 channels in dimension -1"):
        compat.ResidualFSQ(levels=[5, 5], num_quantizers=2)(torch.randn(3, 4, 3))
    with pytest.raises(ValueError, match="indices must have 2 in the last dimension"):
        compat.ResidualFSQ(levels=[5, 5], num_quantizers=2).get_codes_from_indices(
            torch.zeros(1, 4, 3, dtype=torch.int64)
        )
