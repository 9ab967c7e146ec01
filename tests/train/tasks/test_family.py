"""Training tokenizers with the family's quantizers: losses, usage by group, files, refusals."""

from __future__ import annotations

import json

import pytest
import torch

from tokenflow_ext.models import ConfigError, TokenFlowTokenizer
from tokenflow_ext.train import tokenizer
from tokenflow_ext.train.config import load_config
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.tasks.tokenizer import TokenizerTask

ALONE = Processes(0, 1, torch.device("cpu"))
KINDS = {
    "groups": (
        "codebook_size=16",
        "family.group_dim=2",
        "family.metric=dot",
    ),
    "depth": (
        "codebook_size=16",
        "l2_norm=no",
        "codebook_update=ema",
        "family.depth=2",
        "family.errors=running",
        "family.straight_through=identity",
    ),
    "signs": ("family.code=signs", "family.entropy=0.1"),
    "projected": ("codebook_size=16", "family.code=projected"),
    "levels": ("family.code=levels", "family.levels=[5,4,3,3]"),
}


def settings(micro, run, images, kind: str, *more: str) -> list[str]:
    return micro.overrides(
        run,
        images,
        *micro.PIXEL_ONLY,
        "model.pixel.code_dim=4",
        "model.quantizer.kind=family",
        "model.quantizer.scales=[4]",
        "model.quantizer.scale_drop=0",
        *(f"model.quantizer.{option}" for option in KINDS[kind]),
        *more,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_run(micro, images, tmp_path, kind, capsys):
    run = tmp_path / "run"
    tokenizer.main(settings(micro, run, images, kind))
    unset = "codebook.kmeans_batches=2 sets nothing" in capsys.readouterr().err
    assert unset == (kind in ("signs", "projected", "levels"))
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if line["kind"] == "held_out"]
    assert [line["step"] for line in held_out] == [0, 3, 6]
    assert held_out[-1]["psnr"] > held_out[0]["psnr"]
    groups = {key for key in held_out[-1] if key.startswith("usage_group_")}
    assert groups == ({"usage_group_1", "usage_group_2"} if kind == "groups" else set())
    trained = [line for line in lines if line["kind"] == "train"]
    assert all(0 < line["usage"] <= 1 for line in trained)
    losses = {key for key in trained[-1] if key.startswith("quantizer_")}
    names = {"signs": {"commitment", "entropy"}, "depth": {"commitment"}, "levels": {"commitment"}}
    assert losses == {f"quantizer_{name}" for name in names.get(kind, {"codebook", "commitment"})}
    assert ("usage_group_2" in trained[-1]) == (kind == "groups")
    model = TokenFlowTokenizer.from_pretrained(checkpoint.find(run))
    made, _ = model.decode(model.encode(torch.rand(1, 3, 32, 32)))
    assert made.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("kind", ["groups", "signs"])
def test_resumed_is_uninterrupted(micro, images, tmp_path, kind):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ("output.checkpoint_every=2", "codebook.restart_every=2") if kind == "groups" else ()
    tokenizer.main(settings(micro, whole, images, kind, *more))
    config = load_config(None, settings(micro, cut, images, kind, *more))

    after = TokenizerTask.after_step

    def stop_at_five(self, step, position):
        after(self, step, position)
        if step == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenizerTask, "after_step", stop_at_five)
        with pytest.raises(KeyboardInterrupt):
            tokenizer.train(config, ALONE)
    tokenizer.train(config, ALONE, resume=True)
    first, second = (
        TokenFlowTokenizer.from_pretrained(checkpoint.find(run)) for run in (whole, cut)
    )
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("signs", "codebook.restart_every=2", "codebook.restart_every is 2 but .* no codes to set"),
        ("groups", "codebook.restart_rows=by_scale", "codebook.restart_rows must be 'rows'"),
    ],
)
def test_what_means_nothing(micro, images, tmp_path, kind, more, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, settings(micro, tmp_path, images, kind, more))


@pytest.mark.parametrize("name", ["groups", "depth", "signs"])
def test_the_recipes_are_configurations(micro, name):
    tiny = load_config(micro.ROOT / f"train/configs/family/tiny_{name}.yaml")
    assert tiny.model.quantizer.kind == "family"
    full = load_config(micro.ROOT / f"train/configs/family/{name}.yaml")
    assert full.model.quantizer.kind == "family"
    assert full.model.quantizer.family.code == tiny.model.quantizer.family.code
