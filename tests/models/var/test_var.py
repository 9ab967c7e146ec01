"""VAR: logits, losses and tokens re-derived, released weights, generation, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import image_tokenizer
from var_models import CLASSES, CODES, SCALES, TOKENS, build, tokens, var_tokenizer

from tokenflow_ext.models import (
    VAR,
    ConfigError,
    VarConfig,
)
from tokenflow_ext.models.metrics import to_uint8
from tokenflow_ext.models.var.transformer import attend_by_scale, drop_path

# -- the model written out ------------------------------------------------------------------------


def f_hat_inputs(tokenizer, indices):
    """f^ before each later scale at that scale's size, [B, L - 1, C], from the weights alone."""
    quantizer, scales = tokenizer.quantizer, tokenizer.config.quantizer.scales
    table, side = quantizer.codebooks[0], scales[-1]  # in float32, as ours
    total, start, rows = 0.0, 0, []
    for number, own in enumerate(scales[:-1]):
        grid = table[indices[:, start : start + own * own]].mT.unflatten(2, (own, own))
        start += own * own
        up = F.interpolate(grid, (side, side), mode="bicubic") if own != side else grid
        phi = quantizer.phis.qresi_ls[0 if number < 2 else 1]
        convolved = F.conv2d(up, phi.weight, phi.bias, padding=1)
        total = total + 0.5 * up + 0.5 * convolved
        rows.append(F.adaptive_avg_pool2d(total, scales[number + 1]).flatten(2).mT)
    return torch.cat(rows, dim=1).double()


def derived(model, labels, indices, state=None):
    """Logits by the description, in float64, with a mask over the whole sequence."""
    config = model.config
    if state is None:
        state = {key: value.double() for key, value in model.state_dict().items()}
    width, heads = config.channels, config.attention_heads

    def layer_norm(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def silu(x):
        return x / (1 + (-x).exp())

    level = torch.cat([torch.full((s * s,), i) for i, s in enumerate(config.scales)])
    embedded = state["class_emb.weight"][labels]
    first = embedded[:, None] + state["pos_start"]
    later = linear("word_embed", f_hat_inputs(model.tokenizer, indices))
    x = torch.cat([first, later], 1) + state["lvl_embed.weight"][level] + state["pos_1LC"]
    hidden_from = level[:, None] < level[None, :]
    for i in range(config.depth):
        block = f"blocks.{i}"
        if config.shared_adaln:
            rows = linear("shared_ada_lin.1", silu(embedded)).view(-1, 6, width)
            rows = rows + state[f"{block}.ada_gss"][0]
        else:
            rows = linear(f"{block}.ada_lin.1", silu(embedded)).view(-1, 6, width)
        g1, g2, s1, s2, b1, b2 = (rows[:, None, j] for j in range(6))
        seen = layer_norm(x) * (s1 + 1) + b1
        qkv = seen @ state[f"{block}.attn.mat_qkv.weight"].T
        q, k, v = (qkv[..., j * width : (j + 1) * width] for j in range(3))
        q, v = q + state[f"{block}.attn.q_bias"], v + state[f"{block}.attn.v_bias"]
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        if config.l2_attention:
            own = state[f"{block}.attn.scale_mul_1H11"]
            own = torch.minimum(own, torch.tensor(math.log(100.0))).exp()
            q = q / q.norm(dim=-1, keepdim=True) * own
            k = k / k.norm(dim=-1, keepdim=True)
            scores = q @ k.mT
        else:
            scores = q @ k.mT * 0.25 / math.sqrt(width // heads)
        out = scores.masked_fill(hidden_from, -math.inf).softmax(-1) @ v
        x = x + linear(f"{block}.attn.proj", out.transpose(1, 2).flatten(2)) * g1
        seen = layer_norm(x) * (s2 + 1) + b2
        inner = linear(f"{block}.ffn.fc1", seen)
        inner = (
            0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        )
        x = x + linear(f"{block}.ffn.fc2", inner) * g2
    scale, shift = linear("head_nm.ada_lin.1", silu(embedded)).view(-1, 2, width).unbind(1)
    return linear("head", layer_norm(x) * (scale[:, None] + 1) + shift[:, None])


KINDS = {
    "plain": {},
    "shared": {"shared_adaln": True},
    "scaled": {"l2_attention": False},
    "narrow": {"mlp_ratio": 1.5, "heads": 2, "depth": 3},
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_and_loss_are_those_written_out(kind):
    model = build(**KINDS[kind])
    labels, indices = torch.tensor([0, 4, CLASSES]), tokens(3)
    out = model(labels, indices)
    expected = derived(model, labels, indices)
    torch.testing.assert_close(out.logits, expected, rtol=1e-5, atol=1e-5)
    loss = -expected.log_softmax(-1).gather(2, indices[..., None]).mean()
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(model.logits(labels, indices), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_label_is_no_class():
    model = build()
    none = torch.full((2,), CLASSES)
    assert torch.equal(model.logits(None, tokens(2)), model.logits(none, tokens(2)))


@torch.no_grad()
def test_over_two_codebooks():
    """TokenFlow's tokenizer in the place of VAR's: a token depends on the class and on earlier
    scales alone."""
    model = build(tokenizer=image_tokenizer())
    indices = tokens(1, model=model)
    before = model.logits(torch.tensor([1]), indices)
    changed = indices.clone()
    changed[:, 5:14] = (changed[:, 5:14] + 1) % model.config.codebook_size  # the third scale
    after = model.logits(torch.tensor([1]), changed)
    assert torch.equal(before[:, :14], after[:, :14])
    assert not torch.allclose(before[:, 14:], after[:, 14:])


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from([None, 1.0]),
)
@settings(max_examples=40, deadline=None)
def test_attention_by_scale_is_attention_with_a_mask(sides, heads, batch, scale):
    ends = torch.tensor([side * side for side in sides]).cumsum(0).tolist()
    generator = torch.Generator().manual_seed(len(ends))
    shape = (batch, heads, ends[-1], 4)
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    )
    seen = (
        torch.arange(ends[-1])[None]
        < torch.tensor([end for end in ends for _ in range(end - ([0, *ends])[ends.index(end)])])[
            :, None
        ]
    )
    expected = F.scaled_dot_product_attention(query, key, value, seen, scale=scale)
    found = attend_by_scale(query, key, value, ends, scale)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (found, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# -- training -------------------------------------------------------------------------------------


def test_gradients_reach_everything_but_the_tokenizer():
    model = build(shared_adaln=True).train()
    model(torch.tensor([0, 1]), tokens(2)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    assert all(p.grad is None for p in model.tokenizer.parameters())
    assert not any(key.startswith("tokenizer") for key in model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_written_out(kind):
    model = build(**KINDS[kind], class_drop=0.0, drop_path=0.0).train()
    labels, indices = torch.tensor([0, 4, CLASSES]), tokens(3)
    parameters = dict(model.named_parameters())
    model(labels, indices).loss.backward()
    found = {name: value.grad.clone() for name, value in parameters.items()}
    expected = derived(model, labels, indices, {**dict(model.named_buffers()), **parameters})
    loss = -expected.log_softmax(-1).gather(2, indices[..., None]).mean()
    for (name, own), gradient in zip(
        found.items(), torch.autograd.grad(loss, list(parameters.values())), strict=True
    ):
        torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_classes_are_dropped_in_training_alone():
    model = build(class_drop=1.0, drop_path=0.0)
    labels, indices = torch.tensor([0, 1]), tokens(2)
    with torch.no_grad():
        none = model.logits(None, indices)
        own = model.logits(labels, indices)
        assert not torch.allclose(own, none)
        assert torch.equal(model.train().logits(labels, indices), none)


def test_branches_are_dropped_in_training_alone():
    x = torch.ones(4000, 2, 3)
    torch.manual_seed(0)
    found = drop_path(x, 0.25)
    rows = found[:, 0, 0]
    assert torch.equal(found, rows[:, None, None].expand(-1, 2, 3))
    assert sorted(set(rows.tolist())) == [0.0, pytest.approx(1 / 0.75)]
    assert rows.mean().item() == pytest.approx(1, abs=0.05)
    assert drop_path(x, 0.0) is x
    model = build(depth=3, drop_path=0.6)
    assert [block.drop_path for block in model.blocks] == pytest.approx([0.0, 0.3, 0.6])
    with torch.no_grad():
        first, second = (model.logits(None, tokens(4)) for _ in range(2))
        assert torch.equal(first, second)
        model.train()
        assert not torch.equal(model.logits(None, tokens(4)), first)


def test_checkpointing_changes_no_gradient():
    gradients = []
    for again in (False, True):
        model = build(drop_path=0.5).train()
        for block in model.blocks:
            block.checkpointing = again
        torch.manual_seed(7)
        model(torch.tensor([0, 1, 2]), tokens(3)).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_initial_values():
    tokenizer = var_tokenizer()
    torch.manual_seed(0)
    model = VAR(VarConfig.for_tokenizer(tokenizer, depth=3, width=192, classes=9), tokenizer)
    deviation = math.sqrt(1 / (3 * 192))
    expected = {
        "class_emb.weight": deviation,
        "pos_1LC": deviation,
        "blocks.1.attn.mat_qkv.weight": deviation,
        "blocks.1.attn.proj.weight": deviation / math.sqrt(6),
        "blocks.2.ffn.fc2.weight": deviation / math.sqrt(6),
        "head.weight": 0.02 * deviation,
        "head_nm.ada_lin.1.weight": 0.5 * deviation,
    }
    state = model.state_dict()
    for name, wanted in expected.items():
        assert state[name].std().item() == pytest.approx(wanted, rel=0.1), name
    rows = state["blocks.0.ada_lin.1.weight"].view(6, 192, 192)
    assert rows[:2].std().item() == pytest.approx(1e-5 * deviation, rel=0.1)
    assert rows[2:].std().item() == pytest.approx(0.5 * deviation, rel=0.1)
    assert torch.equal(state["blocks.0.attn.scale_mul_1H11"], torch.full((1, 3, 1, 1), math.log(4)))
    assert all(not state[name].any() for name in state if name.endswith("bias"))


def test_half_precision_stays_near_full_precision():
    model = build(torch.float32)
    labels, indices = torch.tensor([0, 1]), tokens(2)
    with torch.no_grad():
        full = model.logits(labels, indices)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model.logits(labels, indices)
        half = model.to(torch.bfloat16).logits(labels, indices)
    for other in (mixed, half):
        assert other.dtype == torch.float32  # the head's
        assert (other - full).abs().max() < 0.1 * full.abs().max()


# -- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@torch.no_grad()
def test_greedy_tokens_are_those_without_a_cache(guidance):
    """The cache, the two halves and the guidance, against whole runs of the description."""
    model = build()
    labels = torch.tensor([3, 0])
    found = model.generate_tokens(labels, guidance=guidance, top_k=1, top_p=0.0, seed=1)
    none = torch.full_like(labels, CLASSES)
    start = 0
    for number, side in enumerate(SCALES):
        end = start + side * side
        t = guidance * number / (len(SCALES) - 1)
        logits = (1 + t) * derived(model, labels, found) - t * derived(model, none, found)
        own = logits[:, start:end]
        chosen = own.gather(2, found[:, start:end, None])[..., 0]
        torch.testing.assert_close(chosen, own.max(2).values, rtol=1e-4, atol=1e-4)
        start = end


def test_the_tokens_so_far_are_told_after_each_scale():
    model, told = build(), []
    found = model.generate_tokens(torch.tensor([3, 0]), seed=1, on_scale=told.append)
    assert [part.shape[1] for part in told] == [1, 5, 14, 30]
    assert all(torch.equal(part, found[:, : part.shape[1]]) for part in told)
    images, told = model.generate(torch.tensor([3, 0]), seed=1, on_scale=told.append), told[:4]
    assert torch.equal(images, to_uint8(model.tokenizer.decode(told[-1])[0]))


@torch.no_grad()
def test_the_first_scales_are_drawn_by_their_probabilities():
    model = build(seed=4)
    labels = torch.full((6000,), 2)
    found = model.generate_tokens(labels, guidance=0.0, top_k=0, top_p=0.0, seed=5)
    expected = derived(model, labels[:1], found[:1])[0, 0].softmax(-1)
    counts = torch.bincount(found[:, 0], minlength=CODES) / len(found)
    assert (counts - expected).abs().max() < 4 * (0.25 / len(found)) ** 0.5


@torch.no_grad()
def test_an_image_depends_on_its_seed_and_class_alone():
    model = build()
    labels = torch.tensor([0, 1, 2, 3])
    together = model.generate_tokens(labels, seed=[5, 6, 7, 8])
    for i in range(4):
        alone = model.generate_tokens(labels[i : i + 1], seed=[5 + i])
        assert torch.equal(alone[0], together[i])
    assert torch.equal(model.generate_tokens(labels, seed=5), together)
    assert not torch.equal(model.generate_tokens(labels, seed=50), together)


@torch.no_grad()
def test_images():
    model = build(torch.float32)
    images = model.generate(torch.tensor([1, 2]), seed=0)
    assert images.shape == (2, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert model.generate(None, count=3, seed=0, guidance=0.0).shape == (3, 3, 16, 16)
    # No class is class number `classes`.
    none = torch.full((3,), CLASSES)
    assert torch.equal(
        model.generate_tokens(none, seed=0), model.generate_tokens(None, count=3, seed=0)
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"guidance": -1.0}, ValueError, "guidance must be 0 or more"),
        ({"count": 2}, ValueError, "count is for images without labels"),
        ({"top_k": (3, 4)}, ValueError, "top_k"),
        ({"seed": [1, 2, 3]}, ValueError, "seed must be one number or 2"),
        ({"cuda_graphs": True}, ValueError, "cuda_graphs needs the model on CUDA"),
        ({"temperatur": 1.0}, TypeError, "temperatur"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        build().generate_tokens(torch.tensor([0, 1]), **options)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, CLASSES + 1]), ValueError, rf"labels must be in \[0, {CLASSES}\]"),
        (torch.tensor([-1, 0]), ValueError, "labels must be in"),
        (torch.tensor([0.0, 1.0]), TypeError, r"labels must be \[B\] int64"),
        (torch.tensor([[0, 1]]), TypeError, r"labels must be \[B\] int64"),
        ([0, 1], TypeError, "got list"),
        (torch.tensor([0]), ValueError, "labels are 1, and there are 2 images"),
    ],
)
def test_bad_labels(labels, error, message):
    with pytest.raises(error, match=message):
        build()(labels, tokens(2))


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (tokens(2)[:, 1:], ValueError, rf"indices must be \[B, {TOKENS}\]"),
        (tokens(2).float(), TypeError, "indices must be int64"),
        (tokens(2) + CODES, ValueError, rf"indices must be in \[0, {CODES}\)"),
    ],
)
def test_bad_indices(indices, error, message):
    with pytest.raises(error, match=message):
        build()(torch.tensor([0, 1]), indices)


# -- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "var.depth must be positive"),
        ({"scales": (2, 3)}, "begin with 1"),
        ({"scales": ()}, "begin with 1"),
        ({"heads": 3}, "must be a multiple of var.heads"),
        ({"class_drop": 1.5}, r"var.class_drop must be within \[0, 1\]"),
        ({"drop_path": 1.0}, "var.drop_path must be below 1"),
        ({"mlp_ratio": math.nan}, "var.mlp_ratio"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ConfigError, match=message):
        VarConfig(**{"depth": 2, "width": 32, "heads": 4, **changes})


def test_presets_are_the_released_shapes():
    config = VarConfig.preset("d16")
    assert (config.channels, config.attention_heads, config.image_tokens) == (1024, 16, 680)
    assert config.drop_path_of(15) == pytest.approx(0.1 * 16 / 24)
    large = VarConfig.preset("d36", classes=10)
    assert (large.channels, large.shared_adaln, large.classes) == (2304, True, 10)
    assert sum(s * s for s in large.scales) == large.image_tokens == 2240
    assert VarConfig.from_dict(large.to_dict()) == large
    with pytest.raises(ConfigError, match="preset must be one of d16, d20, d24, d30, d36"):
        VarConfig.preset("d17")


def test_a_tokenizer_that_does_not_fit():
    tokenizer = var_tokenizer()
    for name, value in (("codebook_size", 33), ("feature_dim", 15), ("scales", (1, 2, 4))):
        config = VarConfig.for_tokenizer(tokenizer, depth=1, width=8, heads=1).to_dict()
        with pytest.raises(ConfigError, match=f"{name} is .* in the configuration"):
            VAR(VarConfig.from_dict({**config, name: value}), tokenizer)


# -- smoothed sampling ----------------------------------------------------------------------------


def smooth_by_hand(model, labels, guidance, seeds):
    """f^ [B, C, S, S] of the mixes, by the description, with torch's own Gumbel noise."""
    scales, quantizer = model.config.scales, model.tokenizer.quantizer
    table, side = quantizer.codebooks[0].double(), scales[-1]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    state, f_hat, inputs = model.state_dict(), 0.0, []
    for number, own in enumerate(scales):
        # The whole sequence anew, with inputs of the mixes in the place of tokens' codes.
        logits = []
        for classes in (labels, torch.full_like(labels, model.config.classes)):
            embedded, condition = model.condition(classes)
            x = model.first_input(embedded)
            if inputs:
                x = torch.cat([x, model.image_inputs(torch.cat(inputs, 1), 1)], 1)
            ends = [sum(s * s for s in scales[: i + 1]) for i in range(number + 1)]
            for block in model.blocks:
                x = block(x, condition, ends)
            logits.append(model.scores(x, embedded)[:, -own * own :])
        ratio = number / (len(scales) - 1)
        t = guidance * ratio
        mixed = (1 + t) * logits[0] - t * logits[1]
        uniform = [-torch.empty_like(row).exponential_(generator=g).log() for row, g in
                   zip(mixed, generators, strict=True)]  # fmt: skip
        scaled = ((1 + ratio) * mixed + torch.stack(uniform)) / max(
            0.27 * (1 - 0.95 * ratio), 0.005
        )
        rows = scaled.softmax(-1) @ table
        grid = rows.mT.unflatten(2, (own, own)).float()
        up = F.interpolate(grid, (side, side), mode="bicubic") if own != side else grid
        phi = quantizer.phis.qresi_ls[0 if number < 2 else 1]
        f_hat = f_hat + 0.5 * up + 0.5 * F.conv2d(up, phi.weight, phi.bias, padding=1)
        if number + 1 < len(scales):
            pooled = F.adaptive_avg_pool2d(f_hat, scales[number + 1])
            inputs.append(pooled.flatten(2).mT.to(state["head.weight"].dtype))
    return f_hat


@pytest.mark.parametrize("guidance", [0.0, 2.5])
@torch.no_grad()
def test_smoothed_sampling_is_that_written_out(guidance, monkeypatch):
    model = build()
    seen = []
    decode = model.tokenizer.decode_features
    monkeypatch.setattr(
        model.tokenizer, "decode_features", lambda f: seen.append(f) or decode(f), raising=True
    )
    labels = torch.tensor([0, 3])
    images = model.generate(labels, guidance=guidance, seed=[11, 7], more_smooth=True)
    expected = smooth_by_hand(model, labels, guidance, [11, 7])
    torch.testing.assert_close(seen[0].float(), expected.float(), rtol=1e-4, atol=1e-4)
    again = model.generate(labels[1:], guidance=guidance, seed=7, more_smooth=True)
    assert (again[0].int() - images[1].int()).abs().max() <= 1  # whatever the batch
    plain = model.generate(labels, guidance=guidance, seed=[11, 7])
    assert not torch.equal(plain, images)


@torch.no_grad()
def test_smoothed_sampling_over_two_codebooks():
    model = build(tokenizer=image_tokenizer(), dtype=torch.float32)
    images = model.generate(torch.tensor([1, 2]), seed=0, more_smooth=True)
    assert images.dtype == torch.uint8
    assert len(images) == 2


# -- attention, classes ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # said once
@torch.no_grad()
def test_flex_attention_agrees():
    model = build(torch.float32, width=64, heads=4)
    other = VAR(model.config, model.tokenizer, attention="flex")
    other.load_state_dict(model.state_dict())
    labels, indices = torch.tensor([0, CLASSES, 2]), tokens(3)
    found = other.eval().logits(labels, indices)
    torch.testing.assert_close(found, model.logits(labels, indices), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="attention must be"):
        VAR(model.config, model.tokenizer, attention="mask")


def test_other_classes():
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        none = model.logits(None, tokens(1))
    model.replace_classes(["ant", "bee"])
    assert (model.config.classes, model.config.class_names) == (2, ("ant", "bee"))
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        if key != "class_emb.weight":
            assert torch.equal(after[key], value), key
    assert after["class_emb.weight"].shape == (3, model.config.channels)
    assert after["class_emb.weight"].dtype == torch.float64
    with torch.no_grad():
        assert torch.equal(model.logits(None, tokens(1)), none)  # no class is the same one
        model.generate_tokens(torch.tensor([1]), seed=0)
        with pytest.raises(ValueError, match=r"labels must be in \[0, 2\]"):
            model.logits(torch.tensor([3]), tokens(1))
    model.replace_classes(7)
    assert (model.config.classes, model.config.class_names) == (7, ())
    with pytest.raises(ConfigError, match="different names"):
        model.replace_classes(["ant", "ant"])
    with pytest.raises(ConfigError):
        model.replace_classes([])


def test_classes_by_name():
    config = VarConfig(classes=3, class_names=("ant", "2", "bee"))
    assert config.class_numbers(["bee", "ant", "2", "0"]) == [2, 0, 1, 0]  # a name comes first
    for wrong in ("cow", "3", "-1", ""):
        with pytest.raises(ValueError, match="there is no class"):
            config.class_numbers([wrong])
    assert VarConfig(classes=3).class_numbers(["2"]) == [2]
    assert VarConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="3 different names or none, got 2"):
        VarConfig(classes=3, class_names=("a", "b"))


def test_drops_can_be_changed():
    model = build(depth=3)
    model.change_drops(class_drop=0.5, drop_path=0.4)
    assert [block.drop_path for block in model.blocks] == pytest.approx([0.0, 0.2, 0.4])
    assert (model.config.class_drop, model.config.drop_path) == (0.5, 0.4)
