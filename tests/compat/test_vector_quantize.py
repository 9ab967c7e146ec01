"""`VectorQuantize` against vector-quantize-pytorch's own, from the same state."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from compat.helpers import (
    close,
    compare,
    cubes,
    largest_tensor,
    nearest_within,
    run,
    same_state,
    second_derivative,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow_ext.compat import VectorQuantize

theirs_module = pytest.importorskip("vector_quantize_pytorch")

DIM = 8
SEQUENCE, IMAGE, VOLUME = (3, 20, DIM), (2, DIM, 5, 6), (2, DIM, 2, 3, 4)

OPTIONS = {
    "defaults": {},
    "straight-through": {"rotation_trick": False},
    "cosine": {"use_cosine_sim": True},
    "cosine straight-through": {"use_cosine_sim": True, "rotation_trick": False},
    "projected": {"codebook_dim": 4},
    "projected with layer norm": {"codebook_dim": 4, "layernorm_after_project_in": True},
    "heads": {"codebook_dim": DIM // 2, "heads": 2},
    "heads projected": {"codebook_dim": 3, "heads": 2, "use_cosine_sim": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "learnable, straight-through": {
        "learnable_codebook": True,
        "ema_update": False,
        "rotation_trick": False,
    },
    "learnable, frozen": {
        "learnable_codebook": True,
        "ema_update": False,
        "freeze_codebook": True,
    },
    "fixed": {"ema_update": False},
    "frozen": {"freeze_codebook": True},
    "decay and eps": {"decay": 0.5, "eps": 1e-2},
    "no commitment": {"commitment_weight": 0.0},
    "commitment": {"commitment_weight": 0.25},
    "no gradient to the input": {"route_gradients_to_input": False},
    "orthogonal": {"orthogonal_reg_weight": 10.0},
    "orthogonal, active codes": {
        "orthogonal_reg_weight": 10.0,
        "orthogonal_reg_active_codes_only": True,
    },
    "orthogonal, few codes": {
        "orthogonal_reg_weight": 10.0,
        "orthogonal_reg_max_codes": 7,
        "use_cosine_sim": True,
    },
    "dead codes": {"threshold_ema_dead_code": 2},
    "dead codes, cosine": {"threshold_ema_dead_code": 2, "use_cosine_sim": True},
    "dead codes, fixed": {"threshold_ema_dead_code": 1, "ema_update": False},
    "k-means": {"kmeans_init": True, "kmeans_iters": 4},
    "k-means, cosine": {"kmeans_init": True, "use_cosine_sim": True},
    "one channel": {"dim": 1},
    "codebooks by head": {"codebook_dim": 4, "heads": 2, "separate_codebook_per_head": True},
    "codebooks by head, projected, cosine": {
        "codebook_dim": 3,
        "heads": 3,
        "separate_codebook_per_head": True,
        "use_cosine_sim": True,
    },
    "codebooks by head, k-means and dead codes": {
        "codebook_dim": 4,
        "heads": 2,
        "separate_codebook_per_head": True,
        "kmeans_init": True,
        "threshold_ema_dead_code": 1,
    },
    "codebooks by head, learnable, orthogonal": {
        "codebook_dim": 4,
        "heads": 2,
        "separate_codebook_per_head": True,
        "learnable_codebook": True,
        "ema_update": False,
        "orthogonal_reg_weight": 3.0,
        "orthogonal_reg_max_codes": 9,
    },
    "one head apart": {"separate_codebook_per_head": True},
    "EMA by hand": {"manual_ema_update": True},
    "directional": {"directional_reparam": True, "threshold_ema_dead_code": 1},
    "directional, projected": {
        "directional_reparam": True,
        "directional_reparam_variance": 0.1,
        "threshold_ema_dead_code": 2,
        "codebook_dim": 4,
    },
    "optimistic": {"learnable_codebook": True, "ema_update": False, "sync_update_v": 0.3},
    "optimistic, straight-through": {
        "learnable_codebook": True,
        "ema_update": False,
        "sync_update_v": 1.0,
        "rotation_trick": False,
    },
    "Gumbel straight-through": {"straight_through": True, "rotation_trick": False},
    "optimizer in place": {
        "learnable_codebook": True,
        "ema_update": False,
        "in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=20.0, momentum=0.5),
    },
    "optimizer in place, Adam, dead codes, codebooks by head": {
        "learnable_codebook": True,
        "ema_update": False,
        "threshold_ema_dead_code": 1,
        "codebook_dim": 4,
        "heads": 2,
        "separate_codebook_per_head": True,
        "in_place_codebook_optimizer": lambda p: torch.optim.Adam(p, lr=0.1),
    },
    "optimizer in place, by hand": {
        "learnable_codebook": True,
        "ema_update": False,
        "manual_in_place_optimizer_update": True,
        "in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=20.0),
    },
    "optimizer in place beside EMA": {
        "orthogonal_reg_weight": 1.0,
        "in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=2.0),
    },
}

# What changes nothing in theirs, though the option it belongs to is not supported here.
HARMLESS = {
    "sync_codebook": False,
    "sync_kmeans": False,
    "kmeans_iters": 0,
    "sample_codebook_temp": 0.0,
    "commitment_use_cross_entropy_loss": False,
    "codebook_diversity_loss_weight": 0,
    "codebook_diversity_temperature": 3.0,
    "directional_reparam": False,
    "directional_reparam_variance": 1.0,
    "sync_affine_param": True,
    "affine_param_batch_decay": 0.5,
    "affine_param_codebook_decay": 0.5,
    "manual_in_place_optimizer_update": True,
    "straight_through": False,
    "stochastic_sample_codes": False,
    "layernorm_after_project_in": True,
    "orthogonal_reg_active_codes_only": True,
    "orthogonal_reg_max_codes": 3,
    "learnable_codebook": False,
    "in_place_codebook_optimizer": None,
    "ema_update": None,
    "vq_bridge": None,
    "sync_update_v": 0,
    "threshold_ema_dead_code": -1,
}


def pair(**options):
    """Theirs and ours in the same state."""
    options = {"dim": DIM, "codebook_size": 24, **options}
    torch.manual_seed(0)
    theirs, ours = theirs_module.VectorQuantize(**options), VectorQuantize(**options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("name", OPTIONS)
def test_training_and_evaluation_agree(name: str) -> None:
    options = OPTIONS[name]
    theirs, ours = pair(**options)
    shape = (*SEQUENCE[:2], options.get("dim", DIM))
    for step in range(5):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        compare(theirs, ours, x)
    theirs.eval(), ours.eval()
    _, indices, loss, *_ = compare(theirs, ours, x)
    assert loss == 0
    # theirs take an index [B, N] of a single head apart for one of N heads
    known = indices.unsqueeze(-1) if name == "one head apart" else indices
    codes = theirs.get_codes_from_indices(known)
    if ours.heads > 1 and not ours.separate_codebook_per_head:
        codes = codes.flatten(-2)  # theirs leave them apart, where the projection cannot take them
    close(ours.get_codes_from_indices(indices), codes)
    close(ours.get_output_from_indices(indices), theirs.project_out(codes))
    close(ours.codebook, theirs.codebook)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"channel_last": False}, (3, DIM, 20)),
        ({"accept_image_fmap": True}, IMAGE),
        ({"accept_3d_fmap": True}, VOLUME),
        ({"accept_image_fmap": True, "heads": 2, "codebook_dim": 4}, IMAGE),
        ({"accept_image_fmap": True, "codebook_dim": 4, "use_cosine_sim": True}, IMAGE),
        ({}, (17, DIM)),
    ],
)
def test_layouts(options: dict, shape: tuple, training: bool) -> None:
    theirs, ours = pair(**options)
    theirs.train(training), ours.train(training)
    x = torch.randn(shape)
    _, indices, *_ = compare(theirs, ours, x)
    if "codebook_dim" not in options:
        output = ours.get_output_from_indices(indices)
        close(output, theirs.get_output_from_indices(indices))
        assert output.shape == x.shape


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cosine_sim": True},
        {"return_zeros_for_masked_padding": False},
        {"threshold_ema_dead_code": 2},
        {"kmeans_init": True, "codebook_size": 6},
    ],
)
def test_masks(options: dict, by_length: bool, training: bool) -> None:
    theirs, ours = pair(**options)
    theirs.train(training), ours.train(training)
    lens = torch.tensor([20, 3, 11])
    mask = torch.arange(20) < lens.unsqueeze(1)
    for step in range(3):
        x = torch.randn(SEQUENCE, generator=torch.Generator().manual_seed(step))
        padding = {"lens": lens} if by_length else {"mask": mask}
        _, indices, *_ = compare(theirs, ours, x, **padding)
    assert (indices[~mask] == -1).all()
    assert (indices[mask] >= 0).all()
    assert torch.equal(ours.eval()(x, lens=[20, 3, 11])[1], ours(x, mask=mask)[1])


def test_projection_learns_from_padded_batches() -> None:
    _, ours = pair(codebook_dim=4)
    mask = torch.arange(20) < torch.tensor([[20], [3], [11]])
    x = torch.randn(SEQUENCE)
    changed = torch.where(mask.unsqueeze(-1), x, 100.0)
    twin = copy.deepcopy(ours)
    for module, inputs in ((ours, x), (twin, changed)):
        quantized, _, loss = module(inputs, mask=mask)
        (quantized.sum() + loss).backward()
    close(ours.project_in.weight.grad, twin.project_in.weight.grad)
    same_state(ours, twin)


@pytest.mark.parametrize("rotation", [True, False])
def test_projection_learns_where_the_input_needs_no_gradient(rotation: bool) -> None:
    _, ours = pair(codebook_dim=4, rotation_trick=rotation, commitment_weight=0.0)
    x = torch.randn(SEQUENCE)
    gradients = []
    for inputs in (x, x.clone().requires_grad_()):
        ours.zero_grad()
        ours(inputs, freeze_codebook=True)[0].square().sum().backward()
        gradients.append(ours.project_in.weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_the_loss_of_training_can_always_be_sent_back() -> None:
    for module in pair(commitment_weight=0.0):
        *_, loss = module(torch.randn(SEQUENCE))
        loss.backward()
        assert loss == 0


def test_loss_breakdown_and_freezing_for_a_step() -> None:
    theirs, ours = pair(orthogonal_reg_weight=2.0, commitment_weight=0.5)
    arguments = {"return_loss_breakdown": True, "freeze_codebook": True}
    before = copy.deepcopy(ours.state_dict())
    x = torch.randn(SEQUENCE)
    *_, [our_parts] = run(ours, x, **arguments)
    *_, [their_parts] = run(theirs, x, **arguments)
    assert our_parts._fields == their_parts._fields
    for mine, other in zip(our_parts, their_parts, strict=True):
        close(mine, other)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_codebook_can_be_assigned_and_state_goes_both_ways() -> None:
    theirs, ours = pair(codebook_dim=4)
    ours.codebook = torch.randn(24, 4)
    theirs.load_state_dict(ours.state_dict())
    theirs.eval(), ours.eval()
    compare(theirs, ours, torch.randn(SEQUENCE))
    again = pickle.loads(pickle.dumps(ours))
    same_state(again, ours)


def test_more_dead_codes_than_rows() -> None:
    ours = VectorQuantize(DIM, 50, threshold_ema_dead_code=5, decay=0.1)
    x = torch.randn(1, 12, DIM)
    ours(x)
    dead = ours._codebook.cluster_size[0] == 5
    assert dead.sum() > 12
    assert (ours.codebook[dead].unsqueeze(1) == x).all(dim=-1).any(dim=-1).all()
    close(ours._codebook.embed_avg[0][dead], ours.codebook[dead] * 5)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 200),
    codes=st.integers(1, 700),
    dim=st.integers(1, 40),
    cosine=st.booleans(),
    repeated=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_nearest(rows: int, codes: int, dim: int, cosine: bool, repeated: bool, seed: int) -> None:
    torch.manual_seed(seed)
    ours = VectorQuantize(dim, codes, use_cosine_sim=cosine).eval()
    if repeated:
        ours.codebook = ours.codebook[torch.randint(0, codes, (codes,))]
    x = torch.randn(1, rows, dim) * ours.codebook.abs().amax()
    quantized, indices, _ = ours(x)
    assert torch.equal(quantized[0], ours.codebook[indices[0]])
    searched = F.normalize(x[0], dim=-1) if cosine else x[0]
    nearest_within(indices[0], searched, ours.codebook)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_dtypes(dtype: torch.dtype, training: bool) -> None:
    theirs, ours = pair()
    theirs.train(training), ours.train(training)
    x = torch.randn(SEQUENCE).to(dtype)
    quantized, indices, loss = ours(x)
    their_quantized, their_indices, their_loss = theirs(x)
    assert quantized.dtype == their_quantized.dtype == dtype
    assert torch.equal(indices, their_indices)
    torch.testing.assert_close(quantized, their_quantized)
    torch.testing.assert_close(loss, their_loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("options", [{}, {"codebook_dim": 4}])
def test_half_modules_and_autocast(options: dict, autocast: bool, dtype: torch.dtype) -> None:
    theirs, ours = pair(**options)
    x = torch.randn(SEQUENCE)
    if not autocast:
        theirs.to(dtype), ours.to(dtype)
        x = x.to(dtype)
    for training in (True, False):
        ours.load_state_dict(theirs.state_dict())
        results = []
        for module in (theirs.train(training), ours.train(training)):
            with torch.autocast("cpu", dtype, enabled=autocast):
                results.append(module(x.clone().requires_grad_()))
        (other, their_indices, their_loss), (mine, indices, loss) = results
        same = indices == their_indices  # theirs compare distances in half precision
        assert same.float().mean() > 0.9
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine[same], other[same], rtol=0, atol=8 * torch.finfo(dtype).eps)
        torch.testing.assert_close(loss, their_loss, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_no_matrix_of_distances() -> None:
    rows, codes = 600, 900
    for options in ({}, {"use_cosine_sim": True}, {"orthogonal_reg_weight": 1.0}):
        ours = VectorQuantize(DIM, codes, threshold_ema_dead_code=2, kmeans_init=True, **options)
        with largest_tensor() as largest:
            quantized, _, loss = ours(torch.randn(1, rows, DIM, requires_grad=True))
            (quantized.sum() + loss).backward()
        assert 0 < largest.numel <= 2 * max(rows, codes) * DIM
        assert largest.numel < rows * codes


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_values_are_taken(name: str) -> None:
    theirs, ours = pair(**{name: HARMLESS[name]})
    compare(theirs, ours, torch.randn(SEQUENCE), sample_codebook_temp=0.5, ema_update=None)


def test_cross_entropy_without_commitment_is_harmless() -> None:
    compare(
        *pair(commitment_use_cross_entropy_loss=True, commitment_weight=0.0), torch.randn(SEQUENCE)
    )


@pytest.mark.parametrize("options", [{}, {"threshold_ema_dead_code": 2}, {"ema_update": False}])
@pytest.mark.parametrize("ema_update", [True, False])
def test_ema_update_of_a_step(options: dict, ema_update: bool) -> None:
    theirs, ours = pair(**options)
    before = ours.codebook.clone()
    for step in range(3):
        x = torch.randn(SEQUENCE, generator=torch.Generator().manual_seed(step))
        compare(theirs, ours, x, ema_update=ema_update)
    if not options:
        assert torch.equal(ours.codebook, before) != ema_update


@pytest.mark.parametrize("options", [{}, {"heads": 2, "separate_codebook_per_head": True}])
def test_weights_and_sums_of_several_steps(options: dict) -> None:
    theirs, ours = pair(**options)
    weight = torch.rand(ours._codebook.cluster_size.shape)
    arguments = [
        {"accum_ema_update": True},
        {"accum_ema_update": True, "ema_update_weight": weight},
        {"ema_update_weight": weight},
        {"ema_update_weight": lambda sums, counts: (counts > 1).float() + 0 * sums[..., 0]},
        {"freeze_codebook": True, "accum_ema_update": True},
        {},
    ]
    if not options:
        arguments.append({"ema_update_weight": weight[0]})
    for step, each in enumerate(arguments):
        x = torch.randn(SEQUENCE, generator=torch.Generator().manual_seed(step))
        compare(theirs, ours, x, **each)
    with pytest.raises(ValueError, match=r"ema_update_weight must have shape .* got \(5,\)"):
        ours(x, ema_update_weight=torch.ones(5))


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, SEQUENCE),
        ({"codebook_dim": 4}, SEQUENCE),
        ({"heads": 2, "codebook_dim": 4}, SEQUENCE),
        ({"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}, SEQUENCE),
        ({"use_cosine_sim": True, "threshold_ema_dead_code": 2}, SEQUENCE),
        ({"channel_last": False}, (3, DIM, 20)),
    ],
)
def test_statistics_of_codes_chosen_elsewhere(options: dict, shape: tuple) -> None:
    theirs, ours = pair(**options)
    x = torch.randn(shape)
    indices = torch.randint(24, (3, 20, 2)[: 2 + (ours.heads > 1)])
    for module in (theirs, ours):
        torch.manual_seed(1)
        module.update_ema_indices(x, indices)
    same_state(ours, theirs)
    if ours.heads == 1 and not options:
        mask = torch.arange(20) < torch.tensor([[20], [3], [11]])
        for module in (theirs, ours):
            module.update_indices(x, indices.masked_fill(~mask, -1), mask=mask)
        same_state(ours, theirs)
        again = copy.deepcopy(ours)
        again.update_indices(x, indices.masked_fill(~mask, -1))
        ours.update_indices(x, indices, mask=mask)
        same_state(ours, again)


def test_the_codebook_by_hand() -> None:
    theirs, ours = pair(kmeans_init=True, threshold_ema_dead_code=2)
    x = torch.randn(SEQUENCE)
    for module in (theirs, ours):
        torch.manual_seed(1)
        module._codebook.init_embed_(x.reshape(1, -1, DIM))
        module._codebook.cluster_size.mul_(0.5)
        module._codebook.update_ema()
        torch.manual_seed(2)
        module.expire_codes_(x[:1])  # of several sequences, theirs draw from the first alone
    same_state(ours, theirs)
    assert (ours._codebook.codebook_size, ours._codebook.num_codebooks) == (24, 1)
    assert ours.zero == theirs.zero
    with pytest.raises(NotImplementedError, match="third result is the distance"):
        ours._codebook(x)


def test_an_optimizer_in_place_steps_by_hand() -> None:
    theirs, ours = pair(**OPTIONS["optimizer in place, by hand"])
    before = ours.codebook.detach().clone()
    x = torch.randn(SEQUENCE)
    for module in (theirs, ours):
        *_, parts = module(x, return_loss_breakdown=True)
        assert parts.inplace_optimize > 0
    assert torch.equal(ours.codebook, before)
    for module in (theirs, ours):
        module.update_in_place_optimizer()
    assert not torch.equal(ours.codebook, before)
    same_state(ours, theirs)
    again = pickle.loads(pickle.dumps(copy.deepcopy(VectorQuantize(DIM, 8))))
    assert again.in_place_codebook_optimizer is None


def test_what_is_masked_decodes_to_zeros() -> None:
    mask = torch.rand(3, 20) > 0.5
    for options in ({}, {"codebook_dim": 4}, {"heads": 2}, {"heads": 2, "codebook_dim": 3}):
        for apart in (False, True):
            ours = VectorQuantize(DIM, 12, separate_codebook_per_head=apart, **options).eval()
            quantized, indices, _ = ours(torch.randn(SEQUENCE), mask=mask)
            assert torch.equal(quantized[~mask], torch.zeros_like(quantized[~mask]))
            close(ours.get_output_from_indices(indices), quantized)
            codes = ours.get_codes_from_indices(indices)
            assert torch.equal(codes[~mask], torch.zeros_like(codes[~mask]))
            for wrong in (-2, 12):
                with pytest.raises(IndexError):
                    ours.get_codes_from_indices(torch.full_like(indices, wrong))


@pytest.mark.parametrize("apart", [True, False])
def test_masks_of_heads(apart: bool) -> None:
    """Evaluation as theirs; training, where theirs compare other shapes, as without padding."""
    theirs, ours = pair(heads=2, codebook_dim=4, separate_codebook_per_head=apart)
    mask = torch.arange(20) < torch.tensor([[20], [3], [11]])
    x = torch.randn(SEQUENCE)
    theirs.eval(), ours.eval()
    compare(theirs, ours, x, mask=mask)
    ours.train()
    twin = copy.deepcopy(ours)
    quantized, indices, loss = ours(x, mask=mask)
    alone, alone_indices, alone_loss = twin(x[mask].unsqueeze(0))
    close(quantized[mask], alone[0])
    assert torch.equal(indices[mask], alone_indices[0])
    close(loss, alone_loss)
    same_state(ours, twin)


def test_no_rows_and_no_kept_rows() -> None:
    for options in ({}, {"heads": 2, "separate_codebook_per_head": True}):
        theirs, ours = pair(**options, threshold_ema_dead_code=2)
        compare(theirs, ours, torch.randn(0, 20, DIM))
    theirs, ours = pair(threshold_ema_dead_code=2)
    compare(theirs, ours, torch.randn(SEQUENCE), mask=torch.zeros(SEQUENCE[:2], dtype=torch.bool))
    late = VectorQuantize(DIM, 6, kmeans_init=True)
    late(torch.randn(SEQUENCE), mask=torch.zeros(SEQUENCE[:2], dtype=torch.bool))
    assert not late._codebook.initted
    late(torch.randn(SEQUENCE))
    assert late._codebook.initted


NOT_FINITE = {
    "EMA": {},
    "cosine": {"use_cosine_sim": True},
    "k-means": {"kmeans_init": True},
    "dead codes": {"threshold_ema_dead_code": 3},
    "projected": {"codebook_dim": 4, "layernorm_after_project_in": True},
    "heads": {"heads": 2, "codebook_dim": 4, "kmeans_init": True},
    "codebooks by head": {"heads": 2, "separate_codebook_per_head": True, "kmeans_init": True},
    "dead codes, fixed": {"threshold_ema_dead_code": 3, "ema_update": False},
    "optimizer in place": OPTIONS["optimizer in place"],
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", NOT_FINITE)
def test_rows_that_are_not_finite_leave_the_state_alone(name: str, value: float) -> None:
    """As if they were not there: the state is that of the other rows."""
    _, ours = pair(codebook_size=12, **NOT_FINITE[name])
    x = torch.randn(SEQUENCE)
    x[1, 4:, 2] = value  # 16 rows; of heads that are parts of a row, one
    twin = copy.deepcopy(ours)
    for _ in range(3):
        ours(x)
        twin(x, mask=x.isfinite().all(dim=-1))
    assert all(value.isfinite().all() for value in ours.state_dict().values())
    assert not any("skipped_rows" in key for key in ours.state_dict())
    counted = {"codebooks by head": 6 * 16, "optimizer in place": 0}
    assert int(ours.skipped_rows) == counted.get(name, 3 * 16)
    if name in ("EMA", "cosine", "projected", "optimizer in place"):  # nothing is drawn
        same_state(ours, twin)
    else:
        assert (ours.codebook.norm(dim=-1) < 10).all()
    ours(torch.randn(SEQUENCE))


def test_a_step_without_a_finite_row_starts_nothing() -> None:
    ours = VectorQuantize(DIM, 6, kmeans_init=True, threshold_ema_dead_code=2)
    ours(torch.full(SEQUENCE, float("nan")))
    assert not ours._codebook.initted
    assert int(ours.skipped_rows) == 60
    ours(torch.randn(SEQUENCE))
    assert ours._codebook.initted
    assert ours.codebook.isfinite().all()


def test_orthogonal_gradient_is_that_of_the_codes_it_was_computed_with() -> None:
    """Two uses before one backward: EMA moves the codes in between, the gradient stays."""
    _, ours = pair(orthogonal_reg_weight=2.0, commitment_weight=0.0)
    books, losses = [], []
    for step in range(2):
        ours(torch.randn(SEQUENCE), freeze_codebook=True)
        losses.append(ours(torch.randn(SEQUENCE, generator=torch.Generator().manual_seed(step)))[2])
        books.append(ours.codebook.detach().double())
    sum(losses).backward()
    expected = torch.zeros_like(books[0])
    for codes in books:
        codes = codes.clone().requires_grad_()
        cosines = F.normalize(codes, dim=-1) @ F.normalize(codes, dim=-1).T
        (2 * cosines.square().mean()).backward()
        expected += codes.grad
    close(ours._codebook.embed.grad[0], expected.float())


@pytest.mark.parametrize("rotation", [True, False])
def test_second_derivatives(rotation: bool) -> None:
    """Of quantized and loss, with the codes held, against theirs."""
    x = torch.randn(SEQUENCE, generator=torch.Generator().manual_seed(3))
    other, mine = (
        second_derivative(lambda x, module=module: cubes(module(x, freeze_codebook=True)), x)
        for module in pair(rotation_trick=rotation, codebook_dim=4)
    )
    torch.testing.assert_close(mine, other, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("options", [{}, {"rotation_trick": False}, {"codebook_dim": 4}])
def test_function_transforms(options: dict) -> None:
    """Derivatives by torch.func, forward mode too, are autograd's; a batch by vmap is the batch."""
    _, ours = pair(**options, freeze_codebook=True)
    x, along = torch.randn(2, *SEQUENCE).unbind()

    def total(x: torch.Tensor) -> torch.Tensor:
        quantized, _, loss = ours(x)
        return quantized.pow(3).sum() + loss

    a = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(a), a)
    close(torch.func.grad(total)(x), expected)
    _, derivative = torch.func.jvp(total, (x,), (along,))
    close(derivative.float() / 100, (expected * along).sum() / 100)
    close(torch.func.vmap(lambda x: ours(x)[0])(x), ours(x)[0])


def test_compiles_in_one_graph() -> None:
    _, ours = pair(threshold_ema_dead_code=2, heads=2)
    twin = copy.deepcopy(ours)
    x = torch.randn(SEQUENCE, requires_grad=True)
    torch.manual_seed(0)
    quantized, indices, loss = torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
    torch.manual_seed(0)
    other, their_indices, their_loss = twin(x)
    close(quantized, other)
    assert torch.equal(indices, their_indices)
    close(loss, their_loss)
    same_state(ours, twin)


STOCHASTIC = {
    "distance": {},
    "cosine": {"use_cosine_sim": True},
    "codebooks by head": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
    "straight-through": {"straight_through": True, "rotation_trick": False},
}


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_stochastic_codes_have_the_probabilities_of_theirs(name: str, temperature: float) -> None:
    """softmax(-distance / temperature), or of the product by cosine: chi-square over many draws."""
    options = {"stochastic_sample_codes": True, "codebook_size": 7, **STOCHASTIC[name]}
    _, ours = pair(**options, sample_codebook_temp=temperature)
    draws = 20_000
    x = torch.randn(1, 1, DIM)
    torch.manual_seed(3)
    quantized, indices, _ = ours(x.expand(1, draws, DIM), freeze_codebook=True)
    close(quantized, ours.project_out(ours.get_codes_from_indices(indices)))
    rows = ours.project_in(x)[0, 0].double().view(ours._codebook.num_codebooks, -1)
    for head, row in enumerate(rows.detach()):
        codes = ours._codebook.embed[head].double()
        if ours.use_cosine_sim:
            scores = codes @ F.normalize(row, dim=0)
        else:
            scores = -(codes - row).norm(dim=1)
        expected = draws * (scores / temperature).softmax(dim=0)
        drawn = indices[0, :, head] if ours.heads > 1 else indices[0]
        counts = torch.bincount(drawn, minlength=7)
        likely = expected > 5
        statistic = ((counts - expected).square() / expected)[likely].sum()
        assert statistic < 30  # 6 degrees of freedom: by chance once in 25,000
        assert counts[~likely].sum() < 60


def test_stochastic_codes_only_where_asked() -> None:
    _, ours = pair(stochastic_sample_codes=True, sample_codebook_temp=5.0)
    theirs, plain = pair()
    x = torch.randn(SEQUENCE)
    nearest = plain.eval()(x)[1]
    drawn = ours(x, freeze_codebook=True)[1]
    assert not torch.equal(drawn, nearest)
    torch.manual_seed(1)
    first = ours(x, freeze_codebook=True)[1]
    torch.manual_seed(1)
    assert torch.equal(ours(x, freeze_codebook=True)[1], first)  # torch's seed decides
    for module in (ours, theirs):  # a temperature of 0, in a call or by attribute, is none
        compare(theirs, ours, x, sample_codebook_temp=0.0) if module is ours else None
    ours._codebook.sample_codebook_temp = 0.0
    assert torch.equal(ours(x, freeze_codebook=True)[1], theirs.eval()(x)[1])
    ours.eval()
    assert torch.equal(ours(x, sample_codebook_temp=9.0)[1], theirs(x)[1])


def test_stochastic_codes_take_no_row_that_is_not_finite_and_no_row_at_all() -> None:
    _, ours = pair(stochastic_sample_codes=True, kmeans_init=True, codebook_size=6)
    x = torch.randn(SEQUENCE)
    x[0, 1, 2] = float("nan")
    ours(x)
    assert int(ours.skipped_rows) == 1
    assert all(value.isfinite().all() for value in ours.state_dict().values())
    assert ours(torch.randn(0, 20, DIM))[1].shape == (0, 20)


def test_no_matrix_of_logits() -> None:
    rows, codes = 600, 900
    for options in ({}, {"use_cosine_sim": True}):
        ours = VectorQuantize(DIM, codes, stochastic_sample_codes=True, **options)
        with largest_tensor() as largest:
            quantized, _, loss = ours(torch.randn(1, rows, DIM, requires_grad=True))
            (quantized.sum() + loss).backward()
        assert largest.numel < rows * codes / 10


@pytest.mark.parametrize("way", ["assigned", "loaded", "learned"])
def test_by_cosine_the_length_of_codes_counts_as_in_theirs(way: str) -> None:
    """Theirs compare products; codes have length 1 until someone gives them another."""
    options = {"orthogonal_reg_weight": 1.0} if way == "learned" else {}
    theirs, ours = pair(use_cosine_sim=True, **options)
    codes = 3 * torch.rand(24, 1) * theirs.codebook.detach()
    with torch.no_grad():
        theirs.codebook = codes
    if way == "loaded":
        ours.load_state_dict(theirs.state_dict())
    else:
        ours.codebook = codes
    for training in (False, True):
        theirs.train(training), ours.train(training)
        compare(theirs, ours, torch.randn(SEQUENCE))
    theirs.eval(), ours.eval()
    compare(theirs, ours, torch.randn(SEQUENCE))


UNSERVED = {
    "commitment_use_cross_entropy_loss": True,
    "codebook_diversity_loss_weight": 0.5,
    "vq_bridge": torch.nn.Linear(2, 2),
    "affine_param": True,
}


@pytest.mark.parametrize("name", UNSERVED)
def test_unsupported_options_say_so(name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"not support {name}=[^\n]*$"):
        VectorQuantize(DIM, 8, **{name: UNSERVED[name]})


def test_straight_through_without_the_way_past_it_says_so() -> None:
    with pytest.raises(NotImplementedError, match="straight_through=True"):
        VectorQuantize(
            DIM, 8, straight_through=True, rotation_trick=False, route_gradients_to_input=False
        )


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("indices", torch.zeros(1, 2, dtype=torch.int64), "<tensor of shape (1, 2)>"),
        ("topk", 3, "3"),
        ("codebook_transform_fn", torch.nn.Linear(2, 2), "<Linear>"),
    ],
)
def test_unsupported_arguments_say_so(name: str, value: object, shown: str) -> None:
    with pytest.raises(NotImplementedError) as error:
        VectorQuantize(DIM, 8)(torch.randn(1, 2, DIM), **{name: value})
    assert f"does not support {name}={shown}: " in str(error.value)
    assert "\n" not in str(error.value)


def test_every_option_is_known() -> None:
    """Constructor and forward take what theirs take, with the same defaults."""
    for method in ("__init__", "forward"):
        mine = inspect.signature(getattr(VectorQuantize, method)).parameters
        other = inspect.signature(getattr(theirs_module.VectorQuantize, method)).parameters
        assert list(mine) == list(other)
        for name, parameter in other.items():
            assert mine[name].default == parameter.default, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learnable_codebook": True}, "learnable_codebook=True and ema_update=True"),
        (
            {"learnable_codebook": True, "ema_update": False, "use_cosine_sim": True},
            "use_cosine_sim=True",
        ),
        ({"accept_image_fmap": True, "accept_3d_fmap": True}, "accept_3d_fmap"),
        ({"codebook_size": 0}, "codebook_size must be at least 1, got 0"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        (
            {"kmeans_iters": 0, "kmeans_init": True},
            "kmeans_iters must be at least 1, got 0",
        ),
        ({"straight_through": True}, "rotation_trick=True"),
        ({"directional_reparam": True}, "threshold_ema_dead_code=0"),
        (
            {
                "directional_reparam": True,
                "rotation_trick": True,
                "threshold_ema_dead_code": 1,
            },
            "rotation_trick=True",
        ),
        (
            {
                "straight_through": True,
                "rotation_trick": False,
                "learnable_codebook": True,
                "ema_update": False,
            },
            "straight_through=True",
        ),
        ({"sync_update_v": 0.25}, "sync_update_v must be in .* got 0.25"),
        ({"sync_update_v": 2.0, "learnable_codebook": True, "ema_update": False}, "got 2.0"),
        ({"in_place_codebook_optimizer": torch.optim.SGD}, "needs learnable_codebook=True"),
        (
            {
                "heads": 2,
                "separate_codebook_per_head": True,
                "orthogonal_reg_weight": 1.0,
                "orthogonal_reg_active_codes_only": True,
            },
            "separate_codebook_per_head=True",
        ),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VectorQuantize(**{"dim": DIM, "codebook_size": 4, **options})


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (2, 3, DIM + 1), f"{DIM} channels last, got"),
        ({}, (2, 3, 4, DIM), "2 or 3 dimensions"),
        ({"channel_last": False}, (2, 3, DIM), f"{DIM} channels second"),
        ({"accept_image_fmap": True}, (2, 3, DIM), "4 dimensions"),
        ({"accept_3d_fmap": True}, IMAGE, "5 dimensions"),
    ],
)
def test_bad_shapes(options: dict, shape: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VectorQuantize(DIM, 4, **options)(torch.zeros(shape))


def test_bad_masks() -> None:
    x, mask = torch.randn(2, 3, DIM), torch.ones(2, 3, dtype=torch.bool)
    ours = VectorQuantize(DIM, 4)
    with pytest.raises(ValueError, match="exclude each other"):
        ours(x, mask=mask, lens=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"bool of shape \(2, 3\)"):
        ours(x, mask=mask[:1])
    with pytest.raises(ValueError, match=r"torch.float32"):
        ours(x, mask=mask.float())
    with pytest.raises(ValueError, match="for sequences"):
        VectorQuantize(DIM, 4, accept_image_fmap=True)(torch.randn(IMAGE), mask=mask)
