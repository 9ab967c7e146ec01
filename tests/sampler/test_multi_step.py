"""MultiStepSampler with a model that writes down what it is asked, and transformers' generate."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenflow_ext import MultiStepSampler, SamplingLogitsProcessor, sample_top_k_top_p
from tokenflow_ext.models.torchvision_shim import ensure_torchvision
from tokenflow_ext.reference import filtered_probabilities
from tokenflow_ext.sampler import PRESETS, SamplingConfig

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


def test_min_p_of_the_steps() -> None:
    logits = torch.randn(2, 9, CODES)
    for min_p, steps in [(0.3, (0.3, 0.3)), ((0.05, 0.6), (0.05, 0.6)), (0.0, (0.0, 0.0))]:
        sampler = MultiStepSampler(top_k=(30, 5), top_p=(0.8, 0.6), scales=SCALES, min_p=min_p)
        for step, value in enumerate(steps):
            expected = sample_top_k_top_p(
                logits,
                top_k=(30, 5)[step],
                top_p=(0.8, 0.6)[step],
                min_p=value,
                seed=2,
                offset=(2 * 2 + step) << 32,
            )
            assert torch.equal(sampler.draw(2, step, logits, seed=2), expected)
    with pytest.raises(ValueError, match="min_p must be one number or one for each of 2 steps"):
        MultiStepSampler(top_k=(1, 2), top_p=(0.0, 0.0), min_p=(0.1,))


def test_presets_are_those_of_the_paper() -> None:
    scales = (1, 2, 4, 6, 8, 10, 12, 14, 16)
    three, two, one = (MultiStepSampler.preset(name, scales=scales) for name in PRESETS)
    assert (three.top_k, three.top_p) == ((1200, 100, 1), (0.8, 0.8, 0.0))
    assert (two.top_k, two.top_p) == ((1200, 1), (0.8, 0.0))
    assert (one.top_k, one.top_p) == ((600,), (0.6,))
    assert [sampler.model_runs for sampler in (three, two, one)] == [25, 17, 9]
    assert three.guidance_at(0) == 0
    assert three.guidance_at(4) == 3.75
    assert three.guidance_at(8) == 7.5
    assert MultiStepSampler(scales=(4,)).guidance_at(0) == 0


def test_settings_are_one_dataclass() -> None:
    config = SamplingConfig.preset("two", guidance=3.0, temperature=0.5)
    sampler = MultiStepSampler.of(config, scales=SCALES, vocab=(3, 40))
    assert sampler == MultiStepSampler((1200, 1), (0.8, 0.0), 0.0, 3.0, 0.5, SCALES, (3, 40))
    assert MultiStepSampler.of(sampler, scales=SCALES) == sampler.replace(vocab=None)
    assert config.replace(guidance=0.0) == SamplingConfig.preset(
        "two", guidance=0.0, temperature=0.5
    )
    with pytest.raises(ValueError, match="preset must be one of three, two, one, got 'four'"):
        SamplingConfig.preset("four")
    with pytest.raises(TypeError, match="top_n"):
        config.replace(top_n=3)
    with pytest.raises(ValueError, match="as many steps, at least one"):
        SamplingConfig(top_k=(), top_p=())


@pytest.mark.parametrize(
    ("old", "new"), [("three_step", "three"), ("two_step", "two"), ("single", "one")]
)
def test_presets_by_their_names_of_before(old: str, new: str) -> None:
    with pytest.warns(
        DeprecationWarning, match=rf'{old} is now MultiStepSampler.preset\("{new}"\)'
    ):
        sampler = getattr(MultiStepSampler, old)(scales=SCALES)
    assert sampler == MultiStepSampler.preset(new, scales=SCALES)


def test_offsets_of_the_caller() -> None:
    """Positions in the stream for every token, with a seed for each image, or one for all."""
    sampler = MultiStepSampler(top_k=(30, 10), top_p=(0.9, 0.9), scales=SCALES, guidance=0.0)
    logits = [torch.randn(3, s * s, CODES) for s in SCALES]
    seeds = torch.tensor([5, 9, 5])

    def offsets(scale: int, step: int) -> Tensor:
        return 1000 * scale + 100 * step + torch.arange(SCALES[scale] ** 2)

    tokens = sampler.sample(lambda scale, _: logits[scale], seed=seeds, offsets=offsets)
    for scale, drawn in enumerate(tokens):
        step = 0 if scale == 0 else 1
        for image in range(3):
            for number, row in enumerate(logits[scale][image]):
                expected = sample_top_k_top_p(
                    row,
                    top_k=(30, 10)[step],
                    top_p=0.9,
                    seed=int(seeds[image]),
                    offset=1000 * scale + 100 * step + number,
                )
                assert drawn[image, number] == expected
    with pytest.raises(ValueError, match="seed must be one number or one for each of 3 images"):
        sampler.draw(1, 0, logits[1], seed=seeds[:2], offset=offsets(1, 0))
    with pytest.raises(ValueError, match="offset must be one number or one for each row"):
        sampler.draw(1, 0, logits[1], seed=seeds, offset=torch.arange(5))


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


IDS = torch.empty(0, 0, dtype=torch.int64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_processor_filters_as_the_sampler_does() -> None:
    scores = randn(4, 60) * 3
    filters = {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "temperature": 0.7}
    left = SamplingLogitsProcessor(**filters, vocab=(10, 50))(IDS, scores)
    expected = filtered_probabilities(scores.double(), vocab=(10, 50), **filters)
    assert type(left) is Tensor
    assert torch.allclose(left.softmax(-1)[:, 10:50].double(), expected, atol=1e-6)
    assert (left[:, :10] == -torch.inf).all()
    assert (left[:, 50:] == -torch.inf).all()
    # What stays is as it was.
    left = SamplingLogitsProcessor(top_k=200, min_p=0.1)(IDS, scores)
    assert torch.equal(left, torch.where(left > -torch.inf, scores, -torch.inf))
    assert 4 < (left > -torch.inf).sum() < 120


def test_processor_draws_with_a_seed() -> None:
    scores = randn(4, 60)
    processor = SamplingLogitsProcessor(top_k=20, top_p=0.9, vocab=(10, 50), seed=np.int64(5))
    for call in range(3):
        drawn = torch.multinomial(processor(IDS, scores).softmax(-1), num_samples=1).squeeze(1)
        assert type(drawn) is Tensor
        expected = sample_top_k_top_p(
            scores, top_k=20, top_p=0.9, vocab=(10, 50), seed=5, offset=4 * call
        )
        assert torch.equal(drawn, expected + 10)
    # Of what other processors leave.
    left = processor(IDS, scores)
    only = left == left.amax(-1, keepdim=True)
    drawn = left.masked_fill(~only, -torch.inf).softmax(-1).multinomial(1)
    assert torch.equal(drawn.squeeze(1), scores[:, 10:50].argmax(-1) + 10)
    generator = torch.Generator().manual_seed(1)
    processor = SamplingLogitsProcessor(generator=generator)
    first = torch.multinomial(processor(IDS, scores).softmax(-1), 1)
    assert torch.equal(
        first.squeeze(1), sample_top_k_top_p(scores, generator=generator.manual_seed(1))
    )
    kept = pickle.loads(pickle.dumps([left, copy.deepcopy(left)]))
    assert all(type(x) is Tensor and torch.equal(x, left) for x in kept)


def test_one_processor_after_another() -> None:
    """The draw is that of the one with the seed, of what both leave."""
    scores = randn(4, 60)
    left = SamplingLogitsProcessor(top_k=20)(IDS, SamplingLogitsProcessor(seed=5)(IDS, scores))
    drawn = torch.multinomial(left.softmax(-1), 1).squeeze(1)
    assert torch.equal(drawn, sample_top_k_top_p(scores, top_k=20, seed=5))
    with pytest.raises(ValueError, match="only one SamplingLogitsProcessor"):
        SamplingLogitsProcessor(guidance=2.0)(IDS, left)


@pytest.mark.parametrize("size", [1.0, 3e38])
def test_processor_guides_by_halves(size: float) -> None:
    scores = randn(6, 60).clamp(-1, 1) * size
    processor = SamplingLogitsProcessor(top_k=20, guidance=3.0, seed=5)
    left = processor(IDS, scores)
    drawn = sample_top_k_top_p(scores[:3], uncond=scores[3:], guidance=3.0, top_k=20, seed=5)
    assert torch.equal(left.softmax(-1).multinomial(1).squeeze(1), drawn.repeat(2))
    assert torch.equal(left[:3], left[3:])
    # Without a seed too: one token for both.
    left = SamplingLogitsProcessor(guidance=3.0)(IDS, scores)
    drawn = torch.multinomial(left.softmax(-1), 1)
    assert torch.equal(drawn[:3], drawn[3:])
    with pytest.raises(ValueError, match="got 5 rows"):
        processor(IDS, scores[:5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 2**31}, "top_k must be at most"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"top_p": 1.5}, "top_p must be at most 1"),
        ({"min_p": float("nan")}, "min_p must be at most 1"),
        ({"temperature": 0}, "temperature must be positive"),
        ({"guidance": float("inf")}, "guidance must be finite"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"seed": 1, "generator": torch.Generator()}, "seed and generator exclude"),
    ],
)
def test_processor_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingLogitsProcessor(**arguments)


def test_processor_looks_at_its_scores() -> None:
    scores = randn(3, 60)
    for bad in (torch.full((60,), torch.finfo(torch.float32).min), *torch.eye(60)[:2].log().neg()):
        scores[1] = bad
        with pytest.raises(ValueError, match=r"leave a token to draw .* not so in row 1"):
            SamplingLogitsProcessor(top_k=5)(IDS, scores)
    scores[1, 3] = torch.nan
    with pytest.raises(ValueError, match=r"neither a NaN nor \+infinity, not so in row 1"):
        SamplingLogitsProcessor()(IDS, scores)
    with pytest.raises(ValueError, match=r"scores must be \[B, V\], got shape \[60\]"):
        SamplingLogitsProcessor()(IDS, scores[0])
    with pytest.raises(ValueError, match="vocab must be a slice"):
        SamplingLogitsProcessor(vocab=(0, 61))(IDS, scores)


@pytest.fixture(scope="module")
def llama() -> Any:
    ensure_torchvision()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=90,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        eos_token_id=None,
        bos_token_id=1,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


PROMPT = torch.tensor([[1, 5, 7], [1, 9, 4]])


@pytest.mark.parametrize("behind", [{}, {"min_p": 0.05}, {"typical_p": 0.9, "temperature": 0.8}])
def test_generate_draws_with_the_seed(llama: Any, behind: dict[str, float]) -> None:
    def generate(seed: int) -> Any:
        processor = SamplingLogitsProcessor(top_k=30, top_p=0.9, vocab=(40, 90), seed=seed)
        return llama.generate(
            PROMPT,
            max_new_tokens=8,
            do_sample=True,
            top_k=0,
            logits_processor=[processor],
            return_dict_in_generate=True,
            output_scores=True,
            **behind,
        )

    out = generate(1)
    tokens = out.sequences[:, 3:]
    assert type(out.sequences) is Tensor
    assert tokens.shape == (2, 8)
    assert ((tokens >= 40) & (tokens < 90)).all()
    assert torch.equal(tokens, generate(1).sequences[:, 3:])
    assert (tokens != generate(2).sequences[:, 3:]).any()
    # The scores are those drawn from, in the seed's stream.
    for step, scores in enumerate(out.scores):
        drawn = sample_top_k_top_p(scores, seed=1, offset=2 * step)
        assert torch.equal(drawn, tokens[:, step])
    log_p = llama.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    expected = torch.stack([s.log_softmax(-1) for s in out.scores], 1).gather(2, tokens[..., None])
    assert torch.allclose(log_p, expected.squeeze(2), atol=1e-6)
    assert (log_p < 0).any()
    if behind:
        return
    ids = PROMPT
    for step in range(8):  # by hand
        with torch.no_grad():
            logits = llama(ids).logits[:, -1]
        drawn = sample_top_k_top_p(
            logits, top_k=30, top_p=0.9, vocab=(40, 90), seed=1, offset=2 * step
        )
        ids = torch.cat([ids, drawn.unsqueeze(1) + 40], dim=1)
    assert torch.equal(tokens, ids[:, 3:])


@pytest.mark.parametrize(
    "behind",
    [
        {"min_p": 0.3},
        {"typical_p": 0.5},
        {"epsilon_cutoff": 0.02},
        {"eta_cutoff": 0.05},
        {"top_k": 3},
        {"top_p": 0.4},
        {"temperature": 0.5},
        {"repetition_penalty": 2.0},
        {"renormalize_logits": True, "num_return_sequences": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [None, 3])
def test_filters_of_generate_are_felt_as_without_ours(
    llama: Any, behind: dict[str, Any], seed: int | None
) -> None:
    def first_scores(**arguments: Any) -> Tensor:
        torch.manual_seed(0)
        return llama.generate(
            PROMPT,
            max_new_tokens=1,
            do_sample=True,
            return_dict_in_generate=True,
            output_scores=True,
            **({"top_k": 0} | behind | arguments),
        ).scores[0]

    ours = first_scores(logits_processor=[SamplingLogitsProcessor(seed=seed)])
    assert torch.equal(ours, first_scores())


@pytest.mark.parametrize("seed", [None, 1])
def test_beams_are_those_of_the_filtered_scores(llama: Any, seed: int | None) -> None:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper

    def generate(processors: list[Any], **arguments: Any) -> Any:
        return llama.generate(
            PROMPT,
            max_new_tokens=5,
            num_beams=3,
            num_return_sequences=3,
            logits_processor=processors,
            return_dict_in_generate=True,
            output_scores=True,
            **arguments,
        )

    theirs = generate([TemperatureLogitsWarper(0.8), TopKLogitsWarper(10), MinPLogitsWarper(0.02)])
    processor = SamplingLogitsProcessor(temperature=0.8, top_k=10, min_p=0.02, seed=seed)
    ours = generate([processor])
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.allclose(ours.sequences_scores, theirs.sequences_scores)
    assert processor.drawn == 0
    # Guidance by halves: both search the same beams.
    guided = generate([SamplingLogitsProcessor(guidance=2.0, top_k=10)], renormalize_logits=True)
    assert torch.equal(guided.sequences[:3, 3:], guided.sequences[3:, 3:])
    # Beams that are drawn: as ever without a seed, else refused.
    torch.manual_seed(0)
    theirs = generate([TopKLogitsWarper(10)], do_sample=True, top_k=0)
    torch.manual_seed(0)
    processor = SamplingLogitsProcessor(top_k=10, seed=seed)
    if seed is None:
        ours = generate([processor], do_sample=True, top_k=0)
        assert torch.equal(ours.sequences, theirs.sequences)
    else:
        with pytest.raises(ValueError, match="num_beams"):
            generate([processor], do_sample=True, top_k=0)


def test_without_do_sample_nothing_is_drawn(llama: Any) -> None:
    greedy = llama.generate(PROMPT, max_new_tokens=5, do_sample=False)
    ours = [SamplingLogitsProcessor(top_k=1200, top_p=0.8)]
    assert torch.equal(llama.generate(PROMPT, max_new_tokens=5, logits_processor=ours), greedy)
    ours = [SamplingLogitsProcessor(guidance=2.0)]
    guided = llama.generate(PROMPT, max_new_tokens=5, logits_processor=ours)
    assert torch.equal(guided[0, 3:], guided[1, 3:])
    for source in ({"seed": 1}, {"generator": torch.Generator()}):
        with pytest.raises(ValueError, match="pass do_sample=True"):
            llama.generate(
                PROMPT, max_new_tokens=5, logits_processor=[SamplingLogitsProcessor(**source)]
            )


@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_assisted_decoding(llama: Any, how: str) -> None:
    """Greedy: the tokens of plain decoding. Drawn: none but those that stay. A seed: refused."""
    arguments = {"prompt_lookup_num_tokens": 3} if how == "prompt lookup" else {}
    if how == "assistant":
        arguments = {"assistant_model": copy.deepcopy(llama)}
    prompt = torch.tensor([[1, 5, 7, 1, 5, 7, 1, 5]])

    def generate(processor: SamplingLogitsProcessor, **more: Any) -> Tensor:
        # An end that no processor below leaves: prompt lookup of transformers 5.0 asks for one.
        more = {"eos_token_id": 0, "max_new_tokens": 6, **more}
        return llama.generate(prompt, logits_processor=[processor], **more)

    processor = SamplingLogitsProcessor(vocab=(3, 60), top_k=9)
    assert torch.equal(generate(processor, **arguments), generate(processor))
    drawn = generate(processor, do_sample=True, **arguments)
    assert ((drawn[:, 8:] >= 3) & (drawn[:, 8:] < 60)).all()
    with pytest.raises(ValueError, match="assistant_model"):
        generate(SamplingLogitsProcessor(vocab=(3, 60), seed=1), do_sample=True, **arguments)
