"""Understanding models: the forward pass and greedy answers re-derived, transformers' own ways."""

from __future__ import annotations

import math
import re

import pytest
import torch
from tiny_models import image_tokenizer
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaForConditionalGeneration,
    TorchAoConfig,
    pipeline,
)
from understanding_models import (
    LANGUAGES,
    expected_features,
    language_model,
    picture,
    pixels,
    question,
    text_tokenizer,
    understanding,
)

from tokenflow_ext.models import (
    ConfigError,
    WeightsError,
    build_processor,
    build_understanding,
)
from tokenflow_ext.models.understanding.names import FEATURES


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def derived(language, tokenizer, projector, features, ids, images, image_id):
    """Logits of the next position: features, projector and the splice written out."""
    visual = expected_features(tokenizer, images, features).float()
    visual = gelu(visual @ projector["linear_1.weight"].T + projector["linear_1.bias"])
    visual = visual @ projector["linear_2.weight"].T + projector["linear_2.bias"]
    rows = []
    for place, row in enumerate(ids):
        start = row.index(image_id)
        end = start + visual.shape[1]
        assert row[start:end] == [image_id] * visual.shape[1]
        text = language.get_input_embeddings()(torch.tensor(row))
        rows.append(torch.cat([text[:start], visual[place], text[end:]]))
    return language(inputs_embeds=torch.stack(rows), use_cache=False).logits


@pytest.mark.parametrize("kind", LANGUAGES)
@pytest.mark.parametrize("features", FEATURES)
@torch.no_grad()
def test_forward_and_greedy_answers_are_those_derived(kind, features):
    model, _ = understanding(kind, features)
    text = text_tokenizer()
    alone = language_model(kind, text=text)
    alone.resize_token_embeddings(len(text) + 1, mean_resizing=False)
    alone.load_state_dict(
        {
            ("model." + key.removeprefix("model.language_model.")): value
            for key, value in model.state_dict().items()
            if key.startswith("model.language_model.")
        }
        | {"lm_head.weight": model.lm_head.weight}
    )
    projector = dict(model.model.multi_modal_projector.state_dict())
    image_id, count = model.config.image_token_id, model.config.vision_config.visual_tokens
    ids = [[0, 7, *[image_id] * count, 9, 30 + i] for i in range(2)]
    images = pixels(2)
    tower = model.model.vision_tower.tokenizer
    logits = model(input_ids=torch.tensor(ids), pixel_values=images).logits
    want = derived(alone, tower, projector, features, ids, images, image_id)
    assert torch.allclose(logits, want, atol=2e-4)
    answers = model.generate(
        input_ids=torch.tensor(ids),
        attention_mask=torch.ones(2, len(ids[0]), dtype=torch.int64),
        pixel_values=images,
        do_sample=False,
        max_new_tokens=6,
        eos_token_id=None,
    )
    for place in range(2):
        row = list(ids[place])
        for _ in range(6):
            one = images[place : place + 1]
            next_ = derived(alone, tower, projector, features, [row], one, image_id)[0, -1]
            next_[image_id] = -math.inf  # a picture's place is no answer
            row.append(int(next_.argmax()))
        assert answers[place].tolist() == row


@pytest.mark.parametrize("features", FEATURES)
def test_the_processor_makes_a_place_for_every_row(features):
    model, processor = understanding(features=features)
    prompt = processor.apply_chat_template(question(), add_generation_prompt=True)
    inputs = processor(images=picture(), text=prompt, return_tensors="pt")
    places = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert places == model.config.vision_config.visual_tokens == model.config.image_seq_length
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("kind", LANGUAGES)
def test_saved_and_loaded(tmp_path, kind):
    model, processor = understanding(kind, window=3)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, LlavaForConditionalGeneration)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(loaded.state_dict()[k].equal(v) for k, v in model.state_dict().items())
    messages = question(images=2, picture=picture())
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = again.apply_chat_template(messages, add_generation_prompt=True, **options)
    prompt = processor.apply_chat_template(question(images=2), add_generation_prompt=True)
    before = processor(images=[picture()] * 2, text=prompt, return_tensors="pt")
    assert inputs["input_ids"].equal(before["input_ids"])
    assert inputs["pixel_values"].equal(before["pixel_values"])
    answers = [m.generate(**before, max_new_tokens=5, do_sample=False) for m in (model, loaded)]
    assert answers[0].equal(answers[1])


def test_half_precision_keeps_the_tokens(tmp_path):
    model, _ = understanding()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tower = loaded.model.vision_tower
    assert {p.dtype for p in tower.parameters()} == {torch.float32}
    assert {p.dtype for p in loaded.model.language_model.parameters()} == {torch.bfloat16}
    images = pixels(3)
    own = model.model.vision_tower(images).last_hidden_state
    assert tower(images).last_hidden_state.equal(own.bfloat16())
    ids = torch.tensor([[0, *[loaded.config.image_token_id] * 16, 5]] * 3)
    assert loaded(input_ids=ids, pixel_values=images).logits.dtype == torch.bfloat16


def test_what_quantizes_a_language_model_leaves_the_tokenizer(tmp_path):
    """transformers skips modules whose name one of these patterns matches from its start."""
    model, _ = understanding()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    layers = [name for name, part in loaded.named_modules() if isinstance(part, nn.Linear)]
    inside = [name for name in layers if ".tokenizer." in name]
    kept = [
        name
        for name in layers
        if any(
            re.match(rf"(?:{pattern})(?:\.|$)", name) for pattern in loaded._keep_in_fp32_modules
        )
    ]
    assert inside
    assert kept == inside


@torch.no_grad()
def test_a_quantized_language_model(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    model, processor = understanding()
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=config)
    own = loaded.model.vision_tower.tokenizer.state_dict()
    for key, value in model.model.vision_tower.tokenizer.state_dict().items():
        assert torch.equal(own[key], value), key
    weight = loaded.model.language_model.layers[0].mlp.up_proj.weight
    assert type(weight) is not nn.Parameter
    prompt = processor.apply_chat_template(question(), add_generation_prompt=True)
    given = processor(text=[prompt], images=[picture()], return_tensors="pt")
    found, expected = loaded(**given).logits, model(**given).logits
    assert not torch.equal(found, expected)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(tmp_path, device_map):
    pytest.importorskip("accelerate")
    model, processor = understanding()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map=device_map)
    prompt = processor.apply_chat_template(question(), add_generation_prompt=True)
    inputs = processor(images=picture(), text=prompt, return_tensors="pt").to(loaded.device)
    assert torch.allclose(
        loaded(**inputs).logits.cpu(), model(**inputs.to("cpu")).logits, atol=1e-5
    )


def test_the_pipeline():
    model, processor = understanding()
    answering = pipeline("image-text-to-text", model=model, processor=processor)
    messages = question(picture=picture())
    found = answering(text=messages, max_new_tokens=4, return_full_text=False, do_sample=False)
    inputs = processor(
        images=picture(),
        text=processor.apply_chat_template(question(), add_generation_prompt=True),
        return_tensors="pt",
    )
    own = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    wanted = processor.decode(own[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found[0]["generated_text"] == wanted


def test_questions_without_a_picture_and_several_in_a_batch():
    model, processor = understanding()
    processor.tokenizer.padding_side = "left"
    texts = [
        processor.apply_chat_template(question(images=n), add_generation_prompt=True)
        for n in (0, 2, 1)
    ]
    images = [picture(i) for i in range(3)]
    together = processor(text=texts, images=[[], images[:2], images[2:]], padding=True,
                         return_tensors="pt")  # fmt: skip
    answers = model.generate(**together, max_new_tokens=4, do_sample=False)
    for row, (text, own) in enumerate(zip(texts, ([], images[:2], images[2:]), strict=True)):
        one = processor(text=text, images=own or None, return_tensors="pt")
        alone = model.generate(**one, max_new_tokens=4, do_sample=False)
        assert answers[row, -4:].equal(alone[0, -4:])


def test_tokens_in_the_place_of_pictures():
    model, processor = understanding()
    prompt = processor.apply_chat_template(question(), add_generation_prompt=True)
    inputs = processor(images=picture(), text=prompt, return_tensors="pt")
    tokens = model.model.vision_tower.encode(inputs["pixel_values"])
    want = model(**inputs).logits
    assert model(**{**inputs, "pixel_values": tokens}).logits.equal(want)


def test_a_folder_of_transformers(tmp_path):
    text = text_tokenizer()
    own = language_model(text=text)
    own.save_pretrained(tmp_path)
    text.save_pretrained(tmp_path)
    model = build_understanding(tmp_path, image_tokenizer())
    processor = build_processor(model, text)
    assert model.config.image_token_id == len(text)
    state = model.state_dict()
    for key, value in own.state_dict().items():
        name = key if key.startswith("lm_head") else "model.language_model." + key[6:]
        assert state[name][: len(value)].equal(value), name
    prompt = processor.apply_chat_template(question(), add_generation_prompt=True)
    assert model(**processor(images=picture(), text=prompt, return_tensors="pt")).logits.ndim == 3


def test_a_model_with_rows_to_spare_keeps_them():
    text = text_tokenizer()
    model = build_understanding(
        language_model(rows=len(text) + 9, text=text), image_tokenizer(), text_tokenizer=text
    )
    assert model.config.text_config.vocab_size == len(text) + 9
    assert model.config.image_token_id == len(text)


def test_tied_embeddings_stay_tied(tmp_path):
    text = text_tokenizer()
    language = language_model("qwen2", text=text, tie_word_embeddings=True)
    model = build_understanding(language, image_tokenizer(), text_tokenizer=text)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.lm_head.weight.equal(model.lm_head.weight)
    assert loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()


def test_gradients_reach_projector_and_language_model_alone():
    model, processor = understanding()
    prompt = processor.apply_chat_template(question())
    inputs = processor(images=picture(), text=prompt, return_tensors="pt")
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == ("vision_tower" in name), name


def test_gradient_checkpointing_changes_nothing():
    model, processor = understanding()
    prompt = processor.apply_chat_template(question())
    inputs = processor(images=picture(), text=prompt, return_tensors="pt")
    model.train()
    grads = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        grads.append(model.model.multi_modal_projector.linear_1.weight.grad.clone())
    assert torch.allclose(*grads, rtol=1e-5)


# -- bad input ------------------------------------------------------------------------------------


def test_a_prompt_without_a_place_for_the_picture():
    model, processor = understanding()
    inputs = processor(images=picture(), text=processor.image_token, return_tensors="pt")
    short = {**inputs, "input_ids": inputs["input_ids"][:, 1:]}
    short["attention_mask"] = short["attention_mask"][:, 1:]
    with pytest.raises((ValueError, RuntimeError), match="do not match"):
        model(**short)


def test_no_language_model(tmp_path):
    with pytest.raises(WeightsError, match=r"no language model at .*config\.json"):
        build_understanding(tmp_path / "none", image_tokenizer())
    with pytest.raises(WeightsError, match="no language model at"):
        build_understanding(tmp_path, image_tokenizer())


def test_another_text_tokenizer():
    model, _ = understanding()
    with pytest.raises(ConfigError, match=r"<image> is id \d+ of the text tokenizer, and \d+"):
        build_processor(model, text_tokenizer(size=300))


def test_a_context_shorter_than_a_picture():
    with pytest.raises(ConfigError, match=r"a picture is 16 tokens.*context of 16"):
        build_understanding(language_model(max_position_embeddings=16), image_tokenizer())


@pytest.mark.parametrize("kind", ["base", "bias"])
def test_what_is_no_language_model(kind):
    language = language_model()
    if kind == "base":
        language = language.base_model
    else:
        language.lm_head = nn.Linear(32, language.config.vocab_size)
    with pytest.raises(ConfigError, match="no causal language model with a head"):
        build_understanding(language, image_tokenizer())


def test_another_family_of_language_models(tmp_path):
    text = text_tokenizer()
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(text), n_positions=512, n_embd=32, n_layer=2, n_head=4)
    )
    model = build_understanding(gpt, image_tokenizer(), text_tokenizer=text)
    processor = build_processor(model, text)
    prompt = processor.apply_chat_template(question(), add_generation_prompt=True)
    inputs = processor(images=picture(), text=prompt, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.generate(**inputs, max_new_tokens=3, do_sample=False).equal(answer)
