"""Any mixture of options: what theirs takes, ours takes with the same result, or names the option.

Theirs refuse by assertions and by errors of shapes; there, ours may raise or serve.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from compat.helpers import compare
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from tokenflow_ext import compat

theirs = pytest.importorskip("vector_quantize_pytorch")

DIM, CODES, ROWS = 4, 10, 12

COMMON = {
    "decay": st.sampled_from([0.8, 0.5, 1.0]),
    "commitment_weight": st.sampled_from([1.0, 0.25, 0.0]),
    "kmeans_init": st.booleans(),
    "kmeans_iters": st.sampled_from([0, 1, 4]),
    "rotation_trick": st.sampled_from([None, True, False]),
    "sync_codebook": st.sampled_from([None, False]),
    "sample_codebook_temp": st.sampled_from([0.0, 0.1, 1.0]),
    "orthogonal_reg_weight": st.sampled_from([0.0, 2.0, -1.0]),
    "orthogonal_reg_max_codes": st.sampled_from([None, 5, 50]),
    "orthogonal_reg_active_codes_only": st.booleans(),
}
LAYER = {
    **COMMON,
    "eps": st.sampled_from([1e-5, 1e-2]),
    "freeze_codebook": st.booleans(),
    "sync_kmeans": st.booleans(),
    "use_cosine_sim": st.booleans(),
    "layernorm_after_project_in": st.booleans(),
    "commitment_use_cross_entropy_loss": st.booleans(),
    "codebook_diversity_loss_weight": st.sampled_from([0.0, -1.0, 0.1]),
    "codebook_diversity_temperature": st.sampled_from([100.0, 1.0]),
    "straight_through": st.booleans(),
    "directional_reparam": st.just(False),  # noise after a draw that theirs leave out at times
    "directional_reparam_variance": st.sampled_from([5e-3, 1.0]),
    "sync_affine_param": st.booleans(),
    "ema_update": st.sampled_from([None, True, False]),
    "manual_ema_update": st.booleans(),
    "learnable_codebook": st.sampled_from([None, True, False]),
    "in_place_codebook_optimizer": st.sampled_from([None, lambda p: torch.optim.SGD(p, lr=0.5)]),
    "manual_in_place_optimizer_update": st.booleans(),
    "affine_param": st.booleans(),
    "affine_param_batch_decay": st.sampled_from([0.99, 0.5]),
    "sync_update_v": st.sampled_from([0.0, 0.5]),
    "return_zeros_for_masked_padding": st.booleans(),
    "route_gradients_to_input": st.booleans(),
}
# Of several layers, theirs draw only where a code is dead, so that others draw other rows.
VQ = {
    **LAYER,
    "threshold_ema_dead_code": st.sampled_from([0, 1, 2, -1]),
    "codebook_dim": st.sampled_from([None, 2, DIM]),
    "heads": st.sampled_from([1, 2]),
    "separate_codebook_per_head": st.booleans(),
    "channel_last": st.booleans(),
    "accept_image_fmap": st.booleans(),
    "accept_3d_fmap": st.booleans(),
}
VQ_STEP = {
    "mask": st.booleans(),
    "topk": st.sampled_from([None, 2]),
    "sample_codebook_temp": st.sampled_from([None, 0.0, 0.5]),
    "freeze_codebook": st.sampled_from([None, True, False]),
    "ema_update": st.sampled_from([None, True, False]),
    "accum_ema_update": st.booleans(),
    "ema_update_weight": st.sampled_from([None, lambda sums, counts: counts.clamp(max=1.0)]),
}
RVQ = {
    **LAYER,
    "codebook_dim": st.sampled_from([None, 2]),
    "shared_codebook": st.booleans(),
    "diveq": st.booleans(),
    "quantize_dropout": st.booleans(),
    "quantize_dropout_cutoff_index": st.sampled_from([0, 1]),
    "quantize_dropout_multiple_of": st.sampled_from([1, 2]),
    "implicit_neural_codebook": st.booleans(),
    "mlp_kwargs": st.sampled_from([{}, {"depth": 1}]),
    "beam_size": st.sampled_from([None, 1, 2]),
    "quant_grad_frac": st.sampled_from([0.0, 0.5]),
}
RVQ_STEP = {
    "mask": st.booleans(),
    "return_all_codes": st.booleans(),
    "sample_codebook_temp": st.sampled_from([None, 0.5]),
    "freeze_codebook": st.booleans(),
    "beam_size": st.sampled_from([None, 1]),
    "rand_quantize_dropout_fixed_seed": st.sampled_from([None, 3]),
}
GRVQ = {**RVQ, "groups": st.sampled_from([1, 2])}
GRVQ_STEP = {
    name: RVQ_STEP[name]
    for name in ("mask", "return_all_codes", "sample_codebook_temp", "freeze_codebook")
} | {"indices": st.sampled_from([None, ()])}
SIM = {
    "codebook_transform": st.sampled_from([None, "two layers"]),
    "init_fn": st.sampled_from([lambda codes: codes, lambda codes: 3 * codes + 0.5]),
    "channel_first": st.booleans(),
    "rotation_trick": st.booleans(),
    "input_to_quantize_commit_loss_weight": st.sampled_from([0.25, 0.0, 2.0]),
    "commitment_weight": st.sampled_from([1.0, 0.25, 0.0]),
    "frozen_codebook_dim": st.sampled_from([None, 2, 7]),
}
RSIM = {
    **SIM,
    "heads": st.sampled_from([1, 2]),
    **{name: RVQ[name] for name in RVQ if name.startswith("quantize_dropout")},
}
RSIM_STEP = {
    name: RVQ_STEP[name] for name in ("return_all_codes", "rand_quantize_dropout_fixed_seed")
}
HVQ = {
    **COMMON,
    "shared_codebook": st.booleans(),
    "channel_first": st.booleans(),
    "quant_resi": st.sampled_from([0.5, -0.2, 0.0]),
    "share_quant_resi": st.sampled_from([-1, 0, 1, 2, 9]),
    "nested_dropout": st.sampled_from([0.0, 0.7]),
    "nested_dropout_min_levels": st.sampled_from([1, 2, 9]),
    "accept_image_fmap": st.booleans(),
}
HVQ_STEP = {
    "mask": st.booleans(),
    "sample_codebook_temp": st.sampled_from([None, 0.5]),
    "return_cutoff": st.booleans(),
}


FSQ = {
    "levels": st.sampled_from([[8, 6], (5, 4), [2, 3], [3, 3], [7]]),
    "dim": st.sampled_from([None, 2, 6]),
    "num_codebooks": st.sampled_from([1, 2]),
    "keep_num_codebooks_dim": st.sampled_from([None, True, False]),
    "scale": st.sampled_from([None, 2.0]),
    "allowed_dtypes": st.sampled_from([(torch.float32,), (torch.float64,)]),
    "channel_first": st.booleans(),
    "projection_has_bias": st.booleans(),
    "return_indices": st.booleans(),
    "force_quantization_f32": st.booleans(),
    "preserve_symmetry": st.booleans(),
    "noise_dropout": st.sampled_from([0.0, 0.5]),
    "bound_hard_clamp": st.booleans(),
    "orthogonal_rotation": st.booleans(),
}
RFSQ = {
    **{name: FSQ[name] for name in FSQ if name not in ("channel_first", "preserve_symmetry")},
    "is_channel_first": st.booleans(),
    "soft_clamp_input_value": st.sampled_from([None, 2.0, [1.5]]),
    **{name: RVQ[name] for name in RVQ if name.startswith("quantize_dropout")},
}
LFQ = {
    "dim": st.sampled_from([None, 3, 4]),
    "codebook_size": st.sampled_from([8, 16]),
    "entropy_loss_weight": st.sampled_from([0.1, 1.0, 0.0]),
    "commitment_loss_weight": st.sampled_from([0.0, 0.5]),
    "diversity_gamma": st.sampled_from([1.0, 0.3]),
    "straight_through_activation": st.sampled_from([torch.nn.Identity(), torch.nn.Tanh()]),
    "num_codebooks": st.sampled_from([1, 2]),
    "keep_num_codebooks_dim": st.sampled_from([None, True, False]),
    "codebook_scale": st.sampled_from([1.0, 0.5]),
    "frac_per_sample_entropy": st.sampled_from([1.0, 0.5]),
    "has_projections": st.sampled_from([None, True]),
    "projection_has_bias": st.booleans(),
    "soft_clamp_input_value": st.sampled_from([None, 1.0, 3.0]),
    "cosine_sim_project_in": st.booleans(),
    "cosine_sim_project_in_scale": st.sampled_from([None, 2.0]),
    "channel_first": st.sampled_from([None, True, False]),
    "experimental_softplus_entropy_loss": st.booleans(),
    "entropy_loss_offset": st.sampled_from([5.0, 1.0]),
    "spherical": st.booleans(),
    "force_quantization_f32": st.booleans(),
    "orthogonal_rotation": st.booleans(),
}
LFQ_STEP = {"inv_temperature": st.sampled_from([100.0, 10.0, 1.0])}
RLFQ = {
    **{name: LFQ[name] for name in LFQ if name not in ("dim", "codebook_size", "codebook_scale")},
    **{name: RVQ[name] for name in RVQ if name.startswith("quantize_dropout")},
}


class Lossless(torch.nn.Module):
    """A quantizer without a loss, with one of 0, and with indices where it has none."""

    def __init__(self, quantizer: torch.nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: torch.Tensor, **arguments) -> tuple:
        quantized, indices, *more = self.quantizer(x, **arguments)
        zero = torch.zeros(())
        return quantized, zero if indices is None else indices, zero, *more


def build(library: Any, name: str, options: dict[str, Any]) -> torch.nn.Module:
    module = getattr(library, name)(**copy.deepcopy(options))
    return Lossless(module) if name.endswith("FSQ") else module


@st.composite
def some(draw: DrawFn, options: dict[str, SearchStrategy]) -> dict[str, Any]:
    """A few of the options."""
    names = draw(st.lists(st.sampled_from(sorted(options)), max_size=6, unique=True))
    return {name: draw(options[name]) for name in names}


def check(name: str, options: dict[str, Any], steps: list[dict[str, Any]], shape, space) -> None:
    """Builds both, runs the steps and an evaluation on both."""
    mask = torch.rand(2, *space, generator=torch.Generator().manual_seed(5)) > 0.3
    mask[:, ..., :1] = True
    try:
        torch.manual_seed(0)
        other = build(theirs, name, options)
        probe = build(theirs, name, options)
        probe.load_state_dict(other.state_dict())
        arguments = [
            {**step, "mask": mask if step["mask"] else None} if "mask" in step else step
            for step in steps
        ]
        for step in arguments:
            quantized, _, loss, *_ = probe(torch.randn(shape, requires_grad=True), **step)
            (quantized.sum() + loss.sum()).backward()
        probe.eval()(torch.randn(shape))
    except Exception:
        return  # theirs do not take it
    try:
        ours = build(compat, name, options)
        ours.load_state_dict(other.state_dict())
        for number, step in enumerate(arguments):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(number))
            compare(other, ours, x, **step)
        other.eval(), ours.eval()
        compare(other, ours, torch.randn(shape))
    except NotImplementedError as error:
        message = str(error)
    else:
        return
    found = re.fullmatch(r"\w+ does not support (\w+)=[^\n]+", message)
    assert found, message
    assert any(given.get(found[1]) for given in (options, *steps)), message


def sound_gradients(options: dict[str, Any]) -> dict[str, Any]:
    """With an orthogonal loss of a copy of the codes: else a second use of the codebook in a graph
    moves them under theirs, whose gradient is then that of neither."""
    return {**options, "orthogonal_reg_active_codes_only": True}


def drawn_in_their_order(options: dict[str, Any]) -> bool:
    """Whether both draw the same rows: theirs order several heads of one codebook otherwise."""
    return options.get("heads", 1) == 1 or options.get("separate_codebook_per_head", False)


SETTINGS = settings(
    deadline=None,
    max_examples=50,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much],
)


@SETTINGS
@given(options=some(VQ), steps=st.lists(some(VQ_STEP), min_size=1, max_size=2))
def test_vector_quantize(options: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    if not drawn_in_their_order(options):
        options.pop("kmeans_init", None), options.pop("threshold_ema_dead_code", None)
    shape, space = (2, ROWS, DIM), (ROWS,)
    if options.get("accept_image_fmap"):
        shape = (2, DIM, 3, 4)
    elif options.get("accept_3d_fmap"):
        shape = (2, DIM, 2, 3, 2)
    elif not options.get("channel_last", True):
        shape = (2, DIM, ROWS)
    check("VectorQuantize", {"dim": DIM, "codebook_size": CODES, **options}, steps, shape, space)


@SETTINGS
@given(options=some(RVQ), steps=st.lists(some(RVQ_STEP), min_size=1, max_size=2))
def test_residual_vq(options: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    options = {"dim": DIM, "codebook_size": CODES, "num_quantizers": 3, **options}
    options.pop("kmeans_init", None)  # codes of a single row leave rounding errors to quantize
    options.pop("freeze_codebook", None)  # theirs override it in every call
    check("ResidualVQ", sound_gradients(options), steps, (2, ROWS, DIM), (ROWS,))


@SETTINGS
@given(options=some(GRVQ), steps=st.lists(some(GRVQ_STEP), min_size=1, max_size=2))
def test_grouped_residual_vq(options: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    options = {"dim": DIM, "codebook_size": CODES, "num_quantizers": 3, "groups": 2, **options}
    options.pop("kmeans_init", None)
    options.pop("freeze_codebook", None)
    check("GroupedResidualVQ", sound_gradients(options), steps, (2, ROWS, DIM), (ROWS,))


def sim(options: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Options with the module that they ask for, and the shape of an input."""
    options = {"dim": DIM, "codebook_size": CODES, **options}
    if options.get("codebook_transform"):
        width = options.get("frozen_codebook_dim") or DIM
        torch.manual_seed(1)
        layers = torch.nn.Linear(width, 6), torch.nn.GELU(), torch.nn.Linear(6, DIM)
        options["codebook_transform"] = torch.nn.Sequential(*layers)
    return options, (2, DIM, ROWS) if options.get("channel_first") else (2, ROWS, DIM)


@SETTINGS
@given(options=some(SIM), steps=st.lists(st.just({}), min_size=1, max_size=2))
def test_sim_vq(options: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    options, shape = sim(options)
    check("SimVQ", options, steps, shape, (ROWS,))


@SETTINGS
@given(options=some(RSIM), steps=st.lists(some(RSIM_STEP), min_size=1, max_size=2))
def test_residual_sim_vq(options: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    options, shape = sim({"num_quantizers": 3, **options})
    check("ResidualSimVQ", options, steps, shape, (ROWS,))


@SETTINGS
@given(options=some(HVQ), steps=st.lists(some(HVQ_STEP), min_size=1, max_size=2))
def test_hierarchical_vq(options: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    options = {
        "dim": DIM,
        "codebook_size": CODES,
        "threshold_ema_dead_code": 0,
        **options,
        "kmeans_init": False,  # the first level has fewer rows than codes
    }
    images = options.get("accept_image_fmap", False)
    space = (4, 4) if images else (8,)
    shape = (2, DIM, *space) if options.get("channel_first", True) else (2, *space, DIM)
    scales = (1, 2, 4) if images else (1, 3, 8)
    check("HierarchicalVQ", {**sound_gradients(options), "scales": scales}, steps, shape, space)


def laid_out(width: int, channel_first: bool, image: bool) -> tuple[int, ...]:
    """The shape of an input of so many channels."""
    if image:
        return (2, width, 3, 4)
    return (2, width, ROWS) if channel_first else (2, ROWS, width)


@SETTINGS
@given(options=some(FSQ), image=st.booleans())
def test_fsq(options: dict[str, Any], image: bool) -> None:
    options = {"levels": [8, 6], **options}
    width = options.get("dim") or len(options["levels"]) * options.get("num_codebooks", 1)
    check(
        "FSQ", options, [{}], laid_out(width, options.get("channel_first", False), image), (ROWS,)
    )


@SETTINGS
@given(options=some(RFSQ), steps=st.lists(some(RSIM_STEP), min_size=1, max_size=2))
def test_residual_fsq(options: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    options = {"levels": [8, 6], "num_quantizers": 3, **options}
    width = options.get("dim") or len(options["levels"])
    shape = laid_out(width, options.get("is_channel_first", False), False)
    check("ResidualFSQ", options, steps, shape, (ROWS,))


@SETTINGS
@given(options=some(LFQ), steps=st.lists(some(LFQ_STEP), min_size=1, max_size=2), i=st.booleans())
def test_lfq(options: dict[str, Any], steps: list[dict[str, Any]], i: bool) -> None:
    options = {"codebook_size": 8, **options}
    width = (options["codebook_size"].bit_length() - 1) * options.get("num_codebooks", 1)
    shape = laid_out(options.get("dim") or width, bool(options.get("channel_first")), i)
    check("LFQ", options, steps, shape, (ROWS,))


@SETTINGS
@given(options=some(RLFQ), steps=st.lists(some(RSIM_STEP), min_size=1, max_size=2), i=st.booleans())
def test_residual_lfq(options: dict[str, Any], steps: list[dict[str, Any]], i: bool) -> None:
    options = {"dim": DIM, "codebook_size": 16, "num_quantizers": 3, **options}
    if i or options.get("channel_first"):
        options.pop("quantize_dropout", None)  # theirs fails at that
    check(
        "ResidualLFQ", options, steps, laid_out(DIM, bool(options.get("channel_first")), i), (ROWS,)
    )
