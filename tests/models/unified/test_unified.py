"""One transformer both ways: text as transformers runs it, answers re-derived, drawings kept."""

from __future__ import annotations

import math

import hub_server
import pytest
import torch
from tiny_models import FAMILIES, backbone, image_tokenizer, pictures
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    pipeline,
)
from understanding_models import expected_features, picture, pixels, question, text_tokenizer

from tokenflow_ext.models import (
    ConfigError,
    TextToImage,
    TextToImageConfig,
    as_text_to_image,
    build_processor,
    build_unified,
    encode_prompts,
    push_understanding,
)
from tokenflow_ext.models.understanding.build import with_image_token
from tokenflow_ext.models.unified.language_model import TokenFlowForCausalLM, TokenFlowTextConfig


def text_to_image(family="llama", text=None, seed=1, **changes):
    """A model whose norms are far from one another's."""
    text = with_image_token(text_tokenizer()) if text is None else text
    tokenizer = image_tokenizer()
    torch.manual_seed(seed)
    changes = {"max_position_embeddings": 256, **changes}
    shape = TextToImageConfig.for_tokenizer(backbone(family, **changes), tokenizer, len(text), 7)
    model = TextToImage(shape, tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def unified(family="llama", features="last", **options):
    """(model, processor)"""
    text = with_image_token(text_tokenizer())
    model = build_unified(text_to_image(family), text, features, **options)
    return model, build_processor(model, text)


def norm(x, weight, eps):
    return x * weight / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def derived(state, shape, x):
    """The transformer written out: hidden states of one sequence [n, hidden], in float64."""
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    width = shape.hidden_size // heads
    n = len(x)
    angle = torch.outer(
        torch.arange(n, dtype=torch.float64),
        shape.rope_theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width),
    )
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotated(v):  # channels c and c + width / 2 are a complex number
        pairs = torch.complex(v[..., : width // 2], v[..., width // 2 :]) * turn
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    def split(v, count):
        return v.view(n, count, width).transpose(0, 1)

    for number in range(shape.num_hidden_layers):
        own = {
            key.removeprefix(f"layers.{number}."): value
            for key, value in state.items()
            if key.startswith(f"layers.{number}.")
        }

        def linear(name, v, own=own):
            out = v @ own[f"{name}.weight"].T
            return out + own.get(f"{name}.bias", 0)

        names = ("qknorm.query_norm", "qknorm.key_norm")
        eps = 1e-6
        if shape.family == "qwen3":
            names, eps = ("q_norm", "k_norm"), shape.rms_norm_eps
        query = norm(
            split(linear("self_attn.q_proj", x), heads), own[f"self_attn.{names[0]}.weight"], eps
        )
        key = norm(
            split(linear("self_attn.k_proj", x), groups), own[f"self_attn.{names[1]}.weight"], eps
        )
        value = split(linear("self_attn.v_proj", x), groups)
        key = rotated(key).repeat_interleave(heads // groups, 0)
        value = value.repeat_interleave(heads // groups, 0)
        scores = rotated(query) @ key.mT / math.sqrt(width)
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
        out = (scores.softmax(-1) @ value).transpose(0, 1).reshape(n, -1)
        out = linear("self_attn.o_proj", out)
        x = x + norm(out, own["input_layernorm.weight"], shape.rms_norm_eps)
        gate = linear("mlp.gate_proj", x)
        out = linear("mlp.down_proj", gate * torch.sigmoid(gate) * linear("mlp.up_proj", x))
        x = x + norm(out, own["post_attention_layernorm.weight"], shape.rms_norm_eps)
    return norm(x, state["norm.weight"], shape.rms_norm_eps)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_answers_are_those_of_the_transformer_written_out(family):
    model, processor = unified(family)
    shape = model.config.text_config.text_to_image_config.backbone
    prompt = processor.apply_chat_template(question(), add_generation_prompt=True)
    given = processor(text=[prompt], images=[picture()], return_tensors="pt")
    found = model(**given, use_cache=False).logits[0]
    state = {k: v.double() for k, v in model.model.language_model.state_dict().items()}
    ids, image_id = given["input_ids"][0], model.config.image_token_id
    inputs = state["embed_tokens.weight"][ids]
    own = {k: v.double() for k, v in model.model.multi_modal_projector.state_dict().items()}
    visual = expected_features(model.model.vision_tower.tokenizer, given["pixel_values"], "last")
    visual = visual[0] @ own["linear_1.weight"].T + own["linear_1.bias"]
    visual = 0.5 * visual * (1 + torch.erf(visual / math.sqrt(2)))
    inputs[ids == image_id] = visual @ own["linear_2.weight"].T + own["linear_2.bias"]
    hidden = derived(state, shape, inputs)
    expected = hidden @ model.lm_head.weight.double().T
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_with_a_cache_in_a_padded_batch_as_alone():
    model, processor = unified()
    processor.tokenizer.padding_side = "left"
    texts = [
        processor.apply_chat_template(question(said), add_generation_prompt=True)
        for said in ("What color is it?", "Is there a blue triangle in the image? Say yes or no")
    ]
    images = [picture(1), picture(2)]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    together = processor(text=texts, images=images, padding=True, return_tensors="pt")
    assert together["attention_mask"].min() == 0  # one is padded
    found = model.generate(**together, **options)[:, -6:]
    for text, image, row in zip(texts, images, found, strict=True):
        given = processor(text=[text], images=[image], return_tensors="pt")
        assert torch.equal(model.generate(**given, **options)[0, -6:], row)
        # Without a cache, word by word.
        ids = given["input_ids"]
        for word in row:
            logits = model(
                input_ids=ids, pixel_values=given["pixel_values"], use_cache=False
            ).logits[0, -1]
            logits[model.generation_config.suppress_tokens] = -math.inf
            if model.generation_config.eos_token_id is not None:
                logits[model.generation_config.eos_token_id] = -math.inf  # of min_new_tokens
            assert logits.argmax() == word
            ids = torch.cat([ids, word.view(1, 1)], dim=1)


@torch.no_grad()
def test_only_text_is_written():
    model, processor = unified()
    prompt = processor.apply_chat_template(question(), add_generation_prompt=True)
    given = processor(text=[prompt], images=[picture()], return_tensors="pt")
    torch.manual_seed(0)
    found = model.generate(
        **given, max_new_tokens=40, do_sample=True, temperature=10.0, top_k=0,
        num_return_sequences=4,
    )[:, given["input_ids"].shape[1] :]  # fmt: skip
    assert found.max() < len(processor.tokenizer)
    assert not (found == model.config.image_token_id).any()


@torch.no_grad()
def test_drawings_are_those_of_before():
    text = with_image_token(text_tokenizer())
    before, same = text_to_image(), text_to_image()
    ids, mask = encode_prompts(["red circle", "a"], text, before.config)
    tokens = pictures(before, 2)
    drawing = as_text_to_image(build_unified(same, text))
    expected, found = before(ids, tokens, mask), drawing(ids, tokens, mask)
    assert torch.equal(found.logits, expected.logits)
    drawn = [
        model.generate(["red circle"], text, negative_prompt="", seed=3)
        for model in (before, drawing)
    ]
    assert torch.equal(*drawn)
    assert list(drawing.state_dict()) == list(before.state_dict())


def test_both_ways_are_one_set_of_weights():
    model, _ = unified()
    drawing = as_text_to_image(model)
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in drawing.parameters()} <= own
    # What the drawing does not have is the projector of what is read, and the image tokenizer.
    rest = set(model.state_dict()) - {
        "lm_head.weight",
        *(f"model.language_model.{key.removeprefix('model.')}" for key in drawing.state_dict()),
    }
    assert all(".multi_modal_projector." in key or ".vision_tower." in key for key in rest)
    assert drawing.tokenizer is model.model.vision_tower.tokenizer


@torch.no_grad()
def test_saved_and_loaded_both_ways(tmp_path):
    model, processor = unified("qwen3", features="residual")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, LlavaForConditionalGeneration)
    prompt = again.apply_chat_template(question(), add_generation_prompt=True)
    given = again(text=[prompt], images=[picture()], return_tensors="pt")
    assert torch.equal(loaded(**given).logits, model(**given).logits)
    assert loaded.generation_config.suppress_tokens == model.generation_config.suppress_tokens
    ids, mask = encode_prompts(["blue"], again.tokenizer, as_text_to_image(loaded).config)
    tokens = pictures(as_text_to_image(model), 1)
    results = [as_text_to_image(one)(ids, tokens, mask).logits for one in (loaded, model)]
    assert torch.equal(*results)
    # And as a text-to-image model alone.
    as_text_to_image(loaded).save_pretrained(tmp_path / "drawing")
    alone = TextToImage.from_pretrained(tmp_path / "drawing")
    assert torch.equal(alone(ids, tokens, mask).logits, results[0])


@torch.no_grad()
def test_its_model_card(monkeypatch):
    model, processor = unified()
    with hub_server.serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        made = push_understanding(model, processor, "some/both", token="hf_writer")
        files = hub.repositories["some/both"].commits[made.oid]
    card = files["README.md"].decode()
    assert "- text-to-image" in card
    assert "Model that answers and draws, by the library" in card
    assert "| text_config.model_type | tokenflow_text |" in card
    assert {"config.json", "model.safetensors", "processor_config.json"} <= files.keys()


@torch.no_grad()
def test_as_a_causal_language_model(tmp_path):
    """Text alone, saved and loaded, its loss and its last positions."""
    drawing = text_to_image()
    config = TokenFlowTextConfig(drawing.config)
    model = TokenFlowForCausalLM(config, drawing.model, drawing.lm_head).eval()
    ids = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(0))
    out = model(ids, labels=ids)
    wanted = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    torch.testing.assert_close(out.loss, wanted)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, out.logits[:, -2:])
    assert torch.equal(model(ids, return_dict=False)[0], out.logits)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, TokenFlowForCausalLM)
    assert torch.equal(loaded(ids).logits, out.logits)
    assert loaded.generation_config.suppress_tokens == model.generation_config.suppress_tokens
    drawn = AutoModelForCausalLM.from_config(config)  # random weights
    assert drawn(ids).logits.isfinite().all()


@torch.no_grad()
def test_the_pipeline_answers():
    model, processor = unified()
    answerer = pipeline("image-text-to-text", model=model, processor=processor)
    (found,) = answerer(text=question(picture=picture()), max_new_tokens=3, return_full_text=False)
    assert isinstance(found["generated_text"], str)


def test_gradients_of_both_ways_add_up():
    model, processor = unified()
    drawing = as_text_to_image(model)
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    prompt = processor.apply_chat_template(question(), add_generation_prompt=True)
    given = processor(text=[prompt], images=[picture()], return_tensors="pt")
    ids, mask = encode_prompts(["a circle"], processor.tokenizer, drawing.config)

    def reading():
        return model(**given).logits.float().logsumexp(-1).mean()

    def drawn():
        return drawing(ids, pictures(drawing, 1), mask).loss

    parts = [torch.autograd.grad(loss(), weight)[0] for loss in (reading, drawn)]
    (reading() + drawn()).backward()
    torch.testing.assert_close(weight.grad, sum(parts))
    assert all(part.abs().max() > 0 for part in parts)


def test_what_does_not_fit():
    text = text_tokenizer()  # without <image>
    with pytest.raises(ConfigError, match="text vocabulary has"):
        build_unified(text_to_image(text=text), text)
    with pytest.raises(ConfigError, match="context of"):
        build_unified(text_to_image(max_position_embeddings=16), with_image_token(text))
    with pytest.raises(ConfigError, match="hidden_size must be 32"):
        TokenFlowTextConfig(text_to_image().config, hidden_size=31)
    with pytest.raises(ConfigError, match="unknown"):
        TokenFlowTextConfig({"unknown": 1})
    model, _ = unified()
    language = model.model.language_model
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="one of the two"):
        language()
    with pytest.raises(ValueError, match=r"attention_mask must be \[1, 3\]"):
        language(ids, torch.ones(1, 2))
    with pytest.raises(TypeError, match="strange"):
        language(ids, strange=1)


def test_another_language_model_does_not_draw():
    from understanding_models import understanding

    with pytest.raises(ConfigError, match="does not draw"):
        as_text_to_image(understanding()[0])


@torch.no_grad()
def test_moves_and_casts_reach_both():
    model, _ = unified()
    tokens = model.model.vision_tower.encode(pixels(2))
    drawing = as_text_to_image(model.to(torch.bfloat16))
    assert drawing.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.model.vision_tower.encode(pixels(2)), tokens)
    ids = torch.zeros(2, 9, dtype=torch.int64)
    assert drawing(ids, tokens).logits.isfinite().all()
