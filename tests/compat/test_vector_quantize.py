"""`VectorQuantize` against vector-quantize-pytorch's own, from the same state."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from compat.helpers import close, compare, largest_tensor, nearest_within, run, same_state
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
    codes = theirs.get_codes_from_indices(indices)
    if "heads" in options:  # theirs leave them apart, where the projection cannot take them
        codes = codes.flatten(-2)
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


def test_no_matrix_of_distances() -> None:
    rows, codes = 600, 900
    for options in ({}, {"use_cosine_sim": True}, {"orthogonal_reg_weight": 1.0}):
        ours = VectorQuantize(DIM, codes, threshold_ema_dead_code=2, kmeans_init=True, **options)
        with largest_tensor() as largest:
            quantized, _, loss = ours(torch.randn(1, rows, DIM, requires_grad=True))
            (quantized.sum() + loss).backward()
        assert 0 < largest.numel <= 2 * max(rows, codes) * DIM
        assert largest.numel < rows * codes


UNSERVED = {
    "separate_codebook_per_head": True,
    "sync_kmeans": False,
    "commitment_use_cross_entropy_loss": True,
    "codebook_diversity_loss_weight": 0.5,
    "stochastic_sample_codes": True,
    "straight_through": True,
    "directional_reparam": True,
    "sync_codebook": False,
    "sync_affine_param": True,
    "vq_bridge": torch.nn.Linear(2, 2),
    "manual_ema_update": True,
    "in_place_codebook_optimizer": torch.optim.SGD,
    "manual_in_place_optimizer_update": True,
    "affine_param": True,
    "sync_update_v": 0.25,
}


@pytest.mark.parametrize("name", UNSERVED)
def test_unserved_options_say_so(name: str) -> None:
    with pytest.raises(NotImplementedError) as error:
        VectorQuantize(DIM, 8, **{name: UNSERVED[name]})
    assert f"{name}={UNSERVED[name]!r}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("indices", torch.zeros(1, 2, dtype=torch.int64)),
        ("topk", 3),
        ("sample_codebook_temp", 0.5),
        ("codebook_transform_fn", torch.sin),
        ("ema_update_weight", torch.ones(1, 8)),
        ("accum_ema_update", True),
        ("ema_update", True),
    ],
)
def test_unserved_arguments_say_so(name: str, value: object) -> None:
    with pytest.raises(NotImplementedError, match=f"{name}="):
        VectorQuantize(DIM, 8)(torch.randn(1, 2, DIM), **{name: value})


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
        ({"learnable_codebook": True}, "learnable_codebook=True excludes"),
        (
            {"learnable_codebook": True, "ema_update": False, "use_cosine_sim": True},
            "use_cosine_sim=True",
        ),
        ({"accept_image_fmap": True, "accept_3d_fmap": True}, "accept_3d_fmap"),
        ({"codebook_size": 0}, "codebook_size must be at least 1, got 0"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"kmeans_iters": 0}, "kmeans_iters must be at least 1, got 0"),
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
        ({}, (0, 3, DIM), "size 0"),
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
    with pytest.raises(NotImplementedError, match="heads=2"):
        VectorQuantize(DIM, 4, heads=2, codebook_dim=4)(x, mask=mask)
    with pytest.raises(ValueError, match="for sequences"):
        VectorQuantize(DIM, 4, accept_image_fmap=True)(torch.randn(IMAGE), mask=mask)
