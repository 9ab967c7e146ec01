"""`HierarchicalVQ` against vector-quantize-pytorch's own, from the same state."""

from __future__ import annotations

import inspect

import pytest
import torch
from compat.helpers import close, compare, cubes, largest_tensor, second_derivative

from tokenflow_ext.compat import HierarchicalVQ

theirs_module = pytest.importorskip("vector_quantize_pytorch")

DIM = 6
SEQUENCE, IMAGE, VOLUME = (3, DIM, 16), (2, DIM, 6, 6), (2, DIM, 3, 4, 4)

CASES = {
    "sequence": ({"scales": (1, 4, 16)}, SEQUENCE),
    "sequence, channels last": ({"scales": (1, 4, 16), "channel_first": False}, (3, 16, DIM)),
    "image": ({"scales": (1, 2, 4, 6), "accept_image_fmap": True}, IMAGE),
    "image, other sizes": (
        {"scales": (1, (2, 3), (4, 3)), "accept_image_fmap": True},
        (2, DIM, 5, 7),
    ),
    "volume": (
        {"scales": (1, (2, 2, 2), (3, 4, 4)), "accept_3d_fmap": True, "share_quant_resi": 2},
        VOLUME,
    ),
    "rotation": ({"scales": (2, 8, 16), "rotation_trick": True}, SEQUENCE),
    "own codebooks": (
        {"scales": (1, 4, 16), "shared_codebook": False, "codebook_size": (5, 9, 20)},
        SEQUENCE,
    ),
    "own convolutions": ({"scales": (1, 2, 4, 8), "share_quant_resi": 0}, SEQUENCE),
    "few convolutions": (
        {"scales": (1, 2, 3, 4, 5, 6), "share_quant_resi": 3, "accept_image_fmap": True},
        IMAGE,
    ),
    "many convolutions": ({"scales": (1, 4), "share_quant_resi": 7}, SEQUENCE),
    "no convolution": ({"scales": (1, 4, 16), "quant_resi": 0.0}, SEQUENCE),
    "dropout": ({"scales": (1, 2, 4, 8, 16), "nested_dropout": 0.9}, SEQUENCE),
    "dropout of the last ones": (
        {"scales": (1, 2, 4, 16), "nested_dropout": 1.0, "nested_dropout_min_levels": 3},
        SEQUENCE,
    ),
    "orthogonal": (
        {
            "scales": (4, 16),
            "orthogonal_reg_weight": 5.0,
            "orthogonal_reg_max_codes": 6,
            "orthogonal_reg_active_codes_only": True,
        },
        SEQUENCE,
    ),
    "commitment and decay": ({"scales": (4, 16), "commitment_weight": 0.3, "decay": 0.5}, SEQUENCE),
}


def pair(**options):
    # k-means and dead codes draw at random; their own tests are with `VectorQuantize`.
    options = {
        "dim": DIM,
        "codebook_size": 24,
        "kmeans_init": False,
        "threshold_ema_dead_code": 0,
        **options,
    }
    torch.manual_seed(0)
    theirs, ours = theirs_module.HierarchicalVQ(**options), HierarchicalVQ(**options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def batch(step: int, shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("name", CASES)
def test_training_and_evaluation_agree(name: str) -> None:
    options, shape = CASES[name]
    theirs, ours = pair(**options)
    for step in range(3):
        *_, [cutoff] = compare(theirs, ours, batch(step, shape), return_cutoff=True)
        if name == "dropout of the last ones":
            assert cutoff == 2
    theirs.eval(), ours.eval()
    _, indices, *_, [cutoff] = compare(theirs, ours, batch(9, shape), return_cutoff=True)
    assert cutoff is None
    assert [tuple(i.shape[1:]) for i in indices] == list(ours.level_shapes)
    space = tuple(shape[2:] if ours.channel_first else shape[1:-1])
    for size in (None, space):
        close(
            ours.get_output_from_indices(indices, size),
            theirs.get_output_from_indices(indices, size),
        )
    dropped = [*indices[:-1], torch.full_like(indices[-1], -1)]
    close(
        ours.get_output_from_indices(dropped, space),
        theirs.get_output_from_indices(dropped, space),
    )


def test_defaults_start_by_kmeans_and_revive_dead_codes() -> None:
    theirs, ours = pair(
        scales=(4, 16), kmeans_init=True, threshold_ema_dead_code=1, codebook_size=8
    )
    compare(theirs, ours, batch(0, SEQUENCE))
    assert bool(ours.vq._codebook.initted)
    ours(batch(1, SEQUENCE))
    assert (ours.vq._codebook.cluster_size >= 1).all()


@pytest.mark.parametrize("rotation", [True, False])
def test_second_derivatives(rotation: bool) -> None:
    other, mine = (
        second_derivative(lambda x, module=module: cubes(module(x)), batch(3, SEQUENCE))
        for module in pair(scales=(1, 4, 16), rotation_trick=rotation)
    )
    torch.testing.assert_close(mine, other, rtol=2e-3, atol=1e-3 * other.abs().max().item())


def test_autocast() -> None:
    """Theirs stop at the convolutions; ours mix them in the dtype of the features."""
    _, ours = pair(scales=(1, 4, 16))
    exact, *_ = ours.eval()(batch(0, SEQUENCE))
    with torch.autocast("cpu", torch.bfloat16):
        quantized, *_ = ours(batch(0, SEQUENCE))
    assert quantized.dtype == torch.float32
    torch.testing.assert_close(quantized, exact, rtol=0, atol=0.1)


def test_no_matrix_of_distances() -> None:
    ours = HierarchicalVQ(dim=DIM, codebook_size=900, scales=(1, 10, 20), accept_image_fmap=True)
    with largest_tensor() as largest:
        quantized, _, loss = ours(torch.randn(2, DIM, 20, 20, requires_grad=True))
        (quantized.sum() + loss).backward()
    assert 2 * 400 * DIM <= largest.numel < 2 * 400 * 900 / 10


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["sequence", "sequence, channels last", "image", "volume"])
def test_masks(name: str, training: bool) -> None:
    options, shape = CASES[name]
    theirs, ours = pair(**options)
    theirs.train(training), ours.train(training)
    space = shape[2:] if ours.channel_first else shape[1:-1]
    mask = torch.rand(shape[0], *space, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[-1] = False
    mask[-1].view(-1)[0] = True
    for step in range(3):
        _, indices, *_ = compare(theirs, ours, batch(step, shape), mask=mask)
    close(
        ours.get_output_from_indices(indices, space),
        theirs.get_output_from_indices(indices, space),
    )
    assert any((level == -1).any() for level in indices)


def test_lengths() -> None:
    options, shape = CASES["sequence"]
    theirs, ours = pair(**options)
    x, lens = batch(0, shape), torch.tensor([16, 3, 9])
    compare(theirs, ours, x, lens=lens)
    x[2, :, 9:] = float("nan")  # what padding holds is nobody's concern
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    quantized, *_ = ours.eval()(x, lens=lens)
    assert quantized.isfinite().all()
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_leave_the_state_alone(value: float) -> None:
    for options in ({}, {"kmeans_init": True, "threshold_ema_dead_code": 2, "codebook_size": 5}):
        _, ours = pair(scales=(1, 2, 6), accept_image_fmap=True, **options)
        x = batch(0, IMAGE)
        x[0, 1, 2, 3] = value
        for _ in range(2):
            ours(x)
        assert all(entry.isfinite().all() for entry in ours.state_dict().values())
        assert int(ours.vq.skipped_rows) > 0
        if not options:  # the other image's rows alone are counted at the first level
            assert ours.vq._codebook.cluster_size.sum() < 24 * 0.99**6 + 2 * 41
        ours(batch(1, IMAGE))


def test_orthogonal_loss_goes_back_through_levels_that_move_codes() -> None:
    _, ours = pair(scales=(1, 4, 16), orthogonal_reg_weight=2.0, commitment_weight=0.0)
    used, step = [], ours.vq._codebook.update_ema

    def update_ema() -> None:
        step()
        used.append(ours.vq.codebook.detach().double().requires_grad_())

    ours.vq._codebook.update_ema = update_ema
    ours(batch(0, SEQUENCE))[2].backward()
    for codes in used:
        unit = torch.nn.functional.normalize(codes, dim=-1)
        (2 * (unit @ unit.T).square().mean() / 3).backward()
    close(ours.vq._codebook.embed.grad[0], sum(codes.grad for codes in used).float())


def test_harmless_values_are_taken() -> None:
    theirs, ours = pair(scales=(1, 4, 16), sync_codebook=False, kmeans_iters=0)
    compare(theirs, ours, batch(0, SEQUENCE), sample_codebook_temp=0.5)


def test_stochastic_codes() -> None:
    theirs, ours = pair(scales=(1, 4, 16), stochastic_sample_codes=True, sample_codebook_temp=0.0)
    compare(theirs, ours, batch(0, SEQUENCE))
    torch.manual_seed(0)
    drawn = [ours(batch(1, SEQUENCE), sample_codebook_temp=3.0)[1] for _ in range(2)]
    assert all(not torch.equal(*level) for level in zip(*drawn, strict=True))


def test_unsupported_arguments_say_so() -> None:
    ours = HierarchicalVQ(dim=DIM, codebook_size=4, scales=(1, 2))
    with pytest.raises(NotImplementedError, match=r"support indices=<tensor of shape \(3,\)>"):
        ours(torch.zeros(SEQUENCE), indices=torch.ones(3))


def test_bad_masks() -> None:
    ours = HierarchicalVQ(dim=DIM, codebook_size=4, scales=(1, 2))
    x, mask = torch.zeros(SEQUENCE), torch.ones(3, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match="exclude each other"):
        ours(x, mask=mask, lens=torch.ones(3))
    with pytest.raises(ValueError, match=r"bool of shape \(3, 16\), got torch.bool \(2, 16\)"):
        ours(x, mask=mask[:2])
    with pytest.raises(ValueError, match=r"torch\.float32"):
        ours(x, mask=mask.float())
    images = HierarchicalVQ(dim=DIM, codebook_size=4, scales=(1, 2), accept_image_fmap=True)
    with pytest.raises(ValueError, match="lens is for sequences, got 2"):
        images(torch.zeros(IMAGE), lens=torch.ones(2))


def test_every_option_is_known() -> None:
    for method in ("__init__", "forward", "get_output_from_indices"):
        mine = inspect.signature(getattr(HierarchicalVQ, method)).parameters
        other = inspect.signature(getattr(theirs_module.HierarchicalVQ, method)).parameters
        assert list(mine) == list(other)
        for name, parameter in other.items():
            assert mine[name].default == parameter.default, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, r"scales must be positive sides that do not shrink, got \(\)"),
        ({"scales": (2, 1)}, r"do not shrink, got \(2, 1\)"),
        ({"scales": (0, 1)}, r"do not shrink, got \(0, 1\)"),
        ({"scales": ((1, 2), 3)}, "a size must be 1 numbers or one"),
        ({"codebook_size": (4, 5)}, r"got \(4, 5\)"),
        ({"codebook_size": (4, 5, 6), "shared_codebook": False}, r"got \(4, 5, 6\)"),
        ({"nested_dropout": 1.5}, "nested_dropout must be in"),
        ({"nested_dropout_min_levels": 0}, "nested_dropout_min_levels"),
        ({"accept_image_fmap": True, "accept_3d_fmap": True}, "exclude each other"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HierarchicalVQ(**{"dim": DIM, "codebook_size": 4, "scales": (1, 2), **options})


def test_bad_shapes() -> None:
    ours = HierarchicalVQ(dim=DIM, codebook_size=4, scales=(1, 2))
    with pytest.raises(ValueError, match=rf"{DIM} channels in dimension 1, got \(3, 16, {DIM}\)"):
        ours(torch.zeros(3, 16, DIM))
    with pytest.raises(ValueError, match="3 dimensions"):
        ours(torch.zeros(IMAGE))
    with pytest.raises(ValueError, match="2 levels, got 1"):
        ours.get_output_from_indices([torch.zeros(1, 1, dtype=torch.int64)])
