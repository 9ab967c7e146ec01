"""MultiStepSampler with a model that writes down what it is asked, and transformers' generate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenflow_ext import MultiStepSampler, SamplingLogitsProcessor, sample_top_k_top_p
from tokenflow_ext.models.torchvision_shim import ensure_torchvision

SCALES = (1, 2, 3, 5)
CODES = 50


class ScriptedModel:
    """Logits that depend on the scale and, in refinement, on the tokens fed back."""

    def __init__(self, batch: int = 2, guided: bool = True) -> None:
        self.batch = batch
        self.guided = guided
        self.calls: list[tuple[int, Tensor | None]] = []
        self.logits: list[Tensor] = []

    def __call__(self, scale: int, tokens: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        self.calls.append((scale, tokens))
        generator = torch.Generator().manual_seed(scale)
        shape = (2, self.batch, SCALES[scale] ** 2, CODES)
        cond, uncond = torch.randn(shape, generator=generator)
        if tokens is not None:  # the next token of each is the likeliest
            cond = cond.scatter(-1, ((tokens + 1) % CODES).unsqueeze(-1), 20.0)
        self.logits.append(cond)
        return (cond, uncond) if self.guided else cond


def test_steps_feed_the_drawn_tokens_back() -> None:
    model = ScriptedModel()
    sampler = MultiStepSampler(top_k=(30, 5, 1), top_p=(0.8, 0.8, 0.0), scales=SCALES)
    tokens = sampler.sample(model, seed=3)
    assert [t.shape for t in tokens] == [(2, s * s) for s in SCALES]
    assert [scale for scale, _ in model.calls] == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len(model.calls) == sampler.model_runs == 10
    for scale, (fed, again, final) in enumerate(
        zip(model.calls[1::3], model.calls[2::3], model.calls[3::3], strict=True), start=1
    ):
        assert fed == (scale, None)
        assert again[1] is not None
        # 20 against a handful: each refinement takes the token after the one fed back.
        assert torch.equal(final[1], (again[1] + 1) % CODES)
        assert torch.equal(tokens[scale], (final[1] + 1) % CODES)


def test_every_step_draws_with_its_own_arguments() -> None:
    sampler = MultiStepSampler(
        top_k=(30, 5), top_p=(0.8, 0.6), guidance=7.5, temperature=0.9, scales=SCALES
    )
    model = ScriptedModel()
    tokens = sampler.sample(model, seed=11)
    places = [(0, 0), *((scale, step) for scale in (1, 2, 3) for step in (0, 1))]
    drawn = [*(call[1] for call in model.calls[2::2])]  # what step 0 of scales 1, 2, 3 drew
    expected = []
    for (scale, step), cond in zip(places, model.logits, strict=True):
        generator = torch.Generator().manual_seed(scale)
        uncond = torch.randn((2, *cond.shape), generator=generator)[1]
        expected.append(
            sample_top_k_top_p(
                cond,
                uncond=uncond,
                guidance=7.5 * scale / 3,
                top_k=(30, 5)[step],
                top_p=(0.8, 0.6)[step],
                temperature=0.9,
                seed=11,
                offset=(scale * 2 + step) << 32,
            )
        )
    for got, want in zip(tokens, [expected[0], *expected[2::2]], strict=True):
        assert torch.equal(got, want)
    for got, want in zip(drawn, expected[1::2], strict=True):
        assert torch.equal(got, want)


def test_presets_are_those_of_the_paper() -> None:
    scales = (1, 2, 4, 6, 8, 10, 12, 14, 16)
    three, two, one = (
        make(scales=scales)
        for make in (
            MultiStepSampler.three_step,
            MultiStepSampler.two_step,
            MultiStepSampler.single,
        )
    )
    assert (three.top_k, three.top_p) == ((1200, 100, 1), (0.8, 0.8, 0.0))
    assert (two.top_k, two.top_p) == ((1200, 1), (0.8, 0.0))
    assert (one.top_k, one.top_p) == ((600,), (0.6,))
    assert [sampler.model_runs for sampler in (three, two, one)] == [25, 17, 9]
    assert three.guidance_at(0) == 0
    assert three.guidance_at(4) == 3.75
    assert three.guidance_at(8) == 7.5
    assert MultiStepSampler(scales=(4,)).guidance_at(0) == 0


def test_seeds() -> None:
    sampler = MultiStepSampler(top_k=(30, 10), top_p=(0.9, 0.9), scales=SCALES)

    def tokens(**arguments) -> Tensor:
        drawn = sampler.sample(ScriptedModel(guided=False), **arguments)
        return torch.cat(drawn, dim=1)

    assert torch.equal(tokens(seed=1), tokens(seed=1))
    assert (tokens(seed=1) != tokens(seed=2)).any()
    assert torch.equal(tokens(seed=torch.tensor(1)), tokens(seed=1))
    generator = torch.Generator()
    first = tokens(generator=generator.manual_seed(4))
    assert (first != tokens(generator=generator)).any()
    assert torch.equal(first, tokens(generator=generator.manual_seed(4)))


def test_a_seed_for_each_image() -> None:
    """An image's tokens do not depend on its batch, and its rows do not draw alike."""
    sampler = MultiStepSampler(top_k=(30, 10), top_p=(0.9, 0.9), scales=SCALES)
    logits = [torch.randn(3, s * s, CODES) for s in SCALES]
    seeds = torch.tensor([5, 9, 5])

    def tokens(rows: list[int]) -> list[Tensor]:
        return sampler.sample(lambda scale, _: logits[scale][rows], seed=seeds[rows])

    together = tokens([0, 1, 2])
    for row in range(3):
        alone = tokens([row])
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together, alone, strict=True))
    same = sampler.draw(3, 0, torch.zeros(3, 25, CODES), seed=seeds)
    assert len(same[0].unique()) > 5
    assert torch.equal(same[0], same[2])
    assert (same[0] != same[1]).any()
    with pytest.raises(ValueError, match="seed must be one number or one for each of 3 images"):
        sampler.draw(1, 0, logits[1], seed=seeds[:2])


def test_a_slice_of_the_vocabulary() -> None:
    sampler = MultiStepSampler(scales=SCALES, vocab=(10, 40), top_k=(20, 1), top_p=(0.8, 0.0))
    drawn = sampler.sample(ScriptedModel(), seed=1)
    assert all(((t >= 0) & (t < 30)).all() for t in drawn)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="top_k and top_p must name as many steps"):
        MultiStepSampler(top_k=(1, 2), top_p=(0.0,))
    with pytest.raises(ValueError, match="scales must not be empty"):
        MultiStepSampler(scales=())
    with pytest.raises(ValueError, match="scale must be 0 to 3, got 4"):
        MultiStepSampler(scales=SCALES).sample_scale(4, ScriptedModel())


# ------------------------------------------------------------------ transformers


def test_processor_leaves_one_token() -> None:
    scores = torch.randn(4, 60, generator=torch.Generator().manual_seed(0))
    processor = SamplingLogitsProcessor(top_k=20, top_p=0.9, vocab=(10, 50), seed=5)
    for call in range(3):
        left = processor(torch.empty(4, 0, dtype=torch.int64), scores)
        drawn = sample_top_k_top_p(
            scores, top_k=20, top_p=0.9, vocab=(10, 50), seed=5, offset=4 * call
        )
        assert torch.equal(left.argmax(-1), drawn + 10)
        assert torch.equal(left.softmax(-1), torch.nn.functional.one_hot(drawn + 10, 60).float())


def test_processor_guides_by_halves() -> None:
    scores = torch.randn(6, 60, generator=torch.Generator().manual_seed(0))
    processor = SamplingLogitsProcessor(top_k=20, guidance=3.0, seed=5)
    left = processor(torch.empty(6, 0, dtype=torch.int64), scores)
    drawn = sample_top_k_top_p(scores[:3], uncond=scores[3:], guidance=3.0, top_k=20, seed=5)
    assert torch.equal(left.argmax(-1), drawn.repeat(2))
    with pytest.raises(ValueError, match="got 5 rows"):
        processor(torch.empty(5, 0, dtype=torch.int64), scores[:5])


@pytest.mark.parametrize("do_sample", [False, True])
def test_generate(do_sample: bool) -> None:
    ensure_torchvision()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=90,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            eos_token_id=None,
            bos_token_id=1,
            pad_token_id=0,
        )
    ).eval()
    prompt = torch.tensor([[1, 5, 7], [1, 9, 4]])

    def generate(seed: int) -> Tensor:
        processor = SamplingLogitsProcessor(top_k=30, top_p=0.9, vocab=(40, 90), seed=seed)
        ids = model.generate(
            prompt, max_new_tokens=8, do_sample=do_sample, logits_processor=[processor]
        )
        return ids[:, 3:]

    tokens = generate(1)
    assert tokens.shape == (2, 8)
    assert ((tokens >= 40) & (tokens < 90)).all()
    assert torch.equal(tokens, generate(1))
    assert (tokens != generate(2)).any()
    ids = prompt
    for step in range(8):  # by hand
        with torch.no_grad():
            logits = model(ids).logits[:, -1]
        drawn = sample_top_k_top_p(
            logits, top_k=30, top_p=0.9, vocab=(40, 90), seed=1, offset=2 * step
        )
        ids = torch.cat([ids, drawn.unsqueeze(1) + 40], dim=1)
    assert torch.equal(tokens, ids[:, 3:])
