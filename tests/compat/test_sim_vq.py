"""`SimVQ` and `ResidualSimVQ` against vector-quantize-pytorch's own, from the same state."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
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
from torch import Tensor, nn

from tokenflow_ext.compat import ResidualSimVQ, ResidualVQ, SimVQ

theirs_module = pytest.importorskip("vector_quantize_pytorch")

DIM, CODES, LAYERS = 8, 24, 4
SEQUENCE, IMAGE, VOLUME = (3, 20, DIM), (2, DIM, 5, 6), (2, DIM, 2, 3, 4)


def mlp(width: int = DIM, dim: int = DIM) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, dim))


# A new module for each of the two that are compared.
OPTIONS = {
    "defaults": lambda: {},
    "straight-through": lambda: {"rotation_trick": False},
    "few frozen channels": lambda: {"frozen_codebook_dim": 3},
    "transform": lambda: {"codebook_transform": mlp()},
    "transform of many channels": lambda: {
        "codebook_transform": mlp(30),
        "frozen_codebook_dim": 30,
        "rotation_trick": False,
    },
    "uniform": lambda: {"init_fn": lambda codes: codes.uniform_(-1, 1)},
    "weights": lambda: {"commitment_weight": 0.3, "input_to_quantize_commit_loss_weight": 2.0},
    "no loss": lambda: {"commitment_weight": 0.0},
}

RESIDUAL = {
    **OPTIONS,
    "transform": lambda: {"codebook_transform": mlp()},  # one for all layers
    "one layer": lambda: {"num_quantizers": 1, "quantize_dropout": True},
    "dropout": lambda: {"quantize_dropout": True},
    "dropout in pairs": lambda: {
        "quantize_dropout": True,
        "quantize_dropout_cutoff_index": 1,
        "quantize_dropout_multiple_of": 2,
    },
    "dropout beyond the last": lambda: {
        "quantize_dropout": True,
        "quantize_dropout_multiple_of": 3,
    },
}

LAYOUTS = {
    "sequence": (False, SEQUENCE),
    "one token each": (False, (17, DIM)),
    "image, channels last": (False, (2, 5, 6, DIM)),
    "sequence, channels first": (True, (3, DIM, 20)),
    "one token each, channels first": (True, (17, DIM)),
    "image": (True, IMAGE),
    "volume": (True, VOLUME),
}


def both(name: str, options: dict, twin: dict) -> tuple:
    """Theirs and ours in the same state."""
    torch.manual_seed(0)
    theirs = getattr(theirs_module, name)(**options)
    ours = {"SimVQ": SimVQ, "ResidualSimVQ": ResidualSimVQ}[name](**twin)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def pair(**options) -> tuple:
    options = {"dim": DIM, "codebook_size": CODES, **options}
    return both("SimVQ", options, copy.deepcopy(options))


def residual_pair(**options) -> tuple:
    options = {"dim": DIM, "codebook_size": CODES, "num_quantizers": LAYERS, **options}
    return both("ResidualSimVQ", options, copy.deepcopy(options))


def batch(step: int = 0, shape=SEQUENCE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


def learn(*modules: nn.Module) -> None:
    """A step of gradient descent, by the gradients that are there."""
    for module in modules:
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad


def compare_in_float64(theirs: nn.Module, ours: nn.Module, x: Tensor, **arguments) -> tuple:
    """As `compare`, within the rounding of float64; both become float64."""
    x = x.double()
    other, mine = (run(module.double(), x, **arguments) for module in (theirs, ours))
    assert torch.equal(mine[1], other[1])
    assert mine[3].keys() == other[3].keys()
    pairs = [(mine[0], other[0]), (mine[2], other[2])]
    pairs += [(mine[3][name], gradient) for name, gradient in other[3].items()]
    for ours_at, theirs_at in pairs:
        if ours_at is None or theirs_at is None:  # a dropped layer has no gradient
            assert ours_at is theirs_at
            continue
        largest = theirs_at.abs().amax().item() if theirs_at.numel() else 0.0
        torch.testing.assert_close(ours_at, theirs_at, rtol=1e-9, atol=1e-10 * (1 + largest))
    return mine


# ---------------------------------------------------------------------- SimVQ


@pytest.mark.parametrize("name", OPTIONS)
def test_training_and_evaluation_agree(name: str) -> None:
    theirs, ours = pair(**OPTIONS[name]())
    for step in range(4):
        compare(theirs, ours, batch(step))
        learn(theirs, ours)
    theirs.eval(), ours.eval()
    quantized, indices, loss, *_ = compare(theirs, ours, batch(9))
    assert (loss > 0) == (name != "no loss")
    close(ours.codebook, theirs.codebook)
    close(ours.indices_to_codes(indices), theirs.indices_to_codes(indices))
    close(quantized, ours.indices_to_codes(indices))
    compare_in_float64(theirs, ours, batch(10))


@pytest.mark.parametrize("rotation_trick", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, rotation_trick: bool) -> None:
    channel_first, shape = LAYOUTS[name]
    theirs, ours = pair(channel_first=channel_first, rotation_trick=rotation_trick)
    _, indices, *_ = compare(theirs, ours, batch(0, shape))
    codes = ours.indices_to_codes(indices)
    assert codes.shape == shape
    close(codes, theirs.indices_to_codes(indices))


@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    batch_size=st.integers(1, 4),
    space=st.lists(st.integers(1, 7), max_size=3),
    codes=st.integers(1, 70),
    dim=st.integers(1, 20),
    width=st.one_of(st.none(), st.integers(1, 20)),
    layers=st.integers(1, 4),
    channel_first=st.booleans(),
    rotation_trick=st.booleans(),
    weights=st.tuples(st.sampled_from([1.0, 0.1]), st.sampled_from([0.25, 3.0, 0.0])),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_in_float64(
    batch_size: int,
    space: list[int],
    codes: int,
    dim: int,
    width: int | None,
    layers: int,
    channel_first: bool,
    rotation_trick: bool,
    weights: tuple[float, float],
    scale: float,
    seed: int,
) -> None:
    options = {
        "dim": dim,
        "codebook_size": codes,
        "frozen_codebook_dim": width,
        "channel_first": channel_first,
        "rotation_trick": rotation_trick,
        "commitment_weight": weights[0],
        "input_to_quantize_commit_loss_weight": weights[1],
    }
    shape = (batch_size, dim, *space) if channel_first else (batch_size, *space, dim)
    x = scale * batch(seed, shape)
    compare_in_float64(*pair(**options), x)
    compare_in_float64(*residual_pair(**options, num_quantizers=layers), x)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    rows=st.integers(1, 200),
    codes=st.integers(1, 700),
    dim=st.integers(1, 40),
    repeated=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_nearest(rows: int, codes: int, dim: int, repeated: bool, seed: int) -> None:
    torch.manual_seed(seed)
    ours = SimVQ(dim, codes)
    if repeated:
        ours.frozen_codebook.copy_(ours.frozen_codebook[torch.randint(0, codes, (codes,))])
    codebook = ours.codebook.detach()
    x = torch.randn(1, rows, dim) * codebook.abs().amax()
    quantized, indices, _ = ours(x)
    close(quantized[0], codebook[indices[0]])
    nearest_within(indices[0], x[0], codebook)
    # Of codes that are alike, the first.
    alike = (codebook.unsqueeze(1) == codebook).all(dim=-1).int().argmax(dim=1)
    assert torch.equal(ours(codebook.unsqueeze(0))[1][0], alike)


def test_float64_is_searched_as_such() -> None:
    """Codes that differ by 1e-10 are told apart."""
    ours = SimVQ(DIM, CODES, codebook_transform=nn.Identity()).double()
    ours.frozen_codebook.copy_(1 + 1e-10 * torch.arange(CODES).double().unsqueeze(1))
    indices = ours(ours.frozen_codebook.unsqueeze(0) + 4e-11)[1]
    assert torch.equal(indices[0], torch.arange(CODES))


def test_rows_of_zeros_and_rows_that_point_away() -> None:
    """Where no rotation is defined, what theirs give: a row of zeros stays zero."""
    theirs, ours = pair(codebook_size=1)
    x = batch()
    x[0, 3] = 0
    x[1, 5] = -2 * ours.codebook[0].detach()
    quantized, *_ = compare_in_float64(theirs, ours, x)
    assert torch.equal(quantized[0, 3], torch.zeros(DIM, dtype=torch.float64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rotation_trick", [True, False])
def test_rows_that_are_not_finite_touch_no_other(rotation_trick: bool, value: float) -> None:
    theirs, ours = pair(rotation_trick=rotation_trick)
    x = batch()
    x[1, 4, 2] = value
    (other, their_indices, _), (mine, indices, _) = theirs(x), ours(x)
    close(mine, other)
    assert torch.equal(indices, their_indices)
    finite = x.isfinite().all(dim=-1)
    assert indices[1, 4] == 0
    assert torch.equal(mine[finite], ours(batch())[0][finite])


def test_a_transform_that_is_not_finite_says_so() -> None:
    _, ours = pair()
    with torch.no_grad():
        ours.code_transform.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="codebook must be finite"):
        ours(batch())


@pytest.mark.parametrize("name", ["SimVQ", "ResidualSimVQ"])
@pytest.mark.parametrize("transform", [None, mlp])
def test_state_goes_both_ways_and_a_seed_gives_the_same(name: str, transform) -> None:
    build = {"SimVQ": (theirs_module.SimVQ, SimVQ)}.get(
        name, (theirs_module.ResidualSimVQ, ResidualSimVQ)
    )
    modules = []
    for cls in build:
        torch.manual_seed(3)
        options = {"dim": DIM, "codebook_size": CODES, "frozen_codebook_dim": 5}
        options |= {"num_quantizers": 3} if name == "ResidualSimVQ" else {}
        options |= {"codebook_transform": transform(5)} if transform else {}
        modules.append(cls(**options))
    theirs, ours = modules
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    same_state(ours, theirs)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    compare(theirs, ours, batch())
    same_state(pickle.loads(pickle.dumps(ours)), ours)


class Counting(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_codes_are_transformed_once_a_step_and_learn_where_they_are_chosen() -> None:
    transform = Counting(DIM, DIM)
    ours = SimVQ(DIM, CODES, codebook_transform=transform, commitment_weight=0.7).double()
    x = batch().double()
    _, indices, loss = ours(x)
    assert transform.calls == 1
    loss.backward()
    # The mean over all elements of |code - x|^2, by hand.
    chosen = ours.frozen_codebook[indices].flatten(0, 1)
    error = chosen @ transform.weight.T + transform.bias - x.flatten(0, 1)
    expected = 0.7 * 2 * error.T @ chosen / x.numel()
    torch.testing.assert_close(transform.weight.grad, expected.detach(), rtol=1e-10, atol=1e-12)
    assert not ours.frozen_codebook.requires_grad


def test_other_channels_than_dim_by_the_transform() -> None:
    """As theirs, it is the transform that decides."""
    theirs, ours = pair(codebook_transform=mlp(DIM, 5))
    compare(theirs, ours, batch(0, (3, 20, 5)))
    with pytest.raises(ValueError, match=r"5 channels in dimension -1, got torch.float32 \(3, 20"):
        ours(batch())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rotation_trick", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_half_precision_inputs(dtype: torch.dtype, rotation_trick: bool, residual: bool) -> None:
    """Theirs take none; ours compute in float32, and give the dtype of the input."""
    _, ours = (residual_pair if residual else pair)(rotation_trick=rotation_trick)
    x = batch().to(dtype)
    quantized, indices, loss, gradients, _ = run(ours, x)
    exact, their_indices, their_loss, expected, _ = run(ours, x.float())
    assert quantized.dtype == gradients["x"].dtype == dtype
    assert loss.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    if residual:  # what a layer leaves is rounded
        same = (indices == their_indices).all(dim=-1)
        assert same.float().mean() > 0.8
        quantized, exact = quantized[same], exact[same]
    else:
        assert torch.equal(indices, their_indices)
        close(loss, their_loss)
        torch.testing.assert_close(
            gradients["x"].float(), expected["x"], rtol=4 * eps, atol=4 * eps
        )
    torch.testing.assert_close(quantized.float(), exact, rtol=4 * eps, atol=8 * eps)
    halves = ours.to(dtype)(x)
    assert halves[0].dtype == dtype
    assert (halves[1] == their_indices).float().mean() > 0.7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("rotation_trick", [True, False])
def test_autocast(dtype: torch.dtype, half: bool, rotation_trick: bool) -> None:
    theirs, ours = pair(rotation_trick=rotation_trick)
    x = batch().to(dtype) if half else batch()
    with torch.autocast("cpu", dtype):
        (other, their_indices, their_loss), (mine, indices, loss) = theirs(x), ours(x)
        residual = residual_pair()[1](x)
    assert torch.equal(indices, their_indices)
    assert mine.dtype == other.dtype == x.dtype == residual[0].dtype
    assert loss.dtype == their_loss.dtype == residual[2].dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(mine, other, rtol=0, atol=16 * eps)
    torch.testing.assert_close(loss, their_loss, rtol=4 * eps, atol=0)


def test_float64_input_of_a_float32_module() -> None:
    _, ours = pair()
    quantized, indices, loss = ours(batch().double())
    exact, same, their_loss = ours(batch())
    assert quantized.dtype == loss.dtype == torch.float64
    assert torch.equal(indices, same)
    close(quantized.float(), exact)
    close(loss.float(), their_loss)


@pytest.mark.parametrize("residual", [True, False])
def test_the_meta_device(residual: bool) -> None:
    with torch.device("meta"):
        ours = SimVQ(DIM, CODES, channel_first=True)
        if residual:
            ours = ResidualSimVQ(dim=DIM, codebook_size=CODES, num_quantizers=3, channel_first=True)
    quantized, indices, loss = ours(torch.empty(IMAGE, device="meta"))
    assert quantized.is_meta
    assert quantized.shape == IMAGE
    assert indices.shape == ((2, 5, 6, 3) if residual else (2, 5, 6))
    assert loss.shape == ((3,) if residual else ())


def test_init_fn_again_after_the_meta_device() -> None:
    with torch.device("meta"):
        ours = SimVQ(DIM, CODES, init_fn=lambda codes: codes.sign())
    ours.to_empty(device="cpu")
    ours.reset_parameters()
    assert torch.equal(ours.frozen_codebook.abs(), torch.ones(CODES, DIM))


@pytest.mark.parametrize("residual", [True, False])
def test_no_matrix_of_distances(residual: bool) -> None:
    rows, codes = 600, 900
    ours = SimVQ(DIM, codes)
    if residual:
        ours = ResidualSimVQ(dim=DIM, codebook_size=codes, num_quantizers=3)
    with largest_tensor() as largest:
        quantized, indices, loss = ours(torch.randn(1, rows, DIM, requires_grad=True))
        (quantized.sum() + loss.sum()).backward()
        (ours.get_output_from_indices if residual else ours.indices_to_codes)(indices)
    # The codes of all layers side by side, at most.
    assert rows * DIM <= largest.numel <= 3 * codes * DIM < rows * codes / 10


@pytest.mark.parametrize("rotation_trick", [True, False])
@pytest.mark.parametrize("make", [pair, residual_pair])
def test_second_derivatives(make, rotation_trick: bool) -> None:
    other, mine = (
        second_derivative(lambda x, module=module: cubes(module.double()(x)), batch(3).double())
        for module in make(rotation_trick=rotation_trick)
    )
    torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8 * other.abs().max().item())


@pytest.mark.parametrize("rotation_trick", [True, False])
@pytest.mark.parametrize("make", [pair, residual_pair])
def test_function_transforms(make, rotation_trick: bool) -> None:
    """Derivatives by torch.func, forward mode too, are autograd's; a batch by vmap is the batch."""
    _, ours = make(rotation_trick=rotation_trick)
    x, along = torch.randn(2, *SEQUENCE).unbind()

    def total(x: Tensor) -> Tensor:
        quantized, _, loss = ours(x)
        return quantized.pow(3).sum() + loss.sum()

    a = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(a), a)
    close(torch.func.grad(total)(x), expected)
    _, derivative = torch.func.jvp(total, (x,), (along,))
    close(derivative.float() / 100, (expected * along).sum() / 100)
    close(torch.func.vmap(lambda x: ours(x)[0])(x), ours(x)[0])


@pytest.mark.parametrize("make", [pair, residual_pair])
def test_compiles_in_one_graph(make) -> None:
    _, ours = make(channel_first=True)
    x = batch(0, IMAGE).requires_grad_()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    results = []
    for module in (compiled, ours):
        ours.zero_grad()
        quantized, indices, loss = module(x)
        (gradient,) = torch.autograd.grad(quantized.pow(3).sum() + loss.sum(), x)
        results.append((quantized, indices, loss, gradient))
    for mine, eager in zip(*results, strict=True):
        close(mine, eager)


@pytest.mark.parametrize("shape", [(0, 20, DIM), (3, 0, DIM)])
def test_no_rows(shape: tuple) -> None:
    """Theirs take none."""
    _, ours = pair()
    quantized, indices, _ = ours(torch.randn(shape, requires_grad=True))
    assert quantized.shape == shape
    assert indices.shape == shape[:2]
    assert indices.dtype == torch.int64
    assert residual_pair()[1](torch.randn(shape))[1].shape == (*shape[:2], LAYERS)


@pytest.mark.parametrize("channel_first", [True, False])
def test_padding_decodes_to_zeros(channel_first: bool) -> None:
    _, ours = pair(channel_first=channel_first, codebook_transform=mlp())  # with a bias
    indices = torch.randint(CODES, (2, 7))
    indices[0, 3:] = -1
    codes = ours.indices_to_codes(indices)
    codes = codes.mT if channel_first else codes
    assert torch.equal(codes[0, 3:], torch.zeros(4, DIM))
    close(codes[1], ours.codebook[indices[1]])
    for wrong in (-2, CODES):
        with pytest.raises(IndexError):
            ours.indices_to_codes(torch.full((2, 7), wrong))


@pytest.mark.parametrize("name", ["SimVQ", "ResidualSimVQ"])
def test_every_option_is_known(name: str) -> None:
    ours, theirs = (vars(m)[name] for m in (inspect.getmodule(SimVQ), theirs_module))
    for method in ("__init__", "forward"):
        mine = inspect.signature(getattr(ours, method)).parameters
        other = inspect.signature(getattr(theirs, method)).parameters
        assert list(mine) == list(other)
        for option, parameter in other.items():
            assert mine[option].kind == parameter.kind
            if option == "init_fn":
                codes = batch()
                assert mine[option].default(codes) is parameter.default(codes)
            else:
                assert mine[option].default == parameter.default, option


@pytest.mark.parametrize("name", ["SimVQ", "ResidualSimVQ"])
def test_attributes_are_theirs(name: str) -> None:
    theirs, ours = (pair if name == "SimVQ" else residual_pair)()
    public = {key for key in vars(theirs) if not key.startswith("_")} - {"training"}
    public |= {key for key, value in vars(type(theirs)).items() if isinstance(value, property)}
    for key in public - {"codebook_dim", "layers"}:  # theirs raise at codebook_dim
        mine, other = getattr(ours, key), getattr(theirs, key)
        if isinstance(other, Tensor):
            close(mine, other)
        else:
            assert mine == other, key


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="codebook_dim"):
        SimVQ(DIM, CODES, codebook_dim=4)
    with pytest.raises(TypeError, match="shared_codebook"):
        ResidualSimVQ(dim=DIM, codebook_size=CODES, num_quantizers=2, shared_codebook=True)
    with pytest.raises(TypeError, match="mask"):
        pair()[1](batch(), mask=torch.ones(3, 20, dtype=torch.bool))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"codebook_size": 0}, "codebook_size must be at least 1, got 0"),
        ({"frozen_codebook_dim": 0}, "frozen_codebook_dim must be at least 1, got 0"),
        ({"init_fn": lambda codes: codes[:1]}, r"init_fn must return .* \(24, 8\), got \(1, 8\)"),
        ({"init_fn": lambda codes: None}, r"init_fn must return .*, got NoneType"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimVQ(**{"dim": DIM, "codebook_size": CODES, **options})


@pytest.mark.parametrize(
    ("options", "x", "message"),
    [
        ({}, torch.zeros(2, 3, 4), r"8 channels in dimension -1, got torch.float32 \(2, 3, 4\)"),
        ({"channel_first": True}, torch.zeros(SEQUENCE), "8 channels in dimension 1, got"),
        ({}, torch.zeros(DIM), r"at least 2 dimensions .* got torch.float32 \(8,\)"),
        ({}, torch.zeros(2, 3, DIM, dtype=torch.int64), "floating-point .* got torch.int64"),
        (
            {"codebook_transform": nn.Flatten(0)},
            torch.zeros(SEQUENCE),
            r"codebook_transform must return 24 codes \[K, D\], got \(192,\)",
        ),
    ],
)
def test_bad_shapes(options: dict, x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimVQ(DIM, CODES, **options)(x)


# ---------------------------------------------------------------------- ResidualSimVQ


@pytest.mark.parametrize("name", RESIDUAL)
def test_residual_training_and_evaluation_agree(name: str) -> None:
    theirs, ours = residual_pair(**RESIDUAL[name]())
    for step in range(4):
        compare(theirs, ours, batch(step))
        learn(theirs, ours)
    theirs.eval(), ours.eval()
    quantized, indices, losses, *_ = compare(theirs, ours, batch(9))
    assert indices.shape == (*SEQUENCE[:2], ours.num_quantizers)
    assert losses.shape == (ours.num_quantizers,)
    assert (indices >= 0).all()
    close(ours.codebooks, theirs.codebooks)
    close(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))
    close(ours.get_output_from_indices(indices), quantized)
    theirs.train(), ours.train()
    compare_in_float64(theirs, ours, batch(10))


@pytest.mark.parametrize("name", LAYOUTS)
def test_residual_layouts(name: str) -> None:
    channel_first, shape = LAYOUTS[name]
    theirs, ours = residual_pair(channel_first=channel_first)
    *_, [codes] = compare(theirs, ours, batch(0, shape), return_all_codes=True)
    assert codes.shape == (LAYERS, *shape)
    quantized, indices, _, other = theirs(batch(0, shape), return_all_codes=True)
    close(codes, other)
    close(ours.get_output_from_indices(indices), quantized)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", [name for name in RESIDUAL if "dropout" in name])
def test_dropped_layers(name: str, seed: int) -> None:
    theirs, ours = residual_pair(**RESIDUAL[name](), channel_first=True)
    arguments = {"rand_quantize_dropout_fixed_seed": seed, "return_all_codes": True}
    quantized, indices, losses, _, [codes] = compare(theirs, ours, batch(seed, IMAGE), **arguments)
    dropped = (indices == -1).all(dim=0).all(dim=0).all(dim=0)
    assert torch.equal(losses == 0, dropped)
    assert torch.equal(codes[dropped], torch.zeros_like(codes[dropped]))
    few = indices[..., ~dropped]
    close(ours.get_output_from_indices(few), quantized)
    close(ours.get_codes_from_indices(few), theirs.get_codes_from_indices(few))
    # The same layers as those of `ResidualVQ` by the same seed.
    options = RESIDUAL[name]()
    other = ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=LAYERS, **options)
    theirs_dropped = other(batch(), rand_quantize_dropout_fixed_seed=seed)[1] == -1
    assert torch.equal(theirs_dropped.all(dim=0).all(dim=0), dropped)


def test_dropped_layers_by_torchs_seed() -> None:
    theirs, ours = residual_pair(quantize_dropout=True, num_quantizers=9)
    kept = set()
    for seed in range(8):
        results = []
        for module in (theirs, ours):
            torch.manual_seed(seed)
            results.append(module(batch())[1] >= 0)
        assert torch.equal(*results)
        kept.add(int(results[1][0, 0].sum()))
    assert len(kept) > 2


def test_dropped_layers_of_images_with_channels_last() -> None:
    """Theirs take none. As many as of a sequence, and the same numbers."""
    _, ours = residual_pair(quantize_dropout=True)
    x = batch(0, (2, 5, 6, DIM))
    arguments = {"rand_quantize_dropout_fixed_seed": 3}
    quantized, indices, losses = ours(x, **arguments)
    flat, flat_indices, flat_losses = ours(x.flatten(1, 2), **arguments)
    assert 0 < (indices[0, 0, 0] == -1).sum() < LAYERS
    close(quantized.flatten(1, 2), flat)
    assert torch.equal(indices.flatten(1, 2), flat_indices)
    close(losses, flat_losses)


def test_layers_have_codes_of_their_own() -> None:
    _, ours = residual_pair()
    assert ours.codebooks.shape == (LAYERS, CODES, DIM)
    assert (ours.codebook_size, ours.codebook_dim) == (CODES, DIM)
    assert not torch.equal(ours.codebooks[0], ours.codebooks[1])
    _, shared = residual_pair(codebook_transform=mlp())
    assert len({id(layer.code_transform) for layer in shared.layers}) == 1
    assert not torch.equal(shared.codebooks[0], shared.codebooks[1])


def test_residual_heads_say_so() -> None:
    with pytest.raises(NotImplementedError, match=r"ResidualSimVQ does not support heads=2: "):
        ResidualSimVQ(dim=DIM, codebook_size=CODES, num_quantizers=2, heads=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_quantizers": 0}, "num_quantizers must be at least 1, got 0"),
        (
            {"quantize_dropout": True, "quantize_dropout_cutoff_index": 2},
            "quantize_dropout_cutoff_index must be 0 to 1, got 2",
        ),
        (
            {"quantize_dropout": True, "quantize_dropout_multiple_of": 0},
            "quantize_dropout_multiple_of must be at least 1, got 0",
        ),
    ],
)
def test_residual_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResidualSimVQ(**{"dim": DIM, "codebook_size": CODES, "num_quantizers": 2, **options})


def test_residual_bad_shapes() -> None:
    _, ours = residual_pair()
    with pytest.raises(ValueError, match=rf"{DIM} channels in dimension -1"):
        ours(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"only with quantize_dropout\), got \(2, 3, 1\)"):
        ours.get_codes_from_indices(torch.zeros(2, 3, 1, dtype=torch.int64))
    _, dropping = residual_pair(quantize_dropout=True)
    with pytest.raises(ValueError, match=r"must have 4 in the last .* got \(2, 3, 5\)"):
        dropping.get_codes_from_indices(torch.zeros(2, 3, 5, dtype=torch.int64))
    with pytest.raises(IndexError):
        ours.get_codes_from_indices(torch.full((2, 3, LAYERS), -2))
