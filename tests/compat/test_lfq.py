"""LFQ and ResidualLFQ against vector-quantize-pytorch's."""

from __future__ import annotations

import pytest
import torch
from compat.helpers import copies, largest_tensor
from compat.pairs import pair, same_seed
from torch import Tensor, nn

from tokenflow_ext import compat

OPTIONS: list[tuple[dict, tuple[int, ...]]] = [
    ({"dim": 6}, (2, 30, 6)),
    ({"codebook_size": 64, "dim": 9}, (2, 30, 9)),
    ({"codebook_size": 16, "dim": 9, "projection_has_bias": False}, (2, 9, 5, 4)),
    ({"dim": 6, "commitment_loss_weight": 0.25, "diversity_gamma": 0.5}, (2, 6, 5, 4)),
    ({"codebook_size": 8, "num_codebooks": 3}, (2, 15, 9)),
    ({"codebook_size": 8, "num_codebooks": 3}, (1, 9, 2, 3, 4)),
    ({"dim": 5, "keep_num_codebooks_dim": True}, (2, 15, 5)),
    ({"dim": 5, "channel_first": True}, (2, 5, 15)),
    ({"dim": 5, "channel_first": False}, (2, 12, 5)),
    ({"dim": 5, "channel_first": True}, (9, 5)),
    ({"dim": 5, "force_quantization_f32": False, "commitment_loss_weight": 1.0}, (2, 12, 5)),
    ({"dim": 5, "spherical": True, "commitment_loss_weight": 1.0}, (2, 15, 5)),
    ({"dim": 5, "codebook_scale": 0.5, "soft_clamp_input_value": 2.0}, (2, 15, 5)),
    ({"dim": 5, "spherical": True, "codebook_scale": 0.5}, (2, 15, 5)),
    ({"dim": 5, "straight_through_activation": nn.Tanh()}, (2, 15, 5)),
    ({"dim": 5, "frac_per_sample_entropy": 0.4}, (2, 15, 5)),
    ({"dim": 5, "experimental_softplus_entropy_loss": True}, (2, 15, 5)),
    ({"codebook_size": 32, "dim": 7, "cosine_sim_project_in": True}, (2, 15, 7)),
    (
        {
            "codebook_size": 32,
            "dim": 7,
            "cosine_sim_project_in": True,
            "cosine_sim_project_in_scale": 3.0,
        },
        (2, 15, 7),
    ),
    ({"dim": 5, "orthogonal_rotation": True}, (2, 15, 5)),
    ({"dim": 5, "has_projections": True}, (2, 15, 5)),
]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LFQ", {"dim": 7, "codebook_size": 16, "orthogonal_rotation": True}),
        ("LFQ", {"dim": 7, "codebook_size": 16, "cosine_sim_project_in": True}),
        ("ResidualLFQ", {"dim": 7, "codebook_size": 16, "num_quantizers": 2}),
    ],
)
def test_a_seed_gives_their_state(name: str, options: dict) -> None:
    same_seed(name, options)


@pytest.mark.parametrize("name", ["LFQ", "ResidualLFQ"])
def test_copies_and_compilation(name: str) -> None:
    options = {"dim": 6, "codebook_size": 16} | ({"num_quantizers": 2} if "R" in name else {})
    module, x = getattr(compat, name)(**options), torch.randn(2, 9, 6)
    for other in copies(module):
        mine, expected = both(other, module, x)
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spherical", [False, True])
def test_losses_in_float64(spherical: bool) -> None:
    options = {"dim": 5, "spherical": spherical, "commitment_loss_weight": 0.5}
    ours, theirs = pair("LFQ", options | {"force_quantization_f32": False})
    x = 0.1 * torch.randn(2, 50, 5, dtype=torch.float64)
    # So soft that no probability is below 1e-5, where the two differ.
    arguments = {"inv_temperature": 1.0, "return_loss_breakdown": True}
    mine, others = both(ours.double(), theirs.double(), x, **arguments)
    assert mine[0][2].dtype == torch.float64
    torch.testing.assert_close(mine, others, rtol=1e-9, atol=1e-9)


def test_memory() -> None:
    """No matrix of rows and codes, there or back: at most 2^(D / 2) numbers a row."""
    module, x = compat.LFQ(dim=16), torch.randn(2, 64, 16, requires_grad=True)
    with largest_tensor() as largest:
        module(x).entropy_aux_loss.backward()
    assert largest.numel <= max(128 << 8, 1 << 16)


def test_channels_last_with_more_dimensions() -> None:
    """Theirs fails at that; a row's codebooks are not mixed up with its place."""
    options = {"codebook_size": 8, "num_codebooks": 2, "channel_first": False}
    module, x = compat.LFQ(**options), torch.randn(2, 3, 4, 6)
    image, rows = module(x), module(x.flatten(1, 2))
    assert torch.equal(image.indices.flatten(1, 2), rows.indices)
    assert torch.equal(image.quantized.flatten(1, 2), rows.quantized)
    torch.testing.assert_close(image.entropy_aux_loss, rows.entropy_aux_loss)


def both(ours, theirs, x: Tensor, **arguments) -> list[tuple]:
    """What each returns, and the gradients of its output and losses."""
    found = []
    for module in (ours, theirs):
        torch.manual_seed(7)
        inputs = x.detach().clone().requires_grad_()
        out = module(inputs, **arguments)
        parts = ()
        if arguments.get("return_loss_breakdown"):
            out, parts = out
        leaves = [inputs, *module.parameters()]
        seed = torch.linspace(-1, 1, out[0].numel()).view(out[0].shape).to(out[0])
        total = (out[0] * seed).sum() + out[2].sum()
        grads = (None,) * len(leaves)
        if total.requires_grad:  # not in evaluation without projections
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
        found.append((tuple(out), tuple(parts), grads))
    return found


def check(mine: tuple, others: tuple) -> None:
    assert mine[0][1].dtype == others[0][1].dtype or mine[0][1].dtype == torch.int64
    assert torch.equal(mine[0][1].long(), others[0][1].long())
    torch.testing.assert_close(mine[0][0], others[0][0])
    # Theirs rounds sums over all codes.
    torch.testing.assert_close(mine[0][2], others[0][2], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(mine[1], others[1], rtol=1e-4, atol=2e-4)
    for a, b in zip(mine[2], others[2], strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if a is None else a, zero if b is None else b, rtol=2e-3, atol=2e-4
        )


@pytest.mark.parametrize(("options", "shape"), OPTIONS)
@pytest.mark.parametrize("training", [False, True])
def test_lfq(options: dict, shape: tuple, training: bool) -> None:
    ours, theirs = pair("LFQ", options)
    for module in (ours, theirs):
        module.train(training)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mine, others = both(ours, theirs, x, return_loss_breakdown=True)
    check(mine, others)
    indices = mine[0][1]
    codes = ours.indices_to_codes(indices), theirs.indices_to_codes(others[0][1])
    torch.testing.assert_close(*codes)
    codes = ours.indices_to_codes(indices, False), theirs.indices_to_codes(others[0][1], False)
    torch.testing.assert_close(*codes)


@pytest.mark.parametrize("inv_temperature", [1.0, 10.0])
def test_soft_choices_and_masks(inv_temperature: float) -> None:
    """Where many codes are likely, the entropies are those of theirs over all codes. Of masked rows
    theirs takes each row's own choice for the mean one, so that its entropies cancel: ours are
    those of the rows that count."""
    options = {"codebook_size": 16, "num_codebooks": 2, "commitment_loss_weight": 0.5}
    ours, theirs = pair("LFQ", options)
    x = 0.2 * torch.randn(3, 11, 8)
    arguments = {"inv_temperature": inv_temperature, "return_loss_breakdown": True}
    check(*both(ours, theirs, x, **arguments))
    mask = torch.rand(3, 11) < 0.6
    (*_, loss), breakdown = ours(x, mask=mask, **arguments)
    (*_, expected), parts = theirs(x[mask].unsqueeze(0), **arguments)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(tuple(breakdown), tuple(parts), rtol=1e-4, atol=2e-4)


def test_a_row_that_chooses_hardly_any_code() -> None:
    """Theirs counts a probability below 1e-5 as if its logarithm were log 1e-5; ours is exact."""
    ours, theirs = pair("LFQ", {"dim": 18})
    x = torch.zeros(1, 1, 18)
    _, mine = ours(x, return_loss_breakdown=True)
    _, others = theirs(x, return_loss_breakdown=True)
    exact = 18 * torch.tensor(2.0).log()
    torch.testing.assert_close(mine.per_sample_entropy, exact)
    torch.testing.assert_close(others.per_sample_entropy, -torch.tensor(1e-5).log())
    torch.testing.assert_close(mine.batch_entropy, others.batch_entropy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    ours, theirs = pair("LFQ", {"dim": 6, "spherical": True})
    x = torch.randn(2, 9, 6).to(dtype)
    mine, others = ours(x), theirs(x)
    assert mine.quantized.dtype == others.quantized.dtype == dtype
    assert torch.equal(mine.indices, others.indices)
    torch.testing.assert_close(mine.quantized, others.quantized)


def test_attributes() -> None:
    ours, theirs = pair("LFQ", {"codebook_size": 32, "dim": 7, "codebook_scale": 0.5})
    for name in (
        "dim",
        "codebook_dim",
        "num_codebooks",
        "codebook_size",
        "has_projections",
        "keep_num_codebooks_dim",
        "channel_first",
        "dtype",
        "codebook_scale",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    torch.testing.assert_close(ours.codebook, theirs.codebook)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(ours.mask, theirs.mask)


RESIDUAL: list[dict] = [
    {"dim": 5, "num_quantizers": 3, "codebook_size": 32},
    {"dim": 7, "num_quantizers": 2, "codebook_size": 16, "commitment_loss_weight": 0.25},
    {"dim": 5, "num_quantizers": 3, "codebook_size": 32, "spherical": True},
    {"dim": 5, "num_quantizers": 2, "codebook_size": 32, "soft_clamp_input_value": 3.0},
    {"dim": 5, "num_quantizers": 2, "codebook_size": 32, "orthogonal_rotation": True},
    {"dim": 5, "num_quantizers": 2, "codebook_size": 32, "keep_num_codebooks_dim": True},
    {"dim": 5, "num_quantizers": 3, "codebook_size": 32, "straight_through_activation": nn.Tanh()},
    {"dim": 5, "num_quantizers": 2, "codebook_size": 32, "force_quantization_f32": False},
]


@pytest.mark.parametrize("options", RESIDUAL)
@pytest.mark.parametrize("training", [False, True])
def test_residual(options: dict, training: bool) -> None:
    ours, theirs = pair("ResidualLFQ", options)
    for module in (ours, theirs):
        module.train(training)
    x = torch.randn(2, 13, options["dim"], generator=torch.Generator().manual_seed(3))
    mine, others = both(ours, theirs, x, return_all_codes=True)
    check(mine, others)
    torch.testing.assert_close(mine[0][3], others[0][3])
    torch.testing.assert_close(
        ours.get_output_from_indices(mine[0][1]), theirs.get_output_from_indices(others[0][1])
    )
    torch.testing.assert_close(ours.codebooks, theirs.codebooks)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("options", "shape"), [({}, (2, 4, 3, 5)), ({"channel_first": True}, (2, 4, 7))]
)
@pytest.mark.parametrize("spherical", [False, True])
def test_residual_of_images(options: dict, shape: tuple, training: bool, spherical: bool) -> None:
    options = {"dim": 4, "codebook_size": 16, "num_quantizers": 3, **options}
    ours, theirs = pair("ResidualLFQ", options | {"spherical": spherical})
    for module in (ours, theirs):
        module.train(training)
    check(*both(ours, theirs, torch.randn(shape)))


@pytest.mark.parametrize("spherical", [False, True])
def test_dropped_layers_of_images(spherical: bool) -> None:
    """Theirs fails at that; ours are those of the same rows."""
    options = {"dim": 4, "codebook_size": 16, "num_quantizers": 4, "quantize_dropout": True}
    module, x = compat.ResidualLFQ(**options, spherical=spherical), torch.randn(2, 4, 3, 5)
    image = module(x, rand_quantize_dropout_fixed_seed=1)
    rows = module(x.flatten(2).mT, rand_quantize_dropout_fixed_seed=1)
    assert (image[1][..., 2:] == -1).all()
    assert torch.equal(image[1].flatten(1, 2), rows[1])
    assert torch.equal(image[0].flatten(2).mT, rows[0])
    torch.testing.assert_close(image[2], rows[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_residual_in_other_precisions(dtype: torch.dtype, training: bool) -> None:
    ours, theirs = pair("ResidualLFQ", {"dim": 4, "codebook_size": 16, "num_quantizers": 3})
    x = torch.randn(2, 9, 4).to(dtype)
    mine, others = ours.train(training)(x), theirs.train(training)(x)
    assert mine[0].dtype == others[0].dtype == dtype
    assert torch.equal(mine[1], others[1])
    torch.testing.assert_close(mine[0], others[0])


@pytest.mark.parametrize("seed", range(4))
def test_dropped_layers(seed: int) -> None:
    options = {
        "dim": 5,
        "num_quantizers": 4,
        "codebook_size": 32,
        "quantize_dropout": True,
        "quantize_dropout_multiple_of": 2,
    }
    ours, theirs = pair("ResidualLFQ", options)
    x = torch.randn(2, 13, 5)
    check(*both(ours, theirs, x, rand_quantize_dropout_fixed_seed=seed))


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("LFQ", {}, ValueError, "dim or codebook_size must be given"),
        ("LFQ", {"codebook_size": 48}, ValueError, "codebook_size must be a power of 2 from 2"),
        ("LFQ", {"dim": 30}, NotImplementedError, r"codebook_size=2\*\*30"),
        ("LFQ", {"dim": 4, "frac_per_sample_entropy": 0}, ValueError, "frac_per_sample_entropy"),
        ("LFQ", {"dim": 4, "soft_clamp_input_value": 0.5}, ValueError, "soft_clamp_input_value"),
        (
            "LFQ",
            {"dim": 4, "codebook_size": 8, "has_projections": False},
            ValueError,
            "projections",
        ),
        ("LFQ", {"dim": 4, "entropy": 1}, TypeError, "entropy"),
        (
            "ResidualLFQ",
            {"dim": 4, "num_quantizers": 0, "codebook_size": 16},
            ValueError,
            "num_quantizers must be at least 1",
        ),
        (
            "ResidualLFQ",
            {"dim": 4, "num_quantizers": 1, "codebook_size": 16, "num_codebooks": 2},
            ValueError,
            "layers of ResidualLFQ have",
        ),
    ],
)
def test_bad_options(name: str, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(compat, name)(**options)


def test_bad_inputs() -> None:
    with pytest.raises(
        ValueError, match="x must be floating-point with at least 3 dimensions and 5"
    ):
        compat.LFQ(dim=5)(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="and 5 channels in dimension -1"):
        compat.ResidualLFQ(dim=5, num_quantizers=1, codebook_size=32)(torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"x must have shape \[B, N, 5\]"):
        compat.ResidualLFQ(dim=5, num_quantizers=1, codebook_size=16)(torch.randn(2, 5))
    message = "LFQ does not support force_quantization_f32=False for torch.bfloat16"
    with pytest.raises(NotImplementedError, match=message):
        compat.LFQ(dim=5, force_quantization_f32=False)(torch.randn(2, 3, 5).bfloat16())
