"""Text to image against the definition: the sequence, generation with its cache, weights.

The oracle below is written from the method's text alone: one picture at a time, the whole sequence
anew in every run, padding left out instead of masked, dense masks, no cache.
"""

import dataclasses
import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    CODES,
    DIMS,
    FAMILIES,
    SCALES,
    TEXT,
    WORDS,
    backbone,
    build,
    image_tokenizer,
    pictures,
    prompts,
    tiny_original,
)
from torch.utils._python_dispatch import TorchDispatchMode

from tokenflow_ext.models import (
    BackboneConfig,
    CheckpointError,
    ConfigError,
    NextScaleSequence,
    PixelConfig,
    SemanticConfig,
    TextToImage,
    TextToImageConfig,
    TokenFlowTokenizer,
    encode_prompts,
)
from tokenflow_ext.models.text_to_image import generation
from tokenflow_ext.models.text_to_image.model import FLEX_HEAD_WIDTH
from tokenflow_ext.models.text_to_image.rope import RopeConfig
from tokenflow_ext.sampler import MultiStepSampler, sample_top_k_top_p

# ---------------------------------------------------------------------- the oracle


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


ACTIVATIONS = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda x: (
        x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "relu": lambda x: x.clamp(min=0),
}


class Oracle:
    """Logits of one picture's sequence, from a state dict, codebooks, and plain numbers.

    ``rope`` holds one angle for a pair of channels, from a place to the next, and may be shorter
    than half a head; ``stretch`` is what cosines and sines are multiplied by.
    """

    def __init__(
        self, state, codebooks, scales, words, heads, groups, eps, rope, act="silu", stretch=1.0
    ):
        self.stretch = stretch
        self.state, self.scales, self.words, self.rope = state, scales, words, rope
        self.heads, self.groups, self.eps, self.act = heads, groups, eps, ACTIVATIONS[act]
        # f-hat is of the image tokenizer's precision, float32.
        rows = [F.normalize(group, dim=-1) for group in codebooks]
        self.codes = torch.cat(rows, dim=1)
        self.pad = words + len(self.codes)

    @classmethod
    def of(cls, model):
        """Of a model whose RoPE is not scaled."""
        shape = model.config.backbone
        heads = shape.num_attention_heads
        width = len(model.state_dict()["model.layers.0.self_attn.q_proj.weight"]) // heads
        return cls(
            model.state_dict(),
            model.tokenizer.quantizer.codebooks,
            model.config.scales,
            model.config.text_vocab_size,
            heads,
            shape.num_key_value_heads or heads,
            shape.rms_norm_eps,
            [shape.rope_theta ** (-2 * pair / width) for pair in range(width // 2)],
            shape.hidden_act,
        )

    def features(self, tokens, scale):
        """[C, s, s] of a scale's tokens [s * s]."""
        side = self.scales[scale]
        return self.codes[tokens].T.reshape(1, -1, side, side)

    def next_f_hat(self, f_hat, tokens, scale):
        total = self.features(tokens, scale)
        total = total if f_hat is None else f_hat + total
        side = self.scales[scale + 1]
        return F.interpolate(total, (side, side), mode="bicubic", align_corners=False)

    def inputs(self, ids, f_hats):
        """(inputs [n, hidden], place, kind) of every place but padding; kind -1 is text."""
        state = self.state
        hidden, place, kind = [], [], []
        last = len(ids) - 1
        for number, word in enumerate(ids):
            if int(word) == self.pad:
                continue
            x = state["model.embed_tokens.weight"][word] + state["model.lvl_embed.weight"][0]
            if number == last:
                x = x + state["model.pos_1LC"][0]
            hidden.append(x)
            place.append(number)
            kind.append(0 if number == last else -1)
        count = 1
        for scale, f_hat in enumerate(f_hats, start=1):
            for feature in f_hat[0].flatten(1).T.double():
                x = feature @ state["model.mm_projector.0.weight"].T
                x = F.gelu(x + state["model.mm_projector.0.bias"])
                x = x @ state["model.mm_projector.2.weight"].T
                x = x + state["model.mm_projector.2.bias"]
                x = x + state["model.pos_1LC"][count] + state["model.lvl_embed.weight"][scale + 1]
                hidden.append(x)
                place.append(last + count)
                kind.append(scale)
                count += 1
        return torch.stack(hidden), place, kind

    def linear(self, x, name):
        weight = self.state[name + ".weight"]
        return torch.einsum("ni,oi->no", x, weight) + self.state.get(name + ".bias", 0.0)

    def attention(self, x, layer, place, sees):
        prefix = f"model.layers.{layer}.self_attn."
        projected = {name: self.linear(x, f"{prefix}{name}_proj") for name in "qkv"}
        width = projected["q"].shape[1] // self.heads

        def turned(name, head):
            """Queries or keys of a head, normalised, then turned."""
            own = projected[name][:, head * width : (head + 1) * width]
            if prefix + "q_norm.weight" in self.state:  # Qwen3's own
                own = rms_norm(own, self.state[f"{prefix}{name}_norm.weight"], self.eps)
            else:
                long = {"q": "query", "k": "key"}[name]
                own = rms_norm(own, self.state[f"{prefix}qknorm.{long}_norm.weight"], 1e-6)
            out, half = own.clone(), len(self.rope)
            for pair, angle in enumerate(self.rope):
                angles = angle * torch.tensor(place, dtype=torch.float64)
                first, second = own[:, pair], own[:, half + pair]
                cos, sin = self.stretch * angles.cos(), self.stretch * angles.sin()
                out[:, pair] = first * cos - second * sin
                out[:, half + pair] = second * cos + first * sin
            return out

        given = []
        for head in range(self.heads):
            group = head // (self.heads // self.groups)
            scores = torch.einsum("qc,kc->qk", turned("q", head), turned("k", group))
            scores = (scores / math.sqrt(width)).masked_fill(~sees, -math.inf).exp()
            share = scores / scores.sum(1, keepdim=True)
            value = projected["v"][:, group * width : (group + 1) * width]
            given.append(torch.einsum("qk,kc->qc", share, value))
        return self.linear(torch.cat(given, dim=1), prefix + "o_proj")

    def hidden(self, ids, f_hats):
        x, place, kind = self.inputs(ids, f_hats)
        sees = torch.zeros(len(place), len(place), dtype=torch.bool)
        for i in range(len(place)):
            for j in range(len(place)):
                image = kind[i] >= 0 and kind[j] >= 0
                sees[i, j] = kind[j] <= kind[i] if image else place[j] <= place[i]
        layer = 0
        while f"model.layers.{layer}.input_layernorm.weight" in self.state:
            prefix = f"model.layers.{layer}."
            given = self.attention(x, layer, place, sees)
            x = x + rms_norm(given, self.state[prefix + "input_layernorm.weight"], self.eps)
            gate = self.act(self.linear(x, prefix + "mlp.gate_proj"))
            given = gate * self.linear(x, prefix + "mlp.up_proj")
            given = self.linear(given, prefix + "mlp.down_proj")
            norm = self.state[prefix + "post_attention_layernorm.weight"]
            x = x + rms_norm(given, norm, self.eps)
            layer += 1
        return rms_norm(x, self.state["model.norm.weight"], self.eps)

    def logits(self, ids, f_hats):
        """Of the last scale that has inputs, [s * s, K] (with no f-hat, of the first scale)."""
        return self.all_logits(ids, f_hats)[-(self.scales[len(f_hats)] ** 2) :]

    def all_logits(self, ids, f_hats):
        """Of every scale up to that, [L, K]."""
        count = sum(side * side for side in self.scales[: len(f_hats) + 1])
        full = torch.einsum("nc,vc->nv", self.hidden(ids, f_hats), self.state["lm_head.weight"])
        return full[-count:, self.words : self.words + len(self.codes)]

    def training_logits(self, ids, indices):
        """Of one picture [L] in one run, [L, K]."""
        f_hats, first = [], 0
        for scale, side in enumerate(self.scales[:-1]):
            tokens = indices[first : first + side * side]
            f_hats.append(self.next_f_hat(f_hats[-1] if f_hats else None, tokens, scale))
            first += side * side
        return self.all_logits(ids, f_hats)

    def generate(self, ids, negative, guidance, top_k, top_p, seed):
        """Tokens [L]: every run computes the sequence up to its scale anew.

        In refinement only the current scale's input includes its own tokens; earlier scales' are
        f-hat of what came before them, as in training.
        """
        last = len(self.scales) - 1
        f_hats, drawn = [], []
        for scale, side in enumerate(self.scales):
            count = side * side
            if scale:
                earlier = f_hats[-1] if f_hats else None
                f_hats.append(self.next_f_hat(earlier, drawn[-1], scale - 1))
            for step in range(len(top_k) if scale else 1):
                own = list(f_hats)
                if step:
                    own[-1] = own[-1] + self.features(tokens, scale)  # noqa: F821
                t = guidance * scale / last
                sides = [s * s for s in self.scales]
                first = step * sum(sides) + sum(sides[:scale])
                tokens = sample_top_k_top_p(
                    self.logits(ids, own).float(),
                    top_k=top_k[step],
                    top_p=top_p[step],
                    uncond=self.logits(negative, own).float(),
                    guidance=t,
                    seed=seed,
                    offset=torch.arange(first, first + count),
                )
                assert tokens.shape == (count,)
            drawn.append(tokens)
        return torch.cat(drawn)


# ---------------------------------------------------------------------- generation


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_is_the_cacheless_one(family):
    """Token for token, with refinement, prompts of different lengths and negative prompts."""
    model = build(family)
    ids = prompts(model, [4, 9, 6])
    for negative in (prompts(model, [5], seed=4), prompts(model, [9, 2, 7], seed=5)):
        options = {"guidance": 2.5, "top_k": (20, 7, 3), "top_p": (0.9, 0.8, 0.0)}
        seeds = [11, 5, 2**40]
        tokens = model.generate_tokens(ids, negative, seed=seeds, **options)
        oracle = Oracle.of(model)
        for row, seed in enumerate(seeds):
            against = negative[row % len(negative)]
            expected = oracle.generate(ids[row], against, seed=seed, **options)
            assert torch.equal(tokens[row], expected)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_tokens_so_far_are_told_after_each_scale(steps):
    model = build()
    ids, told = prompts(model, [4, 9]), []
    options = {"guidance": 0.0, "top_k": (20,) * steps, "top_p": (0.9,) * steps, "seed": 3}
    tokens = model.generate_tokens(ids, None, on_scale=told.append, **options)
    ends = [sum(side * side for side in SCALES[: n + 1]) for n in range(len(SCALES))]
    assert [part.shape[1] for part in told] == ends
    assert all(torch.equal(part, tokens[:, : part.shape[1]]) for part in told)
    assert torch.equal(tokens, model.generate_tokens(ids, None, **options))


def test_an_error_where_tokens_are_told_ends_the_generation():
    def refuse(tokens):
        raise KeyError(tokens.shape[1])

    model = build()
    with pytest.raises(KeyError, match="1"):
        model.generate_tokens(prompts(model, [4]), None, guidance=0.0, on_scale=refuse)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_generation_of_any_prompts(data):
    model = build(num_hidden_layers=1)
    count = data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(1, TEXT), min_size=count, max_size=count))
    steps = data.draw(st.integers(1, 3))
    options = {
        "guidance": data.draw(st.floats(0.5, 8)),
        "top_k": data.draw(st.lists(st.integers(1, CODES), min_size=steps, max_size=steps)),
        "top_p": data.draw(st.lists(st.floats(0, 1), min_size=steps, max_size=steps)),
    }
    ids = prompts(model, lengths, seed=data.draw(st.integers(0, 99)))
    negative = prompts(model, [data.draw(st.integers(1, TEXT))], seed=6)
    tokens = model.generate_tokens(ids, negative, seed=7, **options)
    oracle = Oracle.of(model)
    for row in range(count):
        expected = oracle.generate(ids[row], negative[0], seed=7 + row, **options)
        assert torch.equal(tokens[row], expected)


@pytest.mark.parametrize("lengths", [[9, 9, 9], [3, 9, 5]])
def test_training_and_generation_agree(monkeypatch, lengths):
    """Logits of the training forward are those of each scale's first draw for the same tokens."""
    model = build()
    ids, indices = prompts(model, lengths), pictures(model, 3)
    given_tokens = list(model.tokenizer.quantizer.split(indices))
    seen = []

    class Forced(MultiStepSampler):
        def draw(self, scale, step, logits, uncond=None, **options):
            assert (len(seen), step, uncond) == (scale, 0, None)
            seen.append(logits)
            return given_tokens[scale]

    monkeypatch.setattr(generation, "MultiStepSampler", Forced)
    tokens = model.generate_tokens(ids, None, guidance=0, top_k=(1,), top_p=(0.0,))
    assert torch.equal(tokens, indices)
    output = model(ids, indices)
    # Handed over to the sampler in float32.
    found = torch.cat(seen, dim=1).double()
    torch.testing.assert_close(found, output.logits, rtol=1e-6, atol=1e-5)
    expected = -output.logits.log_softmax(-1).gather(2, indices.unsqueeze(2)).mean()
    torch.testing.assert_close(output.loss, expected)


VARIANTS = {
    "llama": {},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
    "all heads": {"num_key_value_heads": 0},
    "one group": {"num_key_value_heads": 1},
    "wide heads": {"family": "qwen3", "head_dim": 20, "attention_bias": True},
    "wide heads of qwen2": {"family": "qwen2", "head_dim": 6, "num_attention_heads": 8},
    "biases": {"attention_bias": True, "mlp_bias": True, "rope_theta": 77.0},
    "gelu": {"hidden_act": "gelu", "rms_norm_eps": 0.3},
    "tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"family": "qwen2", "hidden_act": "relu"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_logits_are_the_definition(variant):
    """The whole sequence in float64; every place of it by itself in the oracle."""
    model = build(**VARIANTS[variant])
    ids, indices = prompts(model, [9, 5]), pictures(model, 2)
    logits = model(ids, indices).logits
    oracle = Oracle.of(model)
    for row in range(2):
        expected = oracle.training_logits(ids[row], indices[row])
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-10)


ORIGINAL = "original_max_position_embeddings"
ROPES = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.5},  # of a model for 20 places, read with 38
    "yarn": {"factor": 8.0, ORIGINAL: 20, "beta_fast": 2.0, "beta_slow": 0.1},
    "longrope short": {"short_factor": [1, 1.5, 2, 4], "long_factor": [9] * 4, ORIGINAL: 40},
    "longrope long": {"short_factor": [9] * 4, "long_factor": [1, 1.5, 2, 4], ORIGINAL: 10},
    "llama3": {"factor": 8.0, "low_freq_factor": 0.2, "high_freq_factor": 2.0, ORIGINAL: 20},
    "proportional": {"factor": 2.0, "partial_rotary_factor": 0.5},
    "default": {"partial_rotary_factor": 0.5},
}


def angles(kind, given, theta, width, longest, length):
    """(angle of each pair of channels from a place to the next, factor of cosines and sines)."""
    turned = width if kind == "proportional" else int(width * given.get("partial_rotary_factor", 1))
    plain = [theta ** (-2 * i / turned) for i in range(turned // 2)]
    scale, original = given.get("factor"), given.get(ORIGINAL)
    if kind == "linear":
        return [angle / scale for angle in plain], 1.0
    if kind == "dynamic":  # the base grows so that the slowest pair turns as far as it did
        base = theta * (scale * length / longest - scale + 1) ** (turned / (turned - 2))
        return [base ** (-2 * i / turned) for i in range(turned // 2)], 1.0
    if kind == "yarn":
        low, high = (
            turned * math.log(original / (2 * math.pi * given[name])) / (2 * math.log(theta))
            for name in ("beta_fast", "beta_slow")
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), turned - 1)
        found = []
        for i, angle in enumerate(plain):
            share = min(max((i - low) / (high - low), 0), 1)
            found.append(share * angle / scale + (1 - share) * angle)
        return found, 0.1 * math.log(scale) + 1
    if kind.startswith("longrope"):
        by = given["long_factor" if length > original else "short_factor"]
        ratio = longest / original
        stretch = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        return [angle / divisor for angle, divisor in zip(plain, by, strict=True)], stretch
    if kind == "llama3":
        found = []
        for angle in plain:
            wave, low, high = 2 * math.pi / angle, "low_freq_factor", "high_freq_factor"
            if wave < original / given[high]:
                found.append(angle)
            elif wave > original / given[low]:
                found.append(angle / scale)
            else:
                smooth = (original / wave - given[low]) / (given[high] - given[low])
                found.append((1 - smooth) * angle / scale + smooth * angle)
        return found, 1.0
    if kind == "proportional":
        some = int(given["partial_rotary_factor"] * width // 2)
        return [angle / scale if i < some else 0.0 for i, angle in enumerate(plain)], 1.0
    return plain, 1.0


@pytest.mark.parametrize("kind", ROPES)
def test_every_kind_of_rope_is_the_definition(kind):
    given, name = ROPES[kind], kind.split()[0]
    longest = 20 if kind == "dynamic" else 128
    rope = RopeConfig.from_transformers({"rope_type": name, **given})
    model = build(rope=rope, rope_theta=50.0, max_position_embeddings=longest)
    ids, indices = prompts(model, [7]), pictures(model, 1)
    oracle = Oracle.of(model)
    oracle.rope, oracle.stretch = angles(kind, given, 50.0, 8, longest, TEXT - 1 + 30)
    expected = oracle.training_logits(ids[0], indices[0])
    torch.testing.assert_close(model(ids, indices).logits[0], expected, rtol=0, atol=1e-10)
    options = {"guidance": 2.0, "top_k": (20, 3), "top_p": (0.9, 0.8)}
    tokens = model.generate_tokens(ids, ids, seed=[4], **options)
    assert torch.equal(tokens[0], oracle.generate(ids[0], ids[0], seed=4, **options))


def test_a_released_state_dict_draws_the_definition():
    """From the original names and a Llama's configuration alone; tokens too, with guidance."""
    state, config = tiny_original()
    tokenizer = image_tokenizer()
    state = {key: value.double() for key, value in state.items()}
    model = TextToImage.from_original(state, config, tokenizer)
    rope = [10000.0 ** (-2 * pair / 8) for pair in range(4)]
    oracle = Oracle(state, tokenizer.quantizer.codebooks, SCALES, WORDS, 4, 4, 1e-5, rope)
    ids, negative, indices = prompts(model, [4, 9]), prompts(model, [6], seed=4), pictures(model, 2)
    logits = model(ids, indices).logits
    options = {"guidance": 7.5, "top_k": (20, 7, 1), "top_p": (0.9, 0.8, 0.0)}
    tokens = model.generate_tokens(ids, negative, seed=[11, 5], **options)
    for row, seed in enumerate((11, 5)):
        expected = oracle.training_logits(ids[row], indices[row])
        torch.testing.assert_close(logits[row], expected, rtol=1e-10, atol=1e-10)
        assert torch.equal(
            tokens[row], oracle.generate(ids[row], negative[0], seed=seed, **options)
        )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # said once
def test_flex_attention_agrees():
    """On the CPU FlexAttention runs without gradient only."""
    model = build(dtype=torch.float32).requires_grad_(False)
    ids, indices = prompts(model, [9, 4]), pictures(model, 2)
    expected = model(ids, indices).logits
    model.attention = "flex"
    found = model(ids, indices).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_flex_attention_trains_on_cuda():
    model = build(dtype=torch.float32, head_dim=FLEX_HEAD_WIDTH).cuda().train()
    ids, indices = prompts(model, [9, 4]).cuda(), pictures(model, 2).cuda()
    gradients = {}
    for attention in ("sdpa", "flex"):
        model.attention = attention
        model.zero_grad()
        model(ids, indices).loss.backward()
        gradients[attention] = {n: p.grad.clone() for n, p in model.named_parameters()}
    for name, expected in gradients["sdpa"].items():
        torch.testing.assert_close(gradients["flex"][name], expected, rtol=1e-3, atol=1e-4)


def test_an_image_does_not_depend_on_its_batch():
    """In float64: float32 logits of another batch may differ in their last bits."""
    model = build()
    ids, negative = prompts(model, [9, 4, 6, 9]), prompts(model, [3], seed=8)
    options = {"top_k": (30, 10, 5), "top_p": (0.95, 0.9, 0.0)}
    together = model.generate_tokens(ids, negative, seed=20, **options)
    for row in range(4):
        alone = model.generate_tokens(ids[row : row + 1], negative, seed=20 + row, **options)
        assert torch.equal(alone[0], together[row])
    turned = model.generate_tokens(ids.flip(0), negative, seed=[23, 22, 21, 20], **options)
    assert torch.equal(turned.flip(0), together)


def test_seeds():
    model = build(dtype=torch.float32)
    ids = prompts(model, [9]).expand(3, -1)
    options = {"guidance": 0.0, "top_k": (CODES,), "top_p": (1.0,)}
    same = model.generate_tokens(ids, None, seed=[1, 1, 2], **options)
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])
    torch.manual_seed(0)
    first = model.generate_tokens(ids, None, **options)
    second = model.generate_tokens(ids, None, **options)
    torch.manual_seed(0)
    assert torch.equal(first, model.generate_tokens(ids, None, **options))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_every_draw_has_its_own_numbers(monkeypatch):
    """Offset and count of the draws of an image: no number of its seed is used twice."""
    model, used = build(dtype=torch.float32), []

    class Spy(MultiStepSampler):
        def draw(self, scale, step, logits, *arguments, offset, **options):
            used.extend(offset.expand(logits.shape[:2])[0].tolist())
            return super().draw(scale, step, logits, *arguments, offset=offset, **options)

    monkeypatch.setattr(generation, "MultiStepSampler", Spy)
    model.generate_tokens(prompts(model, [9]), None, guidance=0, seed=0)
    assert len(used) == 1 + 3 * (model.config.image_tokens - 1)
    assert len(set(used)) == len(used)


@pytest.mark.parametrize("guidance", [0.0, 7.5])
def test_positions_computed(guidance):
    """9 scales in three steps after 61 text positions: 2,509 positions, 8,005 without the cache."""
    scales, text = (1, 2, 4, 6, 8, 10, 12, 14, 16), 61
    model = build(
        tokenizer=image_tokenizer(scales),
        dtype=torch.float32,
        num_hidden_layers=1,
        max_position_embeddings=text - 1 + sum(s * s for s in scales),
    )
    computed = []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, arguments: computed.append(arguments[0].shape)
    )
    ids = prompts(model, [text], text=text)
    tokens = model.generate_tokens(ids, ids, guidance=guidance, seed=0)
    rows = 1 if guidance == 0 else 2
    assert all(shape[0] == rows for shape in computed)
    positions = sum(shape[1] for shape in computed)
    ends = [sum(s * s for s in scales[: i + 1]) for i in range(len(scales))]
    cacheless = text + 3 * sum(text - 1 + end for end in ends[1:])
    assert (positions, cacheless, len(computed)) == (2509, 8005, 25)
    assert positions <= 0.34 * cacheless
    assert tokens.shape == (1, 817)


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.name()
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "is_nonzero"))
        assert name != "aten::_to_copy", "a copy between devices or dtypes"
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("padded", [True, False])
def test_a_scale_does_not_wait_for_the_host(padded):
    model = build(dtype=torch.float32)
    sequence = model.sequence(TEXT)
    ids = prompts(model, [5 if padded else 9])
    valid = ids != model.config.pad_id
    with torch.no_grad():
        session = generation.Session(model, sequence, 1, padded)
        session.prompts = ids, valid
        session.run_first()
        with NoWaiting():
            logits = session.run_scale(1, torch.randn(1, sum(DIMS), 2, 2))
    assert logits.shape == (1, 4, CODES)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs(dtype):
    model = build(dtype=dtype).cuda()
    for lengths in ([9, 4], [9, 9]):
        ids = prompts(model, lengths).cuda()
        negative = prompts(model, [5], seed=8).cuda()
        for seed in (3, 4):
            eager = model.generate_tokens(ids, negative, seed=seed)
            graphs = model.generate_tokens(ids, negative, seed=seed, cuda_graphs=True)
            assert torch.equal(graphs, eager)


def test_transformers_takes_no_part(tmp_path, monkeypatch):
    """Whatever its version does to its layers."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    model = build("qwen3", dtype=torch.float32).train()
    ids, indices = prompts(model, [9, 4]), pictures(model, 2)
    model(ids, indices).loss.backward()
    model.save_pretrained(tmp_path)
    again = TextToImage.from_pretrained(tmp_path)
    tokens = model.eval().generate_tokens(ids, ids[:1], seed=3)
    assert torch.equal(again.generate_tokens(ids, ids[:1], seed=3), tokens)


def test_half_precision_and_images():
    """bfloat16 weights; the tokenizer stays as it is."""
    model = build(dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.tokenizer.quantizer.codebooks[0].dtype == torch.float32
    text = text_tokenizer()
    found = model.generate(["a red dog", "a cat"], text, seed=0, negative_prompt="")
    assert found.shape == (2, 3, 16, 16)
    assert found.dtype == torch.uint8
    ids, mask = encode_prompts(["a red dog", "a cat"], text, model.config)
    negative, _ = encode_prompts([""], text, model.config)
    tokens = model.generate_tokens(ids, negative, attention_mask=mask, seed=0)
    images, _ = model.tokenizer.decode(tokens)
    expected = (127.5 * images.double() + 128).clamp(0, 255)
    assert int((found.double() - expected).abs().max()) < 1


# ---------------------------------------------------------------------- the sequence


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(1, 5),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
def test_mask_is_the_definition(more, text, lengths):
    scales = (1, *more)
    sequence = NextScaleSequence(scales, text)
    valid = torch.zeros(len(lengths), text, dtype=torch.bool)
    for row, length in zip(valid, lengths, strict=True):
        row[max(text - length, 0) :] = True
    of_scale = [0] * (text - 1) + [i for i, side in enumerate(scales) for _ in range(side * side)]
    p, length = text - 1, text - 1 + sum(side * side for side in scales)
    assert sequence.length == length == len(of_scale)
    mask = sequence.mask(valid)
    assert mask.shape == (len(lengths), 1, length, length)
    for row in range(len(lengths)):
        for i in range(length):
            for j in range(length):
                sees = j <= i or (i >= p and of_scale[j] <= of_scale[i])
                sees = sees and (j >= text or bool(valid[row, j]))
                assert bool(mask[row, 0, i, j]) == (sees or i == j)
    for scale in range(len(scales)):
        first, end = sequence.positions(scale)
        assert of_scale[first:end] == [scale] * scales[scale] ** 2
        part = sequence.mask(valid, first, end)
        assert torch.equal(part, mask[:, :, first:end, :end])
        assert not mask[:, :, first:end, end:].any()
        # What generation relies on: one row stands for a scale.
        assert torch.equal(part, part[:, :, :1].expand_as(part))
    scale_ids = sequence.scale_ids().tolist()
    assert scale_ids == [0] * text + [scale + 1 for scale in of_scale[text:]]
    flex = sequence.block_mask(valid)
    grid = torch.meshgrid(*(torch.arange(n) for n in (len(lengths), length, length)), indexing="ij")
    assert torch.equal(flex.mask_mod(grid[0], 0, grid[1], grid[2]), mask[:, 0])


def test_qk_norm_is_the_formula():
    """eps inside the root, per head, before RoPE; small weights make eps matter."""
    model = build()
    with torch.no_grad():
        attention = model.model.layers[0].self_attn
        attention.q_proj.weight.mul_(1e-3)
        attention.k_proj.weight.mul_(1e-3)
    oracle = Oracle.of(model)
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sees = torch.ones(5, 5, dtype=torch.bool)
    rotary = model.rotary(x, 5)
    found = attention(x.unsqueeze(0), rotary)
    torch.testing.assert_close(found[0], oracle.attention(x, 0, list(range(5)), sees))
    expected_query = attention.q_proj(x).view(5, 4, 8)
    expected_query = expected_query / (expected_query.square().mean(-1, True) + 1e-6).sqrt()
    weight = attention.qknorm["query_norm"].weight
    norm = attention.qknorm["query_norm"](attention.q_proj(x).view(5, 4, 8))
    torch.testing.assert_close(norm, expected_query * weight)


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_reaches_every_parameter(family):
    model = build(family).train()
    assert not model.tokenizer.training
    model(prompts(model, [9, 5]), pictures(model, 2)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name
    # Every position and every level but the unused one takes part.
    assert (model.model.pos_1LC.grad != 0).any(1).all()
    used = (model.model.lvl_embed.weight.grad != 0).any(1)
    assert used.tolist() == [True, False, *[True] * (len(SCALES) - 1)]
    # The head's image rows alone.
    head = (model.lm_head.weight.grad != 0).any(1)
    assert head[WORDS : WORDS + CODES].all()
    assert not head[:WORDS].any()
    assert not head[-1]
    tokenizer = list(model.tokenizer.parameters())
    assert all(not p.requires_grad and p.grad is None for p in tokenizer)
    assert not any(key.startswith("tokenizer") for key in model.state_dict())


def test_gradient_checkpointing_and_autocast():
    model = build(dtype=torch.float32).train()
    ids, indices = prompts(model, [9, 5]), pictures(model, 2)
    model(ids, indices).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    computed = []
    for layer in model.model.layers:
        layer.checkpointing = True
        layer.mlp.register_forward_hook(lambda *_: computed.append(1) and None)
    model(ids, indices).loss.backward()
    assert len(computed) == 2 * len(model.model.layers)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, indices)
    assert output.loss.dtype == torch.float32
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert abs(float((output.loss - model(ids, indices).loss).detach())) < 0.2


def test_it_memorises_a_dozen_pictures():
    """After over-fitting, greedy refinement gives each caption's picture back, token for token."""
    model = build(
        dtype=torch.float32,
        hidden_size=64,
        intermediate_size=96,
        initializer_range=0.05,
    ).train()
    ids, indices = prompts(model, [9, 8, 7, 6, 5, 4, 3, 9, 8, 7, 6, 5]), pictures(model, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for _ in range(150):
        loss = model(ids, indices).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    model.eval()
    tokens = model.generate_tokens(ids, None, guidance=0, top_k=(1,), top_p=(0.0,))
    assert torch.equal(tokens, indices)


# ---------------------------------------------------------------------- prompts


class Words:
    """A text tokenizer of one id a word, ``<img>`` in two."""

    bos_token_id = 1
    words = ("a", "red", "dog", "cat", "on", "mat")

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        if text == "<img>":
            return [3, 4]
        return [5 + self.words.index(word) for word in text.split()]


def text_tokenizer():
    return Words()


def test_prompts():
    config = TextToImageConfig(backbone(), WORDS, CODES, sum(DIMS), SCALES, prompt_length=4)
    ids, mask = encode_prompts(["a red dog on a mat", "cat", ""], text_tokenizer(), config)
    pad = WORDS + CODES
    assert config.pad_id == pad
    assert ids.tolist() == [
        [1, 5, 6, 7, 3, 4],  # cut to four
        [pad, pad, 1, 8, 3, 4],
        [pad, pad, pad, 1, 3, 4],
    ]
    assert torch.equal(mask, ids != pad)


def test_a_tokenizer_of_transformers_fits():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "<": 1, "img": 2, ">": 3, "a": 4, "dog": 5, "<unk>": 6}
    inner = Tokenizer(models.WordLevel(words, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")
    config = TextToImageConfig(backbone(), 7, CODES, sum(DIMS), SCALES, prompt_length=4)
    ids, _ = encode_prompts(["a dog"], fast, config)
    assert ids.tolist() == [[7 + CODES, 0, 4, 5, 1, 2, 3]]
    small = TextToImageConfig(backbone(), 5, CODES, sum(DIMS), SCALES)
    with pytest.raises(ConfigError, match="text vocabulary has 5"):
        encode_prompts(["a dog"], fast, small)
    with pytest.raises(ValueError, match="sequence of one string or more"):
        encode_prompts("a dog", fast, config)
    bare = Tokenizer(models.BPE({"<s>": 0, "a": 4}, []))  # leaves out what it does not know
    bare = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>")
    with pytest.raises(ConfigError, match="no ids for <img>"):
        encode_prompts(["a"], bare, config)


# ---------------------------------------------------------------------- weights


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(tmp_path, family):
    model = build(family, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = TextToImage.from_pretrained(tmp_path)
    assert loaded.config == model.config
    ids, indices = prompts(model, [9, 5]), pictures(model, 2)
    assert torch.equal(loaded(ids, indices).logits, model(ids, indices).logits)
    tokens = pictures(model, 1)
    found, expected = loaded.tokenizer.decode(tokens)[0], model.tokenizer.decode(tokens)[0]
    assert torch.equal(found, expected)
    shared = TextToImage.from_pretrained(tmp_path, model.tokenizer)
    assert shared.tokenizer is model.tokenizer


def test_a_model_of_the_old_order_is_refused(tmp_path):
    build().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    header = json.loads(file.read_text())
    file.write_text(json.dumps(header | {"version": 1}))
    with pytest.raises(CheckpointError, match="version 1, this release reads 2: since 2 a"):
        TextToImage.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": [1, 2.0]}, r"scales\[1\] must be int, got 2\.0"),
        ({"scales": [1, 2**40]}, "scales must have fewer than"),
        ({"codebook_size": "48"}, "codebook_size must be int, got '48'"),
        ({"codebook_size": 10**12}, r"codebook_size must be positive and below 2\*\*31"),
        ({"codebook_size": 10**9}, "codebook_size is 1000000000 in the configuration, the token"),
        ({"text_vocab_size": 10**9}, r"embed_tokens\.weight is \(99, 32\), not"),
        ({"backbone": None}, "backbone must be a mapping, got None"),
        ({"backbone": {"rms_norm_eps": math.nan}}, "NaN is no number of JSON"),
        ({"backbone": {"rms_norm_eps": 0}}, r"backbone\.rms_norm_eps must be positive"),
        ({"backbone": {"num_hidden_layers": 10**9}}, "has 2 layers, the configuration asks for"),
        ({"backbone": {"rope": {"rope_type": "yarn"}}}, "original_max_position_embeddings must be"),
        ({"surprise": 1}, "unknown field surprise"),
    ],
)
def test_damaged_configurations(saved, change, message):
    """In one line, before anything of their size is made."""
    folder, header = saved
    config = dict(header["config"])
    for name, value in change.items():
        nested = isinstance(value, dict)
        config[name] = config[name] | value if nested else value
    (folder / "config.json").write_text(json.dumps(header | {"config": config}))
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        TextToImage.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model's folder, and what its config.json holds."""
    folder = build().save_pretrained(tmp_path_factory.mktemp("saved"))
    return folder, json.loads((folder / "config.json").read_text())


def test_damaged_directories(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="truncated"):
        TextToImage.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        TextToImage.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "other"}')
    with pytest.raises(CheckpointError, match="no saved text-to-image model"):
        TextToImage.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_start_from_a_language_model(family, tied):
    from transformers import AutoModelForCausalLM

    config = backbone(family).to_transformers(WORDS)
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    start = AutoModelForCausalLM.from_config(config)
    model = TextToImage.from_language_model(start, image_tokenizer())
    assert model.config.vocab_size == WORDS + CODES + 1
    own = model.state_dict()
    for key, value in start.state_dict().items():
        assert torch.equal(own[key][: len(value)], value)
    assert (own["lm_head.weight"][WORDS:] != 0).any(1).all()
    with torch.no_grad():
        own["lm_head.weight"].zero_()
    assert (model.model.embed_tokens.weight != 0).any()


# ---------------------------------------------------------------------- refusals


def test_refusals():
    model = build(dtype=torch.float32)
    ids, indices = prompts(model, [9, 9]), pictures(model, 2)
    config, tokenizer = model.config, model.tokenizer
    with pytest.raises(ConfigError, match=r"scales is \(1, 2, 3, 4\).*tokenizer has \(1, 2, 4\)"):
        TextToImage(config, image_tokenizer((1, 2, 4)))
    with pytest.raises(ConfigError, match=r"codebook_size is 48.*tokenizer has 47"):
        TextToImage(config, image_tokenizer(codes=47))
    with pytest.raises(TypeError, match="tokenizer must be a TokenFlowTokenizer"):
        TextToImage(config, None)
    shape = tokenizer.config
    alone = dataclasses.replace(shape, pixel=PixelConfig(enabled=False))
    with pytest.raises(ConfigError, match=r"decodes no images \(pixel\.enabled is false\)"):
        TextToImage(config, TokenFlowTokenizer(alone))
    var = dataclasses.replace(
        shape,
        semantic=SemanticConfig(),
        quantizer=dataclasses.replace(shape.quantizer, kind="var"),
    )
    with pytest.raises(ConfigError, match="feature_dim is 14 in the configuration, the tokenizer"):
        TextToImage(config, TokenFlowTokenizer(var))
    with pytest.raises(TypeError, match="top_n"):
        model.generate_tokens(ids, ids, top_n=3)
    with pytest.raises(ValueError, match="top_k and top_p must name as many steps"):
        model.generate_tokens(ids, ids, top_k=(3,))
    with pytest.raises(ValueError, match="attention must be"):
        TextToImage(config, tokenizer, attention="eager")
    with pytest.raises(ConfigError, match=r"needs heads of 16 channels or more, .*, got 8: use"):
        TextToImage(config, tokenizer, attention="flex")
    with pytest.raises(ConfigError, match="begin with 1"):
        TextToImageConfig(scales=(2, 4))
    with pytest.raises(ConfigError, match="family must be one of"):
        BackboneConfig("gpt2")
    with pytest.raises(ConfigError, match="mlp_bias is not an option of qwen3"):
        BackboneConfig("qwen3", mlp_bias=True)

    def generate(ids=ids, negative=ids, **options):
        return model.generate_tokens(ids, negative, **options)

    too_long = torch.zeros(1, 100, dtype=torch.int64)
    for call in (generate, lambda ids: model(ids, pictures(model, 1))):
        with pytest.raises(ValueError, match=r"1 to 99 positions.*got 100"):
            call(too_long)
        with pytest.raises(TypeError, match=r"int64 tensor, got torch\.int32"):
            call(too_long.int())
    for wrong, message in ((-1, r"in \[0, 99\), got -1"), (99, "to 99"), (WORDS, "image token 50")):
        strange = ids.clone()
        strange[1, 3] = wrong
        with pytest.raises(ValueError, match=message):
            generate(strange)
        with pytest.raises(ValueError, match=f"negative_ids.*{message}"):
            generate(negative=strange)
        with pytest.raises(ValueError, match=message):
            model(strange, indices)
    with pytest.raises(ValueError, match="last position"):
        generate(attention_mask=torch.tensor([[1] * 9, [1] * 8 + [0]]))
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, 9\)"):
        model(ids, indices, torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"indices must be \(2, 30\) int64"):
        model(ids, indices[:, 1:])
    with pytest.raises(ValueError, match=r"indices must be in \[0, 48\)"):
        model(ids, indices + 40)
    with pytest.raises(ValueError, match="negative_ids must be given"):
        generate(negative=None)
    with pytest.raises(ValueError, match=r"negative_ids must be \[2 or 1, 9\]"):
        generate(negative=ids[:, 1:])
    with pytest.raises(ValueError, match="guidance must be 0 or more"):
        generate(guidance=-1.0)
    with pytest.raises(ValueError, match="top_k and top_p must name as many steps"):
        generate(top_k=(5, 1))
    with pytest.raises(ValueError, match="one for each image, got 3"):
        generate(seed=[1, 2, 3])
    with pytest.raises(ValueError, match="cuda_graphs needs the model on CUDA"):
        generate(cuda_graphs=True)
