"""`Quantizer` against each original's own algorithm written out in plain PyTorch, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenflow_ext import presets
from tokenflow_ext.codes import Entropy, Levels, Projected, Signs, Table
from tokenflow_ext.family import Quantizer
from tokenflow_ext.var import VarQuantizer

Result = tuple[Tensor, Tensor, dict[str, Tensor]]


def sg(x: Tensor) -> Tensor:
    return x.detach()


def rows_of(h: Tensor) -> Tensor:
    return h.permute(0, 2, 3, 1).flatten(0, 2)


def maps_of(rows: Tensor, h: Tensor) -> Tensor:
    return rows.view(len(h), *h.shape[2:], -1).permute(0, 3, 1, 2)


def mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean()


def choice_entropy(logits: Tensor, eps: float = 1e-5) -> Tensor:
    """Mean entropy of the rows' softmax, less the entropy of its mean."""
    log_p = F.log_softmax(logits, dim=-1)
    mean = log_p.exp().flatten(0, -2).mean(0)
    return -(log_p.exp() * log_p).sum(-1).mean() + (mean * (mean + eps).log()).sum()


# --- the originals, one scale ---------------------------------------------------------------------


def unitok(quantizer: Quantizer, h: Tensor) -> Result:
    out, indices, codebook_loss, commitment = [], [], [], []
    books = quantizer.parts[0].codebooks
    for x, book in zip(h.chunk(len(books), 1), books, strict=True):
        f, table = F.normalize(rows_of(x), dim=-1), F.normalize(book, dim=-1)
        index = (f @ table.T).argmax(-1)
        e = table[index]
        codebook_loss.append(mse(e, sg(f)))
        commitment.append(mse(sg(e), f))
        out.append(maps_of(f + sg(e - f), x))
        indices.append(index.view(len(h), -1))
    losses = {
        "codebook": torch.stack(codebook_loss).mean(),
        "commitment": 0.25 * torch.stack(commitment).mean(),
    }
    return torch.cat(out, 1), torch.stack(indices, -1), losses


def dualtoken(quantizer: Quantizer, h: Tensor) -> Result:
    out, indices, commitment = [], [], []
    for x, book in zip(h.chunk(2, 1), quantizer.parts[0].codebooks, strict=True):
        rows = rows_of(x)
        residual, total, of_depth = sg(rows), torch.zeros_like(rows), []
        for _ in range(quantizer.depth):
            index = torch.cdist(residual, book).argmin(-1)
            of_depth.append(index.view(len(h), -1))
            total = total + book[index]
            residual = residual - book[index]
            commitment.append(mse(rows, sg(total)))
        out.append(maps_of(rows + sg(total - rows), x))
        indices.append(torch.stack(of_depth, -1))
    losses = {"commitment": torch.stack(commitment).mean()}
    return torch.cat(out, 1), torch.stack(indices, 2), losses


def llamagen(quantizer: Quantizer, h: Tensor) -> Result:
    z = F.normalize(rows_of(h), dim=-1)
    table = F.normalize(quantizer.parts[0].codebooks[0], dim=-1)
    distances = torch.cdist(z, table).square()
    index = distances.argmin(-1)
    q = table[index]
    losses = {
        "codebook": mse(q, sg(z)),
        "commitment": 0.25 * mse(sg(q), z),
        "entropy": 0.3 * choice_entropy(-(z.unsqueeze(1) - table).square().sum(-1) / 0.01),
    }
    return maps_of(z + sg(q - z), h), index.view(len(h), -1), losses


def simvq(quantizer: Quantizer, h: Tensor) -> Result:
    part, z = quantizer.parts[0], rows_of(h)
    table = part.projections[0](part.codebooks[0])
    index = torch.cdist(z, table).argmin(-1)
    q = table[index]
    losses = {"codebook": mse(q, sg(z)), "commitment": 0.25 * mse(z, sg(q))}
    return maps_of(z + sg(q - z), h), index.view(len(h), -1), losses


def ibq(quantizer: Quantizer, h: Tensor) -> Result:
    z, table = rows_of(h), quantizer.parts[0].codebooks[0]
    logits = z @ table.T
    soft = logits.softmax(-1)
    index = soft.argmax(-1)
    hard = F.one_hot(index, len(table)).to(z.dtype)
    q_soft, q_hard = (hard - sg(soft) + soft) @ table, hard @ table
    losses = {
        "straight_through": mse(q_soft, z),
        "commitment": mse(sg(q_hard), z),
        "codebook": 0.25 * mse(q_hard, sg(z)),
        "entropy": 0.05 * choice_entropy(logits / 0.01),
    }
    return maps_of(q_soft, h), index.view(len(h), -1), losses


def signs(quantizer: Quantizer, h: Tensor) -> Result:
    """LFQ, and WeTok with groups: one entropy of the choices of all."""
    group, count = quantizer.groups[0], len(quantizer.groups)
    z = rows_of(h)
    q = torch.where(z > 0, 1.0, -1.0).to(z.dtype)
    bits = (z > 0).long().view(len(z), count, group.dim)
    index = (bits << torch.arange(group.dim)).sum(-1).view(len(h), -1, count)
    every = torch.arange(1 << group.dim).unsqueeze(1) >> torch.arange(group.dim) & 1
    codes = (2 * every - 1).to(z.dtype)
    losses = {
        "commitment": 0.25 * mse(z, sg(q)),
        "entropy": 0.1 * choice_entropy(2 * z.view(-1, count, group.dim) @ codes.T / 0.01),
    }
    if quantizer.index == "shared":
        index = index.squeeze(-1)
    return maps_of(z + sg(q - z), h), index, losses


def fsq(quantizer: Quantizer, h: Tensor) -> Result:
    z, levels = rows_of(h), torch.tensor(quantizer.groups[0].levels)
    half = (levels - 1) * 1.001 / 2
    offset = torch.where(levels % 2 == 0, 0.5, 0.0)
    bounded = torch.tanh(z + torch.atanh(offset / half.double())) * half - offset
    rounded = bounded + sg(bounded.round() - bounded)
    digits = bounded.round().long() + levels // 2
    place = torch.cat([torch.ones(1, dtype=torch.int64), levels.cumprod(0)[:-1]])
    index = (digits * place).sum(-1).view(len(h), -1)
    return maps_of(rounded / (levels // 2), h), index, {}


# --- the originals, several scales ----------------------------------------------------------------


def infinity(quantizer: Quantizer, h: Tensor) -> Result:
    dim = quantizer.dim
    residual, total, bits = h, 0, []
    for size in quantizer.scales:
        z = F.normalize(F.interpolate(residual, size, mode="area"), dim=1)
        q = torch.where(z > 0, dim**-0.5, -(dim**-0.5)).to(z.dtype)
        bits.append((z > 0).flatten(2).mT)
        q = z + sg(q - z)
        up = F.interpolate(q.unsqueeze(2), (1, *h.shape[2:]), mode="trilinear").squeeze(2)
        residual, total = residual - sg(up), total + up
    bits = torch.cat(bits, 1)
    index = (bits.long() << torch.arange(dim - 1, -1, -1)).sum(-1)
    return total, index, {"commitment": h.new_zeros(())}


def imagefolder(quantizer: Quantizer, h: Tensor) -> Result:
    """Of each product, VAR's loop by cosine with codes as they are stored."""
    out, indices, codebook_loss, commitment = [], [], [], []
    for part, f in zip(quantizer.parts, h.chunk(2, 1), strict=True):
        assert isinstance(part, VarQuantizer)
        table, f_hat, rest, tokens = part.codebooks[0], 0, sg(f), []
        for number, size in enumerate(quantizer.scales):
            rows = rows_of(F.interpolate(rest, size, mode="area"))
            index = (F.normalize(rows, dim=-1) @ F.normalize(table, dim=-1).T).argmax(-1)
            tokens.append(index.view(len(h), -1))
            codes = table[index].view(len(h), *size, -1).permute(0, 3, 1, 2)
            if size != tuple(h.shape[2:]):
                codes = F.interpolate(codes, h.shape[2:], mode="bicubic")
            conv = part.phis[number / (len(quantizer.scales) - 1)]
            u = 0.5 * codes + 0.5 * F.conv2d(codes, conv.weight, conv.bias, padding=1)
            f_hat, rest = f_hat + u, rest - sg(u)
            codebook_loss.append(mse(f_hat, sg(f)))
            commitment.append(0.25 * mse(sg(f_hat), f))
        out.append(f + sg(f_hat - f))
        indices.append(torch.cat(tokens, 1))
    losses = {
        "codebook": torch.stack(codebook_loss).mean(),
        "commitment": torch.stack(commitment).mean(),
    }
    return torch.cat(out, 1), torch.stack(indices, -1), losses


SIDE = 5
CASES: list[tuple[str, dict, Callable[[Quantizer, Tensor], Result]]] = [
    ("unitok", {"groups": (Table(40, 4, l2_norm=True),) * 3, "scales": (SIDE,)}, unitok),
    ("dualtoken-256", {"groups": (Table(30, 6),) * 2, "scales": (SIDE,)}, dualtoken),
    ("dualtoken-384", {"groups": (Table(30, 3),) * 2, "scales": (SIDE,)}, dualtoken),
    (
        "llamagen",
        {"groups": Table(50, 8, l2_norm=True), "scales": (SIDE,), "entropy": Entropy(0.3)},
        llamagen,
    ),
    ("simvq", {"groups": Projected(50, 7), "scales": (SIDE,)}, simvq),
    ("ibq", {"groups": Table(60, 9), "scales": (SIDE,)}, ibq),
    ("lfq", {"groups": Signs(7), "scales": (SIDE,)}, signs),
    ("wetok", {"groups": (Signs(4),) * 3, "scales": (SIDE,)}, signs),
    ("infinity-32", {"scales": (1, 2, 4, SIDE)}, infinity),
    (
        "imagefolder",
        {"groups": (Table(30, 4, l2_norm=True),) * 2, "scales": (1, 1, 2, 3, SIDE)},
        imagefolder,
    ),
    ("fsq", {"scales": (SIDE,)}, fsq),
]


@pytest.mark.parametrize(("name", "changes", "original"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("seed", range(3))
def test_preset_is_its_original(
    name: str, changes: dict, original: Callable[[Quantizer, Tensor], Result], seed: int
) -> None:
    torch.manual_seed(seed)
    quantizer = Quantizer.preset(name, **changes).double()
    for parameter in quantizer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    h = (0.7 * torch.randn(2, quantizer.dim, SIDE, SIDE, dtype=torch.float64)).requires_grad_()
    expected, indices, losses = original(quantizer, h)
    leaves = [h, *(p for p in quantizer.parameters() if p.requires_grad)]
    seeds = torch.randn_like(expected)
    wanted = torch.autograd.grad(
        (expected * seeds).sum() + sum(losses.values()), leaves, allow_unused=True
    )
    ours = quantizer(h)  # after it: running means move codes
    torch.testing.assert_close(ours.indices, indices)
    torch.testing.assert_close(ours.quantized, expected)
    nothing = {key: value for key, value in ours.losses.items() if key not in losses}
    assert all(float(value) == 0 for value in nothing.values())
    for key, value in losses.items():
        torch.testing.assert_close(ours.losses[key], value.to(ours.losses[key]))
    total = (ours.quantized * seeds).sum() + sum(ours.losses.values())
    got = torch.autograd.grad(total, leaves, allow_unused=True)
    for mine, theirs, leaf in zip(got, wanted, leaves, strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(
            zero if mine is None else mine, zero if theirs is None else theirs
        )


def test_running_means_of_dualtoken() -> None:
    """A depth is looked up with the codes before the step, and codes are means of what each depth
    searched with."""
    torch.manual_seed(0)
    quantizer = Quantizer.preset("dualtoken-256", groups=(Table(6, 3),) * 2, scales=(4,))
    h = torch.randn(3, 6, 4, 4)
    before = [book.clone() for book in quantizer.parts[0].codebooks]
    out = quantizer(h)
    for group, (x, book) in enumerate(zip(h.chunk(2, 1), before, strict=True)):
        residual, rows, index = rows_of(x), [], []
        for _ in range(4):
            rows.append(residual)
            index.append(torch.cdist(residual, book).argmin(-1))
            residual = residual - book[index[-1]]
        rows, index = torch.cat(rows), torch.cat(index)
        for code in range(6):
            mine = quantizer.parts[0].codebooks[group][code]
            hit = index == code
            expected = rows[hit].mean(0) if hit.any() else book[code]
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
        hits = torch.bincount(index, minlength=6)
        assert torch.equal(out.usage[group].hits, hits)


@pytest.mark.parametrize("name", list(presets.PRESETS))
def test_every_preset(name: str) -> None:
    """Arguments that `Quantizer` takes, at full size where that is small, and words about it."""
    arguments = presets.preset(name)
    groups = arguments["groups"]
    groups = groups if isinstance(groups, tuple) else (groups,)
    small = tuple(
        type(group)(64, min(group.dim, 16), l2_norm=group.l2_norm)
        if isinstance(group, (Table, Projected))
        else group
        for group in groups
    )
    quantizer = Quantizer(**(arguments | {"groups": small}))
    h = torch.randn(1, quantizer.dim, *quantizer.scales[-1])
    out = quantizer.eval()(h)
    assert torch.equal(out.indices, quantizer.encode(h))
    torch.testing.assert_close(quantizer.decode(out.indices), out.quantized, rtol=1e-4, atol=1e-4)
    function = presets.PRESETS[name]
    assert "arXiv" in function.__doc__ or "as `" in function.__doc__.lower()
    tokens = sum(a * b for a, b in quantizer.scales) * quantizer.depth
    count = len(small) if quantizer.index == "own" else 1
    assert quantizer.bits_per_image == pytest.approx(
        tokens * sum(math.log2(group.size) for group in small[:count])
    )


def test_an_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"preset must be one of tokenflow-b, .* got 'unitok2'"):
        Quantizer.preset("unitok2")
    with pytest.raises(TypeError, match="dropout"):
        Quantizer.preset("unitok", dropout=1)


# --- any point of the space -----------------------------------------------------------------------


@st.composite
def quantizers(draw: st.DrawFn) -> Quantizer:
    """Random groups, depths, scales and kinds, of those that mean something."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    l2_norm = draw(st.booleans())
    kinds = [
        Table(draw(st.integers(1, 40)), draw(st.integers(1, 6)), l2_norm=l2_norm),
        Projected(draw(st.integers(1, 40)), draw(st.integers(1, 6)), l2_norm=l2_norm),
        Signs(draw(st.integers(1, 6)), spherical=l2_norm, little_endian=draw(st.booleans())),
        Levels(tuple(draw(st.lists(st.integers(3, 6), min_size=1, max_size=3)))),
    ]
    own = draw(st.booleans())
    depth = draw(st.integers(1, 3))
    scales = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    if own:
        groups = tuple(draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4)))
        tables = all(isinstance(group, (Table, Projected)) for group in groups)
    else:
        first = draw(st.sampled_from(kinds))
        tables = isinstance(first, (Table, Projected))
        groups = (first,) * (draw(st.integers(1, 3)) if tables else 1)
    return Quantizer(
        groups,
        index="own" if own else "shared",
        depth=depth,
        scales=scales,
        metric=draw(st.sampled_from(["l2", "dot"])) if tables else "l2",
        beta=draw(st.sampled_from([0.0, 0.25])),
    )


@settings(max_examples=80, deadline=None)
@given(quantizer=quantizers(), double=st.booleans(), batch=st.integers(1, 3))
def test_any_quantizer(quantizer: Quantizer, double: bool, batch: int) -> None:
    dtype = torch.float64 if double else torch.float32
    h = torch.randn(batch, quantizer.dim, 4, 5, dtype=dtype, requires_grad=True)
    out = quantizer(h)
    places = sum(a * b for a, b in quantizer.scales)
    own = (len(quantizer.groups),) * (quantizer.index == "own")
    shape = (batch, places, *own, *((quantizer.depth,) * (quantizer.depth > 1)))
    assert out.indices.shape == shape
    assert torch.equal(quantizer.encode(h), out.indices)
    decoded = quantizer.decode(out.indices, size=(4, 5)).to(dtype)
    torch.testing.assert_close(decoded, out.quantized.detach(), rtol=1e-4, atol=1e-4)
    codes = quantizer.indices_to_codes(out.indices)
    assert codes.shape == (
        batch,
        places,
        *((quantizer.depth,) * (quantizer.depth > 1)),
        quantizer.dim,
    )
    again = quantizer.indices_to_codes(quantizer.codes_to_indices(codes))
    torch.testing.assert_close(again, codes, rtol=1e-5, atol=1e-5)
    inputs = quantizer.next_scale_inputs(out.indices)
    first = quantizer.scales[0]
    assert inputs.shape == (batch, places - first[0] * first[1], quantizer.dim)
    if len(quantizer.scales) > 1:
        upto = quantizer.decode(out.indices, upto=1)
        assert upto.shape[2:] == quantizer.scales[-1]
    (out.quantized.sum() + sum(out.losses.values())).backward()
    assert h.grad.isfinite().all()
    assert len(out.usage) == (len(quantizer.groups) if own else 1)
    for usage in out.usage:
        assert int(usage.hits.sum()) == batch * places * quantizer.depth
    window = quantizer.usage_window()
    assert [int(usage.hits.sum()) for usage in window] == [
        int(usage.hits.sum()) for usage in out.usage
    ]


@settings(max_examples=60, deadline=None)
@given(quantizer=quantizers(), data=st.data())
def test_the_first_scales_and_rounds_are_sums_of_their_codes(
    quantizer: Quantizer, data: st.DataObject
) -> None:
    scales, depth = quantizer.scales, quantizer.depth
    upto = data.draw(st.integers(1, len(scales)))
    rounds = data.draw(st.integers(1, depth))
    tokens = quantizer.encode(torch.randn(2, quantizer.dim, 4, 5))
    codes = quantizer.indices_to_codes(tokens).double()
    codes = codes.view(2, quantizer.num_tokens, depth, quantizer.dim)
    expected = torch.zeros(2, quantizer.dim, 4, 5, dtype=torch.float64)
    parts = codes.split([height * width for height, width in scales], dim=1)
    for scale, part in enumerate(parts[:upto]):
        summed = part[:, :, : rounds if scale == upto - 1 else depth].sum(2)
        plane = summed.mT.unflatten(2, scales[scale])
        if scales[scale] != (4, 5):
            plane = F.interpolate(plane, (4, 5), mode="bicubic", align_corners=False)
        expected += plane
    found = quantizer.decode(tokens, upto, (4, 5), rounds=rounds)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    whole = quantizer.decode(tokens, upto, (4, 5), rounds=depth)
    assert torch.equal(whole, quantizer.decode(tokens, upto, (4, 5)))
    for wrong in (0, depth + 1):
        with pytest.raises(ValueError, match=f"rounds must be 1 to {depth}, got {wrong}"):
            quantizer.decode(tokens, upto, rounds=wrong)


@pytest.mark.parametrize("index", ["shared", "own"])
@pytest.mark.parametrize("depth", [1, 2])
def test_bits(index: str, depth: int) -> None:
    groups = (Signs(5),) * (3 if index == "own" else 1)
    quantizer = Quantizer(groups, index=index, depth=depth, scales=(1, 2))
    h = torch.randn(2, quantizer.dim, 2, 2)
    indices = quantizer.encode(h)
    codes = quantizer.indices_to_codes(indices)
    bits = quantizer.indices_to_bits(indices, "little")
    assert torch.equal(bits, codes > 0)
    for order in ("little", "big"):
        bits = quantizer.indices_to_bits(indices, order)
        assert torch.equal(quantizer.bits_to_indices(bits, order), indices)
    other = Quantizer(
        tuple(Signs(5, little_endian=False) for _ in groups),
        index=index,
        depth=depth,
        scales=(1, 2),
    )
    assert torch.equal(other.indices_to_bits(other.encode(h), "big"), codes > 0)
    with pytest.raises(ValueError, match="only signs"):
        Quantizer(Levels((3, 3))).indices_to_bits(indices, "little")


def test_kmeans_and_restart() -> None:
    quantizer = Quantizer((Table(8, 3), Table(9, 4)), index="own", scales=(4,))
    h = torch.randn(4, 7, 4, 4)
    before = float((quantizer.decode(quantizer.encode(h)) - h).square().mean())
    quantizer.init_kmeans(h)
    assert float((quantizer.decode(quantizer.encode(h)) - h).square().mean()) < 0.8 * before
    quantizer.parts[1].usage_ema.copy_(torch.tensor([0.0] + [1.0] * 8))
    assert quantizer.restart_dead_codes(h) == 1
    with pytest.raises(ValueError, match="only tables can be set"):
        Quantizer(Signs(3)).init_kmeans(torch.randn(1, 3, 2, 2))
    projected = Quantizer(Projected(8, 3), scales=(2,)).parts[0]
    with pytest.raises(NotImplementedError, match="outputs of a layer"):
        projected.restart_dead_codes(torch.randn(4, 3))


@pytest.mark.parametrize(
    "quantizer",
    [
        Quantizer((Table(24, 4, l2_norm=True),) * 2, index="own", scales=(4,), metric="dot"),
        Quantizer((Table(24, 4),) * 2, index="own", depth=3, scales=(4,), errors="running"),
        Quantizer(Table(24, 8), metric="dot", straight_through="softmax", scales=(4,)),
        Quantizer(Projected(24, 8), scales=(1, 4)),
        Quantizer(Signs(8), scales=(1, 2, 4)),
        Quantizer(Levels((5, 4, 3)), scales=(4,)),
    ],
    ids=["groups", "depth", "ibq", "projected", "signs", "levels"],
)
def test_compiled_and_exported(quantizer: Quantizer) -> None:
    quantizer.eval()
    h = torch.randn(2, quantizer.dim, 4, 4, requires_grad=True)
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
    expected, got = quantizer(h), compiled(h)
    assert torch.equal(got.indices, expected.indices)
    torch.testing.assert_close(got.quantized, expected.quantized)
    loss = [out.quantized.square().sum() + sum(out.losses.values()) for out in (expected, got)]
    torch.testing.assert_close(*(torch.autograd.grad(value, h)[0] for value in loss))
    program = torch.export.export(quantizer, (h.detach(),))
    assert torch.equal(program.module()(h.detach()).indices, expected.indices)


def test_frozen_and_saved() -> None:
    quantizer = Quantizer((Table(8, 3),) * 2, index="own", scales=(2,), update="none")
    assert not any(parameter.requires_grad for parameter in quantizer.parameters())
    assert set(quantizer(torch.randn(1, 6, 2, 2)).losses) == {"commitment"}
    other = Quantizer((Table(8, 3),) * 2, index="own", scales=(2,), update="none")
    other.load_state_dict(quantizer.state_dict())
    h = torch.randn(1, 6, 2, 2)
    assert torch.equal(other.encode(h), quantizer.encode(h))
    assert "36 bits an image" in repr(Quantizer((Signs(9),), scales=(2,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": ()}, "groups must be one or more"),
        ({"groups": (3,)}, "groups must be one or more"),
        ({"groups": (Signs(3), Signs(3))}, "index='shared' needs groups of one kind of tables"),
        ({"groups": (Table(5, 2), Table(6, 2))}, "index='shared' needs tables of one size"),
        ({"groups": (Table(5, 2), Table(5, 2, True))}, "all l2_norm or none"),
        ({"groups": Table(5, 2, weight=2)}, "weight compares tables that share an index"),
        ({"groups": Signs(3), "metric": "dot"}, "metric='dot' is of tables"),
        ({"groups": Signs(3), "update": "ema"}, "update='ema' is of tables alone"),
        ({"groups": Projected(4, 3), "update": "none"}, "update='none' is of tables alone"),
        ({"groups": Table(4, 3), "flips": 0.1}, "flips=0.1 are of signs"),
        ({"groups": Table(4, 3), "upsampling": "bilinear"}, "is of signs and levels"),
        ({"groups": Signs(3), "phi": (0.5, 1)}, "phi is of tables"),
        ({"groups": Table(4, 3), "phi": (0.5, 1)}, "straight_through must be 'identity' with VAR"),
        (
            {"groups": Table(4, 3), "phi": (0.5, 1), "straight_through": "identity"},
            "errors must be 'running' with VAR's pyramid",
        ),
        ({"groups": Table(4, 3), "phi": (0.5, 1), "metric": "dot"}, "metric must be 'l2' with VAR"),
        ({"groups": Table(4, 3), "scale_drop": 0.1, "depth": 2}, "scale_drop=0.1 leaves out a sca"),
        ({"groups": Signs(3), "errors": "running"}, "errors='running' is of tables"),
        ({"groups": Levels((3, 3)), "entropy": Entropy(1)}, "entropy is not of levels"),
        ({"groups": Table(4, 3), "entropy": Entropy(1), "depth": 2}, "entropy of tables needs"),
        ({"groups": Table(4, 3), "straight_through": "softmax"}, "needs one table, metric='dot'"),
        (
            {"groups": Table(4, 3, True), "straight_through": "softmax", "metric": "dot"},
            "not l2_norm",
        ),
        ({"groups": Signs(3), "straight_through": "identity"}, "is of tables"),
        ({"groups": Signs(3), "scale_drop": 0.1}, "scale_drop=0.1 is of tables"),
        (
            {
                "groups": Table(4, 3),
                "errors": "running",
                "straight_through": "identity",
                "scales": (1, 2),
                "update": "ema",
            },
            "update must be 'gradient' or 'none' with VAR's pyramid",
        ),
        ({"groups": Table(4, 3), "index": "one"}, "index must be one of shared, own, got 'one'"),
        ({"groups": Table(4, 3), "depth": 0}, "depth must be at least 1"),
        ({"groups": Table(4, 3), "scales": (0,)}, "scales must hold"),
    ],
)
def test_what_means_nothing_is_refused(options: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Quantizer(**options)


def test_bad_features_and_tokens() -> None:
    quantizer = Quantizer((Table(8, 3),) * 2, index="own", scales=(2,), errors="running")
    with pytest.raises(ValueError, match=r"h must have shape \[B, 6, H, W\]"):
        quantizer(torch.randn(1, 5, 2, 2))
    with pytest.raises(ValueError, match=r"h must have the size of the scale, \(2, 2\)"):
        quantizer(torch.randn(1, 6, 3, 3))
    with pytest.raises(ValueError, match=r"indices must have shape \[B, 4, 2\], B > 0"):
        quantizer.decode(torch.zeros(1, 2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"codes must have shape \[B, 4, 6\], B > 0"):
        quantizer.codes_to_indices(torch.zeros(1, 4, 5))
    with pytest.raises(ValueError, match="upto must be 1 to 1, got 2"):
        quantizer.decode(torch.zeros(1, 4, 2, dtype=torch.int64), upto=2)
    with pytest.raises((ValueError, RuntimeError), match=r"indices must be in \[0, 8\)"):
        quantizer.decode(torch.full((1, 4, 2), 8))
