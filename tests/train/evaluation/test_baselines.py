"""The ablation's tokenizers: their configurations, and what every command makes of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from weights import needs_lite0

from tokenflow_ext.models import ConfigError, TokenFlowTokenizer, TokenizerConfig
from tokenflow_ext.models.metrics import cosine
from tokenflow_ext.models.serialization.config import to_plain
from tokenflow_ext.models.towers.teachers import build_teacher
from tokenflow_ext.train import tokenizer
from tokenflow_ext.train.cli import entry
from tokenflow_ext.train.config import load_config
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.evaluation import preprocess

CONFIGS = Path(__file__).resolve().parents[3] / "train" / "configs" / "ablation"
SEMANTIC_ONLY = ("model.pixel.enabled=no",)
VAR = (
    "model.semantic.tower.kind=none",
    "model.teacher.kind=none",
    "model.quantizer.kind=var",
    "model.quantizer.l2_norm=no",
    "model.quantizer.phi_shared=3",
)
ROUNDS = ("model.quantizer.scales=[4,4]",)

pytestmark = needs_lite0


@pytest.mark.parametrize(
    ("name", "branches", "scales", "kind"),
    [
        ("vqgan", ("pixel",), (8,), "tokenflow"),
        ("rqvae", ("pixel",), (8, 8, 8), "tokenflow"),
        ("var", ("pixel",), (1, 2, 3, 4, 5, 6, 7, 8), "var"),
        ("vqkd", ("semantic",), (8,), "tokenflow"),
    ],
)
def test_baselines_are_parts_of_the_same_tokenizer(name, branches, scales, kind):
    config = load_config(CONFIGS / f"{name}.yaml").model
    tiny = TokenizerConfig.preset("tiny")
    assert (config.branches, config.quantizer.scales) == (branches, scales)
    assert config.quantizer.kind == kind
    for branch in branches:  # as large as TokenFlow's own
        assert getattr(config, branch) == getattr(tiny, branch)
    assert config.quantizer.codebook_size == tiny.quantizer.codebook_size


def differences(one, other, path: str = "") -> set[str]:
    """Keys of nested mappings whose values differ."""
    found = set()
    for key, value in one.items():
        here = f"{path}.{key}".lstrip(".")
        if isinstance(value, dict):
            found |= differences(value, other[key], here)
        elif value != other[key]:
            found.add(here)
    return found


def test_the_steps_of_table_5_add_one_thing_each():
    names = ("semantic_codebook", "shared_mapping", "msvq", "teacher_start")
    steps = [to_plain(load_config(CONFIGS / f"{name}.yaml")) for name in names]
    changed = [differences(a, b) for a, b in itertools.pairwise(steps)]
    assert changed == [
        {"run", "model.pixel.enabled"},
        {"run", "model.quantizer.scales"},
        {"run", "pretrained_tower"},
    ]
    assert differences(steps[-1], to_plain(load_config())) == {"run", "model.semantic.frozen"}


def train(micro, images, run: Path, *more: str) -> Path:
    tokenizer.main(micro.overrides(run, images, "optim.steps=3", *more))
    return run


@pytest.fixture(scope="module")
def semantic_run(micro, images, tmp_path_factory) -> Path:
    """A run of the semantic branch alone."""
    return train(micro, images, tmp_path_factory.mktemp("semantic") / "run", *SEMANTIC_ONLY)


def test_a_run_without_a_pixel_branch(semantic_run, capsys):
    lines = [json.loads(line) for line in (semantic_run / "log.jsonl").read_text().splitlines()]
    assert all(line["l2"] == 0 for line in lines if line["kind"] == "train")
    held_out = [line for line in lines if line["kind"] == "held_out"]
    assert all("cosine" in line and "psnr" not in line for line in held_out)
    assert not (semantic_run / "pictures").exists()
    tokenizer.main([f"run={semantic_run}", "--resume"])  # its summary needs no picture either
    said = capsys.readouterr().out
    assert "cosine to the teacher" in said
    assert "PSNR" not in said


def test_evaluation_without_images_has_cosine_and_usage(semantic_run, images, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--data", str(images), "--out", str(out), "--device", "cpu", "--batch-size", "2"]
    entry.main(["evaluate", "--checkpoint", str(semantic_run), *arguments])
    report = json.loads((out / "metrics.json").read_text())
    had = {name for name, value in report["figures"].items() if value is not None}
    assert had == {"cosine", "semantic_top1", "usage", "perplexity"}
    assert report["missing"] == {}
    assert any("no pixel branch" in note for note in report["notes"])
    said = capsys.readouterr().out
    assert "PSNR" not in said
    assert "no pixel branch" in said
    assert not (out / "pictures.png").exists()
    rows = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert [row["psnr"] for row in rows] == [None] * 3
    # The cosine, worked out apart.
    model = TokenFlowTokenizer.from_pretrained(checkpoint.find(semantic_run))
    teacher = build_teacher(model.config.teacher)
    squares = preprocess.CenterCropDataset(sorted(images.glob("*.png")), 32)
    pixels = preprocess.to_float(torch.stack([squares[i][1] for i in range(3)]))
    with torch.no_grad():
        semantic = model.decode(model.encode(pixels))[1]
    expected = cosine(semantic, teacher(pixels)).item()
    assert report["figures"]["cosine"] == pytest.approx(expected, rel=1e-4)


def test_a_teacher_for_a_tokenizer_without_one_is_refused(image_tokenizer, images, tmp_path):
    arguments = ["--checkpoint", str(image_tokenizer), "--data", str(images), "--device", "cpu"]
    arguments += ["--out", str(tmp_path / "out"), "--teacher", "teacher.pth"]
    with pytest.raises(SystemExit, match=r"--teacher teacher\.pth.*without a teacher"):
        entry.main(["evaluate", *arguments])


def test_tokens_but_no_pictures_without_a_pixel_branch(semantic_run, images, tmp_path):
    image = str(sorted(images.glob("*.png"))[0])
    common = ["--checkpoint", str(semantic_run), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"decodes no images.*pixel\.enabled is false"):
        entry.main(["reconstruct", image, *common])
    assert not (tmp_path / "out").exists()
    entry.main(["tokenize", str(images), *common])
    assert json.loads((tmp_path / "out" / "index.json").read_text())["tokens_per_image"] == 21


@pytest.mark.parametrize("settings", [VAR, (*VAR[:2], *ROUNDS)], ids=["var", "rqvae"])
def test_other_quantizers_go_through_every_command(micro, images, tmp_path, settings):
    run = train(micro, images, tmp_path / "run", *settings)
    image, out = str(sorted(images.glob("*.png"))[0]), tmp_path / "out"
    common = ["--checkpoint", str(run), "--out"]
    entry.main(["reconstruct", image, *common, str(out)])
    entry.main(["tokenize", str(images), *common, str(out / "tokens")])
    arguments = ["--data", str(images), "--device", "cpu"]
    entry.main(["evaluate", *arguments, *common, str(out / "evaluation")])
    report = json.loads((out / "evaluation" / "metrics.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert report["tokenizer"]["tokens_per_image"] == (21 if settings == VAR else 32)
    assert report["figures"]["psnr"] > summary["first"]["psnr"] - 3
    # The average's convolutions follow the model's.
    state = checkpoint.load(checkpoint.available(run / "checkpoints")[-1])["model"]
    average = TokenFlowTokenizer.from_pretrained(checkpoint.find(run)).state_dict()
    phis = [name for name in state if name.startswith("quantizer.phis")]
    assert bool(phis) == (settings == VAR)
    for name in phis:
        assert not torch.equal(average[name], state[name])
        torch.testing.assert_close(average[name], state[name], atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("loss.gan=0.5", r"loss\.gan is 0\.5 but model\.pixel\.enabled is false"),
        ("loss.perceptual=1", r"loss\.perceptual is 1"),
        ("loss.semantic=0", r"needs a teacher .*loss\.semantic above 0 \(got 0"),
        ("model.teacher.kind=none", r"needs a teacher .*got 'none'"),
    ],
)
def test_losses_that_need_a_pixel_branch_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [*SEMANTIC_ONLY, setting])
