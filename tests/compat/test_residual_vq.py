"""`ResidualVQ` and `GroupedResidualVQ` against vector-quantize-pytorch's, from the same state."""

from __future__ import annotations

import inspect

import pytest
import torch
from compat.helpers import (
    close,
    compare,
    cubes,
    largest_tensor,
    same_state,
    second_derivative,
)

from tokenflow_ext.compat import GroupedResidualVQ, ResidualVQ

theirs_module = pytest.importorskip("vector_quantize_pytorch")

DIM, LAYERS, GROUPS = 8, 4, 2
SHAPE = (3, 20, DIM)

OPTIONS = {
    "defaults": {},
    "straight-through": {"rotation_trick": False},
    "cosine": {"use_cosine_sim": True, "commitment_weight": 0.5},
    "projected": {"codebook_dim": 4},
    "sizes": {"codebook_size": (24, 12, 7, 30), "num_quantizers": None},
    "gradient between layers": {"quant_grad_frac": 0.3},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "dead codes": {"threshold_ema_dead_code": 2},
    # Few codes: those of a single row would leave rounding errors for the next layer to cluster.
    "k-means": {"kmeans_init": True, "kmeans_iters": 3, "codebook_size": 5, "num_quantizers": 2},
    "dropout": {"quantize_dropout": True},
    "dropout in pairs": {
        "quantize_dropout": True,
        "quantize_dropout_cutoff_index": 1,
        "quantize_dropout_multiple_of": 2,
    },
    "optimizer in place": {
        "learnable_codebook": True,
        "ema_update": False,
        "in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=20.0),
    },
    "optimistic": {"learnable_codebook": True, "ema_update": False, "sync_update_v": 0.5},
    "DiVeQ": {"diveq": True},
    "DiVeQ, projected, shared": {"diveq": True, "codebook_dim": 4, "shared_codebook": True},
    "DiVeQ, dropout": {"diveq": True, "quantize_dropout": True},
    "shared": {"shared_codebook": True},
    "shared, straight-through": {"shared_codebook": True, "rotation_trick": False},
    "shared, cosine": {"shared_codebook": True, "use_cosine_sim": True},
    "shared, projected": {"shared_codebook": True, "codebook_dim": 5},
    "shared, dropout": {"shared_codebook": True, "quantize_dropout": True},
    "shared, learnable": {
        "shared_codebook": True,
        "learnable_codebook": True,
        "ema_update": False,
    },
}


def pair(**options):
    options = {"dim": DIM, "codebook_size": 24, "num_quantizers": LAYERS, **options}
    torch.manual_seed(0)
    theirs, ours = theirs_module.ResidualVQ(**options), ResidualVQ(**options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def grouped(**options):
    """Theirs and ours by group, of as many channels a group as `pair` has."""
    options = {
        "dim": GROUPS * DIM,
        "groups": GROUPS,
        "codebook_size": 24,
        "num_quantizers": LAYERS,
        **options,
    }
    torch.manual_seed(0)
    theirs, ours = theirs_module.GroupedResidualVQ(**options), GroupedResidualVQ(**options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def batch(step: int, shape=SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("name", OPTIONS)
def test_training_and_evaluation_agree(name: str) -> None:
    theirs, ours = pair(**OPTIONS[name])
    for step in range(4):
        compare(theirs, ours, batch(step))
    theirs.eval(), ours.eval()
    _, indices, losses, *_ = compare(theirs, ours, batch(9))
    assert indices.shape == (*SHAPE[:2], ours.num_quantizers)
    assert torch.equal(losses, torch.zeros(ours.num_quantizers))
    close(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))
    close(ours.get_output_from_indices(indices), theirs.get_output_from_indices(indices))
    for mine, other in zip(ours.codebooks, theirs.codebooks, strict=True):
        close(mine, other)


def test_return_all_codes() -> None:
    theirs, ours = pair(quantize_dropout=True)
    arguments = {"return_all_codes": True, "rand_quantize_dropout_fixed_seed": 3}
    *_, [mine] = compare(theirs, ours, batch(0), **arguments)
    *_, other = theirs(batch(1), **arguments)
    close(ours(batch(1), **arguments)[-1], other)
    assert mine.shape == (LAYERS, *SHAPE)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["dropout", "dropout in pairs", "shared, dropout"])
def test_dropped_layers(name: str, seed: int) -> None:
    theirs, ours = pair(**OPTIONS[name])
    _, indices, losses, *_ = compare(
        theirs, ours, batch(seed), rand_quantize_dropout_fixed_seed=seed
    )
    dropped = (indices == -1).all(dim=(0, 1))
    assert torch.equal(losses == 0, dropped)
    close(
        ours.get_output_from_indices(indices[..., ~dropped]),
        theirs.get_output_from_indices(indices),
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("zeros", [True, False])
def test_masks(training: bool, shared: bool, zeros: bool) -> None:
    theirs, ours = pair(shared_codebook=shared, return_zeros_for_masked_padding=zeros)
    theirs.train(training), ours.train(training)
    mask = torch.arange(20) < torch.tensor([[20], [3], [11]])
    for step in range(2):
        quantized, indices, *_ = compare(theirs, ours, batch(step), mask=mask)
    assert torch.equal(indices[..., 0] == -1, ~mask)
    assert torch.equal(quantized[~mask], batch(1)[~mask] * (0 if zeros else 1))


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 4}, {"shared_codebook": True}])
def test_what_is_masked_decodes_to_zeros(options: dict) -> None:
    ours = pair(**options)[1].eval()
    mask = torch.arange(20) < torch.tensor([[20], [3], [11]])
    quantized, indices, _ = ours(batch(0), mask=mask)
    close(ours.get_output_from_indices(indices), quantized)
    assert torch.equal(quantized[~mask], torch.zeros_like(quantized[~mask]))
    with pytest.raises(IndexError):
        ours.get_codes_from_indices(torch.full_like(indices, -2))


@pytest.mark.parametrize("shared", [True, False])
def test_orthogonal_loss_goes_back_through_layers_that_move_codes(shared: bool) -> None:
    """As many gradients as uses, each that of the codes of its use (in float64)."""
    _, ours = pair(shared_codebook=shared, orthogonal_reg_weight=2.0, commitment_weight=0.0)
    before = [codes.detach().double().requires_grad_() for codes in ours.codebooks]
    losses = ours(batch(0))[2]
    losses.sum().backward()
    # Codes move by EMA before the loss is computed in a layer, and after all layers if shared.
    used = before if shared else [c.detach().double().requires_grad_() for c in ours.codebooks]
    for codes in used:
        unit = torch.nn.functional.normalize(codes, dim=-1)
        (2 * (unit @ unit.T).square().mean()).backward()
    for layer, codes in zip(ours.layers, used, strict=True):
        close(layer._codebook.embed.grad[0], (LAYERS if shared else 1) * codes.grad.float())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_leave_the_state_alone(shared: bool, value: float) -> None:
    for options in ({}, {"threshold_ema_dead_code": 2, "kmeans_init": True, "codebook_size": 9}):
        _, ours = pair(shared_codebook=shared, **options)
        _, twin = pair(shared_codebook=shared, **options)
        x = batch(0)
        x[1, 2:4, 3] = value
        mask = x.isfinite().all(dim=-1)
        for _ in range(2):
            ours(x)
            twin(x, mask=mask)
        assert all(entry.isfinite().all() for entry in ours.state_dict().values())
        if not options:
            same_state(ours, twin)
        books = {layer._codebook for layer in ours.layers}
        assert sum(int(book.skipped_rows) for book in books) == 2 * 2 * LAYERS
        ours(batch(1))


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 4}, {"shared_codebook": True}])
@pytest.mark.parametrize("training", [True, False])
def test_images_are_sequences(options: dict, training: bool) -> None:
    torch.manual_seed(0)
    images = ResidualVQ(
        dim=DIM, codebook_size=24, num_quantizers=3, accept_image_fmap=True, **options
    ).train(training)
    sequences = ResidualVQ(dim=DIM, codebook_size=24, num_quantizers=3, **options).train(training)
    sequences.load_state_dict(images.state_dict())
    x = batch(0, (2, DIM, 5, 6))
    quantized, indices, losses = images(x)
    flat, flat_indices, flat_losses = sequences(x.flatten(2).mT)
    close(quantized, flat.mT.unflatten(2, (5, 6)))
    assert torch.equal(indices, flat_indices.unflatten(1, (5, 6)))
    close(losses, flat_losses)
    if not training:
        close(images.get_output_from_indices(indices).movedim(-1, 1), quantized)
    if not options:  # a layer by hand takes images too
        assert images.layers[0](x)[1].shape == (2, 5, 6)


def test_one_token_each() -> None:
    theirs, ours = pair(shared_codebook=True)
    compare(theirs, ours, batch(0, (17, DIM)))
    theirs.eval(), ours.eval()
    compare(theirs, ours, batch(0, (17, DIM)))


@pytest.mark.parametrize("cosine", [True, False])
def test_one_call_gives_what_the_layers_give(cosine: bool) -> None:
    _, ours = pair(shared_codebook=True, use_cosine_sim=cosine)
    ours.eval()
    x = batch(0)
    assert ours._fusable()
    quantized, indices, _ = ours._pyramid(x)
    by_layer, layer_indices, _ = ours._layers(x, LAYERS - 1, {"freeze_codebook": None})
    assert torch.equal(indices, layer_indices)
    close(quantized, by_layer)


@pytest.mark.parametrize("shared", [True, False])
def test_stochastic_codes(shared: bool) -> None:
    """Each layer draws; what is returned is the sum of what was drawn. None are drawn at 0."""
    theirs, ours = pair(
        shared_codebook=shared, stochastic_sample_codes=True, sample_codebook_temp=0.0
    )
    compare(theirs, ours, batch(0))
    compare(theirs, ours, batch(1), freeze_codebook=True)
    nearest = ours(batch(2), freeze_codebook=True)[1]
    quantized, drawn, _ = ours(batch(2), freeze_codebook=True, sample_codebook_temp=2.0)
    assert ((drawn != nearest).float().mean(dim=(0, 1)) > 0.2).all()
    close(ours.get_output_from_indices(drawn), quantized)


@pytest.mark.parametrize("options", [{}, {"quant_grad_frac": 0.3}, {"shared_codebook": True}])
def test_second_derivatives(options: dict) -> None:
    other, mine = (
        second_derivative(lambda x, module=module: cubes(module(x, freeze_codebook=True)), batch(3))
        for module in pair(**options)
    )
    torch.testing.assert_close(mine, other, rtol=2e-3, atol=1e-3 * other.abs().max().item())


def test_dead_codes_of_a_shared_codebook_are_moved_once() -> None:
    _, ours = pair(shared_codebook=True, threshold_ema_dead_code=2, decay=0.5)
    x = batch(0)
    quantized, indices, _ = ours.eval()(x)
    before = ours.codebooks[0].clone()
    trained, trained_indices, _ = ours.train()(x)
    assert torch.equal(indices, trained_indices)
    close(trained, quantized)
    assert not torch.equal(ours.codebooks[0], before)
    assert (ours.layers[0]._codebook.cluster_size >= 2).all()
    same_state(ours.layers[0], ours.layers[-1])


def test_no_matrix_of_distances() -> None:
    rows, codes = 600, 900
    for shared in (True, False):
        ours = ResidualVQ(dim=DIM, codebook_size=codes, num_quantizers=3, shared_codebook=shared)
        with largest_tensor() as largest:
            quantized, _, losses = ours(torch.randn(1, rows, DIM, requires_grad=True))
            (quantized.sum() + losses.sum()).backward()
            ours.eval()(torch.randn(1, rows, DIM))
        assert rows * DIM <= largest.numel < rows * codes / 10


UNSERVED = {
    "heads": 2,
    "implicit_neural_codebook": True,
    "beam_size": 4,
    "eval_beam_size": 4,
    "channel_last": False,
    "accept_3d_fmap": True,
    "affine_param": True,
    "vq_bridge": torch.nn.Identity(),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_unsupported_options_say_so(name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"does not support {name}=[^\n]+$"):
        ResidualVQ(dim=DIM, codebook_size=8, num_quantizers=2, **{name: UNSERVED[name]})


@pytest.mark.parametrize(
    ("name", "value"),
    [("indices", [torch.zeros(1)]), ("indices", torch.zeros(3, 20, 4)), ("beam_size", 2)],
)
def test_unsupported_arguments_say_so(name: str, value: object) -> None:
    with pytest.raises(NotImplementedError, match=rf"support {name}=[^\n]*$") as error:
        pair()[1](batch(0), **{name: value})
    assert "tensor(" not in str(error.value)


def test_harmless_values_are_taken() -> None:
    theirs, ours = pair(
        mlp_kwargs={"depth": 2},
        beam_size=1,
        eval_beam_size=1,
        beam_score_quantizer_weights=[1.0, 0.5, 1.0, 2.0],
        sync_codebook=False,
        kmeans_iters=0,
        heads=1,
        stochastic_sample_codes=False,
    )
    compare(theirs, ours, batch(0), beam_size=1, sample_codebook_temp=0.5)


@pytest.mark.parametrize("ours", [ResidualVQ, GroupedResidualVQ])
def test_every_option_is_known(ours: type) -> None:
    theirs = getattr(theirs_module, ours.__name__)
    for method in ("__init__", "forward"):
        mine = inspect.signature(getattr(ours, method)).parameters
        other = inspect.signature(getattr(theirs, method)).parameters
        assert list(mine) == list(other)
        for name, parameter in other.items():
            assert (mine[name].default or None) == (parameter.default or None), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "num_quantizers must be at least 1"),
        ({"codebook_size": (4, 4), "num_quantizers": 3}, r"codebook_size=\(4, 4\)"),
        ({"codebook_size": (4, 5), "shared_codebook": True}, "shared_codebook needs one"),
        ({"num_quantizers": 2, "kmeans_init": True, "kmeans_iters": 0}, "kmeans_iters"),
        (
            {"num_quantizers": 3, "quantize_dropout": True, "quantize_dropout_cutoff_index": 3},
            "quantize_dropout_cutoff_index must be 0 to 2, got 3",
        ),
        (
            {"num_quantizers": 3, "quantize_dropout": True, "quantize_dropout_multiple_of": 0},
            "quantize_dropout_multiple_of must be at least 1, got 0",
        ),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResidualVQ(**{"dim": DIM, "codebook_size": 4, **options})


def test_a_shared_codebook_has_no_optimizer_in_place() -> None:
    with pytest.raises(NotImplementedError, match="in_place_codebook_optimizer=<SGD>"):
        pair(
            shared_codebook=True,
            learnable_codebook=True,
            ema_update=False,
            in_place_codebook_optimizer=torch.optim.SGD,
        )


def test_no_rows() -> None:
    for shared in (True, False):
        theirs, ours = pair(shared_codebook=shared)
        for training in (True, False):
            theirs.train(training), ours.train(training)
            compare(theirs, ours, torch.randn(0, 20, DIM))


def test_bad_shapes() -> None:
    ours = ResidualVQ(dim=DIM, codebook_size=4, num_quantizers=2)
    with pytest.raises(ValueError, match=rf"{DIM} channels in dimension -1, got \(2, 3, 4\)"):
        ours(torch.zeros(2, 3, 4))
    images = ResidualVQ(dim=DIM, codebook_size=4, num_quantizers=2, accept_image_fmap=True)
    with pytest.raises(ValueError, match="4 dimensions"):
        images(torch.zeros(2, DIM, 4))
    with pytest.raises(ValueError, match="only with quantize_dropout"):
        ours.get_codes_from_indices(torch.zeros(2, 3, 1, dtype=torch.int64))


# ---------------------------------------------------------------------- GroupedResidualVQ

WIDE = (*SHAPE[:2], GROUPS * DIM)


@pytest.mark.parametrize("name", OPTIONS)
def test_groups_in_training_and_evaluation_agree(name: str) -> None:
    theirs, ours = grouped(**OPTIONS[name])
    for step in range(4):
        compare(theirs, ours, batch(step, WIDE))
    theirs.eval(), ours.eval()
    _, indices, losses, *_ = compare(theirs, ours, batch(9, WIDE))
    layers = ours.rvqs[0].num_quantizers
    assert indices.shape == (GROUPS, *SHAPE[:2], layers)
    assert torch.equal(losses, torch.zeros(GROUPS, layers))
    for given in (indices, tuple(indices)):
        close(ours.get_codes_from_indices(given), theirs.get_codes_from_indices(indices))
        close(ours.get_output_from_indices(given), theirs.get_output_from_indices(indices))
    if name == "sizes":  # theirs stack what has several shapes
        assert [[len(k) for k in book] for book in ours.codebooks] == [[24, 12, 7, 30]] * GROUPS
    else:
        close(ours.codebooks, theirs.codebooks)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_group_is_quantized_as_if_it_were_alone(groups: int) -> None:
    """In float32 and in float64, each by its own `ResidualVQ`."""
    for dtype in (torch.float32, torch.float64):
        theirs, ours = grouped(groups=groups, dim=8, shared_codebook=True)
        theirs.eval(), ours.eval()
        x = batch(0, (3, 20, 8)).to(dtype)
        quantized, indices, losses = ours(x)
        assert all(rvq._fusable() for rvq in ours.rvqs)
        for group, (rvq, part) in enumerate(zip(ours.rvqs, x.chunk(groups, dim=-1), strict=True)):
            alone, alone_indices, alone_losses = rvq(part)
            assert torch.equal(quantized.chunk(groups, dim=-1)[group], alone)
            assert torch.equal(indices[group], alone_indices)
            assert torch.equal(losses[group], alone_losses)
        close(quantized, theirs(x)[0])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["dropout", "dropout in pairs", "shared, dropout", "sizes"])
def test_groups_drop_the_same_layers(name: str, seed: int) -> None:
    theirs, ours = grouped(**OPTIONS[name])
    results = []
    for module in (theirs, ours):
        torch.manual_seed(seed)
        results.append(module(batch(seed, WIDE)))
        results[-1] += (torch.rand(()),)  # as much is drawn in all
    (_, their_indices, their_losses, their_next), (_, indices, losses, ours_next) = results
    assert torch.equal(indices, their_indices)
    close(losses, their_losses)
    dropped = (indices == -1).all(dim=1).all(dim=1)
    assert torch.equal(dropped[0], dropped[1])
    assert torch.equal(losses == 0, dropped)
    assert torch.equal(ours_next, their_next)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("zeros", [True, False])
def test_masks_of_groups(training: bool, zeros: bool) -> None:
    theirs, ours = grouped(return_zeros_for_masked_padding=zeros)
    theirs.train(training), ours.train(training)
    mask = torch.arange(20) < torch.tensor([[20], [3], [11]])
    for step in range(2):
        quantized, indices, *_ = compare(theirs, ours, batch(step, WIDE), mask=mask)
    assert torch.equal(indices[..., 0] == -1, ~mask.expand(GROUPS, -1, -1))
    assert torch.equal(quantized[~mask], batch(1, WIDE)[~mask] * (0 if zeros else 1))
    kept = ours.get_output_from_indices(indices)
    assert torch.equal(kept[~mask], torch.zeros_like(kept[~mask]))


def test_all_codes_of_groups_and_freezing_for_a_step() -> None:
    theirs, ours = grouped()
    before = ours.codebooks.clone()
    arguments = {"return_all_codes": True, "freeze_codebook": True}
    *_, other = theirs(batch(0, WIDE), **arguments)
    *_, mine = ours(batch(0, WIDE), **arguments)
    assert type(mine) is type(other) is tuple
    for codes, their_codes in zip(mine, other, strict=True):
        assert codes.shape == (LAYERS, *SHAPE)
        close(codes, their_codes)
    assert torch.equal(ours.codebooks, before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_groups_of_images_are_those_of_sequences(training: bool, shared: bool) -> None:
    """Theirs take none in `ResidualVQ`, and join decoded images along their height."""
    options = {"dim": 12, "groups": 3, "codebook_size": 24, "num_quantizers": 2}
    torch.manual_seed(0)
    images = GroupedResidualVQ(**options, accept_image_fmap=True, shared_codebook=shared)
    sequences = GroupedResidualVQ(**options, shared_codebook=shared)
    images.train(training), sequences.train(training)
    sequences.load_state_dict(images.state_dict())
    x = batch(0, (2, 12, 5, 6))
    quantized, indices, losses = images(x)
    flat, flat_indices, flat_losses = sequences(x.flatten(2).mT)
    close(quantized, flat.mT.unflatten(2, (5, 6)))
    assert indices.shape == (3, 2, 5, 6, 2)
    assert torch.equal(indices, flat_indices.unflatten(2, (5, 6)))
    close(losses, flat_losses)
    if not training:
        close(images.get_output_from_indices(indices).movedim(-1, 1), quantized)


def test_groups_draw_stochastic_codes() -> None:
    theirs, ours = grouped(stochastic_sample_codes=True, sample_codebook_temp=0.0)
    compare(theirs, ours, batch(0, WIDE))
    nearest = ours(batch(2, WIDE), freeze_codebook=True)[1]
    drawn = ours(batch(2, WIDE), freeze_codebook=True, sample_codebook_temp=2.0)[1]
    assert ((drawn != nearest).float().mean(dim=(1, 2)) > 0.2).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [True, False])
def test_groups_in_half_precision(dtype: torch.dtype, shared: bool) -> None:
    theirs, ours = grouped(shared_codebook=shared)
    for training in (True, False):
        theirs.train(training), ours.train(training)
        x = batch(0, WIDE).to(dtype)
        (other, their_indices, their_losses), (mine, indices, losses) = theirs(x), ours(x)
        assert mine.dtype == other.dtype == dtype
        # A code that one of them finds a rounding nearer changes what the layers after it find.
        same = (indices == their_indices).all(dim=-1)
        assert same.float().mean() > 0.9
        same = same.all(dim=0)
        # Theirs round what each layer leaves, ours in one call do not.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(mine[same], other[same], rtol=eps, atol=4 * eps)
        torch.testing.assert_close(losses, their_losses, rtol=4 * eps, atol=4 * eps)
        ours.load_state_dict(theirs.state_dict())


def test_groups_under_autocast() -> None:
    _, ours = grouped(codebook_dim=4)
    exact, *_ = ours.eval()(batch(0, WIDE))
    with torch.autocast("cpu", torch.bfloat16):
        quantized, *_ = ours(batch(0, WIDE))
    assert quantized.dtype == torch.bfloat16
    assert (quantized.float() - exact).square().mean() < 0.02 * exact.square().mean()


def test_groups_take_an_empty_list_of_indices() -> None:
    compare(*grouped(), batch(0, WIDE), indices=[])


def test_unsupported_options_of_groups_say_so() -> None:
    with pytest.raises(NotImplementedError, match="does not support implicit_neural_codebook=True"):
        GroupedResidualVQ(
            dim=8, groups=2, codebook_size=8, num_quantizers=2, implicit_neural_codebook=True
        )
    with pytest.raises(TypeError, match="no_such_option"):
        GroupedResidualVQ(dim=8, groups=2, codebook_size=8, num_quantizers=2, no_such_option=1)
    indices = torch.zeros(GROUPS, *SHAPE[:2], LAYERS, dtype=torch.int64)
    for given in (indices, list(indices)):
        with pytest.raises(NotImplementedError, match="GroupedResidualVQ does not support indices"):
            grouped()[1](batch(0, WIDE), indices=given)


@pytest.mark.parametrize(("dim", "groups"), [(8, 3), (8, 0), (8, -2)])
def test_groups_that_do_not_divide(dim: int, groups: int) -> None:
    with pytest.raises(ValueError, match=f"groups must divide dim, got groups={groups}, dim={dim}"):
        GroupedResidualVQ(dim=dim, groups=groups, codebook_size=4, num_quantizers=2)


def test_bad_shapes_of_groups() -> None:
    _, ours = grouped()
    with pytest.raises(ValueError, match=r"16 channels in dimension -1, got \(3, 20, 8\)"):
        ours(torch.zeros(SHAPE))
    with pytest.raises(ValueError, match="2 or 3 dimensions"):
        ours(torch.zeros(1, *WIDE))
    indices = torch.zeros(3, 2, 5, LAYERS, dtype=torch.int64)
    for decode in (ours.get_codes_from_indices, ours.get_output_from_indices):
        with pytest.raises(ValueError, match="must hold 2 groups first, got 3"):
            decode(indices)
    images = GroupedResidualVQ(
        dim=8, groups=2, codebook_size=4, num_quantizers=2, accept_image_fmap=True
    )
    with pytest.raises(ValueError, match=r"8 channels in dimension 1, got \(2, 5, 6, 8\)"):
        images(torch.zeros(2, 5, 6, 8))
