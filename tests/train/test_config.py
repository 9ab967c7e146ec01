"""Configurations: files, overrides, and errors that name what is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tokenflow_ext.train as configs
from tokenflow_ext.models import ConfigError, TokenizerConfig
from tokenflow_ext.models.serialization.config import to_plain
from tokenflow_ext.train import config
from tokenflow_ext.train.config import TrainConfig, load_config, parse_overrides, to_yaml
from tokenflow_ext.train.config.checks import RANGES


def test_yaml_gives_back_an_equal_configuration(tmp_path):
    config = load_config(None, ["optim.lr=3e-4", "data.flip=no", "model.quantizer.scales=[1,8]"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config(file) == config
    assert config.optim.lr == 3e-4
    assert config.data.flip is False
    assert config.model.quantizer.scales == (1, 8)


def test_no_argument_is_the_defaults():
    assert load_config() == TrainConfig()
    assert load_config().model == TokenizerConfig.preset("tiny")


def test_order_is_preset_then_file_then_command_line(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("preset: B\noptim: {lr: 1e-4, steps: 7}\nmodel: {pixel: {channels: 64}}\n")
    config = load_config(file, ["optim.steps=9"])
    assert (config.optim.lr, config.optim.steps) == (1e-4, 9)
    assert config.model.pixel.channels == 64
    assert config.model.teacher == TokenizerConfig.preset("B").teacher


def test_both_spellings_of_an_override():
    given = parse_overrides(["optim.lr=1e-4", "--seed", "3", "--data.flip=no", "run=a=b"])
    assert given == {"optim": {"lr": 1e-4}, "seed": 3, "data": {"flip": False}, "run": "a=b"}


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("optim.learning_rate=1", r"optim\.learning_rate"),
        ("colour=red", "colour"),
        ("optim.steps=0", r"optim\.steps.*0"),
        ("optim.steps=many", r"optim\.steps.*many"),
        ("optim.steps=1.5", r"optim\.steps.*1\.5"),
        ("optim.schedule=cubic", r"optim\.schedule.*cubic"),
        ("optim.precision=fp8", r"optim\.precision.*fp8"),
        ("optim.betas=[0.9]", r"optim\.betas"),
        ("loss.semantic=-1", r"loss\.semantic.*-1"),
        ("loss.semantic_kind=l1", r"loss\.semantic_kind.*l1"),
        ("loss.discriminator=biggan", r"loss\.discriminator must.*patchgan, stylegan.*biggan"),
        ("loss.discriminator_loss=l1", r"loss\.discriminator_loss.*vanilla.*l1"),
        ("loss.generator_loss=vanilla", r"loss\.generator_loss.*non-saturating.*vanilla"),
        ("loss.discriminator_channels=0", r"loss\.discriminator_channels.*0"),
        ("preset=huge", "preset.*huge"),
        ("parallel=tp", "parallel must be one of ddp, fsdp, got 'tp'"),
        ("optim.lr_scale.decoder=1", r"optim\.lr_scale\.decoder"),
        ("optim.lr_scale.codebooks=-1", r"optim\.lr_scale\.codebooks.*-1"),
        ("optim=3", "optim.*3"),
        ("steps", "steps"),
        ("data.path=[", "data.path"),
    ],
)
def test_an_error_names_the_key_and_the_value(argument, named):
    with pytest.raises(ConfigError, match=named):
        load_config(None, [argument])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("parallel=fsdp", "optim.precision=fp16"), r"optim\.precision=fp16"),
        (
            ("optim.lr_scale.codebooks=0", "model.quantizer.codebook_update=ema"),
            r"model\.quantizer\.codebook_update=ema",
        ),
        (("optim.lr_scale.codebooks=0", "codebook.restart_every=9"), r"restart_every=9"),
    ],
)
def test_settings_that_contradict_each_other(arguments, named):
    with pytest.raises(ConfigError, match=named):
        load_config(None, list(arguments))


@pytest.mark.parametrize("content", ["- 1\n- 2\n", "optim: [unclosed\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, content):
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("name", "steps", "side", "tokens"),
    [("B", 1_000_000, 224, 561), ("L", 500_000, 256, 817), ("XL", 500_000, 384, 2227)],
)
def test_the_published_configurations_are_the_papers(name, steps, side, tokens):
    config = load_config(Path(configs.__file__).parent / "configs" / f"{name}.yaml")
    assert config.model == TokenizerConfig.preset(name)
    optim, loss, quantizer = config.optim, config.loss, config.model.quantizer
    assert (optim.steps, optim.batch, optim.lr) == (steps, 256, 1e-4)
    assert (optim.betas, optim.max_grad_norm) == ((0.9, 0.95), 1.0)
    assert (loss.semantic, loss.semantic_kind, loss.vq, loss.pixel) == (1, "cosine", 1, 1)
    assert (loss.perceptual, loss.gan, loss.gan_start) == (1, 0.5, 20000)
    assert quantizer.codebook_size == 32768
    assert (quantizer.beta, quantizer.weights, quantizer.scale_drop) == (0.25, None, 0.1)
    assert config.model.dims == (32, 8)
    assert config.model.image_size == side
    assert sum(s * s for s in quantizer.scales) == tokens
    adversary = (loss.discriminator, loss.discriminator_loss, loss.generator_loss)
    assert adversary == ("patchgan", "hinge", "hinge")
    assert not loss.gan_adaptive


def test_every_number_has_its_range():
    """A key that is added is given one; shapes of models check their own."""
    for kind in (config.TrainConfig, config.DecoderConfig, config.TextConfig):
        for key, value in config.leaves(to_plain(kind())).items():
            values = value if isinstance(value, list) else [value]
            number = any(type(v) in (int, float) for v in values)
            of_model = key.count(".") > 1 and key.startswith("model.")
            if number and not of_model and key != "model.image_size":
                assert key in RANGES, key


@pytest.mark.parametrize("key", sorted(RANGES))
@pytest.mark.parametrize("value", ["-1", ".nan", ".inf", "-.inf", "1e400", "1" + "0" * 400, "x"])
def test_no_number_leaves_its_range(key, value):
    for load in (load_config, config.load_decoder_config, config.load_text_config):
        if key not in config.leaves(to_plain(load())):
            continue
        for given in (value, f"[{value},{value}]"):
            with pytest.raises(ConfigError, match=key.replace(".", r"\.")) as error:
                load(None, [f"{key}={given}"])
            assert "\n" not in str(error.value)
            assert len(str(error.value)) < 400


@pytest.mark.parametrize("given", ["run=''", 'run="a\\0b"', "run=null", "optim.betas=[0.9,1.0]"])
def test_values_that_no_run_can_have(given):
    with pytest.raises(ConfigError, match=given.partition("=")[0].replace(".", r"\.")):
        load_config(None, [given])


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)
)
MERGES = "a0: &a0 {x: 1}\n" + "\n".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 30)
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"optim: {lr: \xe9}", "not UTF-8"),
        (b"\xff\xfeo\x00", "UTF-16"),
        (b"a: " + b"[" * 50_000, "nested too deeply"),
        (b"a: " + b"{a: " * 50_000, "nested too deeply"),
        (b"- " * 50_000, "nested too deeply"),
        (BOMB.encode(), "aliases"),
        (MERGES.encode(), "aliases"),
        (b"a: &a {b: *a}", "aliases"),
        (b"run: 2001-99-99", "not YAML"),
        (b"run: !!python/object/apply:os.system [ls]", "not YAML"),
        (b"seed: " + b"9" * 5000, "not YAML"),
        (b"seed: 0x" + b"f" * 5000, "seed"),
        (b"{[a]: 1}", "not YAML"),
        (b"1: 2", "unknown field 1"),
        (b"a\x00b: 1", "not UTF-8|NUL"),
        (b"optim: {lr: 1e-3}\n" + b"#" * (1 << 21), "larger than"),
        (b"optim: {? {a: b} : c}", "not YAML"),
        (("x" * 100_000 + ": 1").encode(), "unknown field x|not YAML"),
        (b"preset: [B]", "preset"),
        (b"model: 3", "model must be a mapping"),
    ],
)
def test_hostile_files_end_in_one_line(tmp_path, content, said):
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as error:
        load_config(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 800


def test_aliases_are_read(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("preset: B\nmodel: {semantic: {code_dim: &n 16}, pixel: {code_dim: *n}}\n")
    assert load_config(file).model.dims == (16, 16)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe is no file"):
        load_config(tmp_path / "pipe")


def test_any_name_that_a_file_can_have(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xff")
    given = load_config(None, [f"data.path={name}"])
    assert given.data.path == name
    (tmp_path / "config.yaml").write_text(to_yaml(given), encoding="ascii")
    assert load_config(tmp_path / "config.yaml") == given


def test_very_deep_keys_are_no_keys():
    with pytest.raises(ConfigError, match="unknown field"):
        parse_overrides([".".join("a" * 5000) + "=1"])
