"""Training text to image: steps, resuming, processes, starts, and errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.models.serialization.config import ConfigError
from tokenflow_ext.models.text_to_image.model import TextToImage
from tokenflow_ext.models.text_to_image.sequence import encode_prompts
from tokenflow_ext.train import text_to_image
from tokenflow_ext.train.cli.commands.tokenize import tokenize
from tokenflow_ext.train.config import load_text_config
from tokenflow_ext.train.data.captions import list_captions, some
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.engine.loop import Trainer
from tokenflow_ext.train.tasks import language
from tokenflow_ext.train.tasks.text_to_image import TextToImageTask

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def tokens(image_tokenizer, pairs, tmp_path_factory) -> Path:
    """The pairs as `tokenflow tokenize` writes them."""
    out = tmp_path_factory.mktemp("pair_tokens")
    tokenize(str(pairs), str(image_tokenizer), str(out), shard_size=5)
    return out


@pytest.fixture
def arguments(micro, image_tokenizer, pairs, tmp_path):
    """arguments("run", "optim.steps=3", ...): the command line of a run below tmp_path."""

    def build(run: str, *more: str) -> list[str]:
        return micro.text_overrides(tmp_path / run, image_tokenizer, pairs, *more)

    return build


@pytest.fixture
def make(arguments):
    """make("optim.steps=3", ...): a trainer, ready for steps."""

    def build(*more: str) -> Trainer:
        trainer = Trainer(load_text_config(None, arguments("run", *more)), ALONE, TextToImageTask)
        trainer.prepare()
        return trainer

    return build


def test_every_weight_trains(make):
    trainer = make()
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    codes = [c.clone() for c in trainer.model.tokenizer.quantizer.codebooks]
    for _ in range(2):
        trainer.train_step()
    after = trainer.model.state_dict()
    assert not [k for k in before if torch.equal(before[k], after[k])]
    for old, new in zip(codes, trainer.model.tokenizer.quantizer.codebooks, strict=True):
        assert torch.equal(old, new)  # the image tokenizer is frozen


def test_pictures_are_tokenized_as_shards_are(make, tokens):
    on_the_fly, ready = make(), make(f"data.path={tokens}")
    assert ready.task.dataset.tokenized
    assert not on_the_fly.task.dataset.tokenized
    # Folders list the pictures in the same order, so samples agree.
    for _ in range(3):
        for a, b in zip(next(on_the_fly.batches), next(ready.batches), strict=True):
            assert torch.equal(a, b)


def test_a_dropped_caption_is_the_unconditional_prompt(make):
    trainer = make("data.drop=1.0")
    ids, _, valid = next(trainer.batches)
    empty, mask = encode_prompts([""], trainer.task.drawing.text, trainer.model.config)
    assert torch.equal(ids, empty.expand(4, -1))
    assert torch.equal(valid, mask.expand(4, -1))
    cut = make("data.drop=0.0", "data.truncate=1.0")
    ids, _, valid = next(cut.batches)
    text = cut.task.drawing.text.decode(ids[0][valid[0]])
    assert text.endswith("<img>")
    assert "grey" not in text


def test_checkpointing_changes_no_gradient(make):
    plain, again = make(), make("model.checkpointing=yes")
    for trainer in (plain, again):
        trainer.train_step()
    assert again.model.model.layers[0].checkpointing
    for (name, a), b in zip(plain.model.named_parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_accumulation_is_one_large_batch(make):
    whole, parts = make(), make("optim.accumulate=2")
    for trainer in (whole, parts):
        trainer.train_step()
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_full_precision(make, precision):
    full, half = make(), make(f"optim.precision={precision}")
    for _ in range(3):
        a, b = full.train_step(), half.train_step()
    assert b["loss"].item() == pytest.approx(a["loss"].item(), rel=0.02)


def test_the_average_follows_the_weights(make):
    trainer = make("optim.ema_decay=0.5")
    name, weight = next(iter(trainer.model.named_parameters()))
    expected = weight.detach().clone()
    for step in range(1, 4):
        trainer.train_step()
        expected.lerp_(weight.detach(), 1 - min(0.5, (1 + step) / (10 + step)))
    torch.testing.assert_close(trainer.task.ema.weights[name], expected)
    kept = weight.detach().clone()
    with trainer.averaged() as model:
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), expected)
    assert torch.equal(weight, kept)


# -- resuming -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("optim.accumulate=2", "optim.ema_decay=0.9", "optim.precision=bf16", "data.workers=1"),
        ("optim.precision=fp16", "optim.schedule=constant", "model.checkpointing=yes"),
    ],
    ids=["plain", "averaged", "fp16"],
)
def test_six_steps_are_three_and_three(micro, arguments, tmp_path, settings):
    micro.assert_halves_are_whole(
        text_to_image.main, lambda run: arguments(run, *settings), tmp_path
    )


@pytest.mark.once
def test_killed_while_writing(micro, arguments, tmp_path):
    micro.assert_a_kill_costs_an_interval(
        text_to_image.main, arguments, tmp_path, micro.TEXT_SCRIPT
    )


def test_what_a_run_leaves(arguments, tmp_path, capsys):
    given = arguments("run", "optim.steps=3", "output.tensorboard=yes")
    text_to_image.main(given)
    text = capsys.readouterr().out
    run = tmp_path / "run"
    assert "12 pictures with captions, 21 tokens an image" in text
    assert "right tokens, training pairs" in text
    assert (run / "pictures" / "final.png").is_file()
    assert list((run / "tensorboard").iterdir())
    assert load_text_config(run / "config.yaml") == load_text_config(None, given)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if r["kind"] == "train"] == [1, 2, 3]
    assert [r["step"] for r in lines if r["kind"] == "evaluation"] == [0, 3]
    newest = checkpoint.available(run / "checkpoints")[-1]
    files = checkpoint.verify(newest)["files"]
    assert {"tokenizer/model.safetensors", "model.safetensors"} <= files.keys()
    assert any(name.startswith(f"{language.TEXT_FOLDER}/") for name in files)
    model = TextToImage.from_pretrained(checkpoint.find(run))
    text_tokenizer = language.load_text_tokenizer(newest)
    assert model.config.text_vocab_size == len(text_tokenizer)
    assert text_tokenizer.bos_token == "<s>"
    ids = text_tokenizer.encode("Ein Käse!", add_special_tokens=False)
    assert text_tokenizer.decode(ids).strip() == "Ein Käse!"  # any text, not the captions' alone
    (newest / "tokenizer" / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"tokenizer/config\.json is truncated or altered"):
        text_to_image.main([f"run={run}", "--resume"])


def test_resuming_another_model_is_refused(arguments, tmp_path):
    given = arguments("run", "optim.steps=3")
    text_to_image.main(given)
    with pytest.raises(SystemExit, match=r"model\.backbone\.intermediate_size: 64 -> 32"):
        text_to_image.main([*given, "--resume", "model.backbone.intermediate_size=32"])
    other = TokenFlowTokenizer.from_pretrained(given[1].removeprefix("tokenizer="))
    with torch.no_grad():
        other.quantizer.codebooks[0][0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match=r"another image tokenizer than .*other"):
        text_to_image.main([*given, "--resume", f"tokenizer={tmp_path / 'other'}"])


def test_a_run_of_the_old_order_of_norms_is_refused(arguments, tmp_path):
    """Its checkpoint is whole and fits, key by key."""
    given = arguments("run", "optim.steps=3")
    text_to_image.main(given)
    newest = checkpoint.available(tmp_path / "run" / "checkpoints")[-1]
    header, manifest = newest / "config.json", newest / "manifest.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"version": 1}))
    content = json.loads(manifest.read_text())
    facts = {"bytes": header.stat().st_size, "sha256": checkpoint.digest(header)}
    content["files"]["config.json"] = facts
    manifest.write_text(json.dumps(content))
    for again in ([*given, "--resume"], arguments("other", f"init={tmp_path / 'run'}")):
        with pytest.raises(SystemExit, match="version 1, this release reads 2: since 2 a layer's"):
            text_to_image.main(again)


# -- processes ----------------------------------------------------------------------------------

STEPS = {
    "ddp": ("parallel=ddp",),
    "fsdp": ("parallel=fsdp", "optim.ema_decay=0.5", "model.checkpointing=yes"),
    "accumulated": ("parallel=fsdp", "optim.accumulate=2"),
}


@pytest.fixture(scope="module")
def ends(micro, image_tokenizer, pairs, tmp_path_factory) -> Path:
    """A folder with what two processes, and one, made of the same steps; and runs that change
    their way of splitting the work when they are resumed."""
    folder = tmp_path_factory.mktemp("together")

    def given(run: str, *more: str) -> list[str]:
        return micro.text_overrides(
            folder / run, image_tokenizer, pairs, "optim.batch=8", "data.evaluated=5", *more
        )

    keep = ("optim.schedule=constant", "optim.ema_decay=0.9")
    alone = [given("full"), given("alone", *keep)]
    shared = [
        *micro.split_otherwise(given, "fsdp_ddp", ("fsdp", "ddp"), *keep),
        *micro.split_otherwise(given, "ddp_fsdp", ("ddp", "fsdp"), *keep),
        given("half", "parallel=fsdp", "optim.precision=bf16"),
    ]
    return micro.train_together(folder, "text_to_image", given, STEPS, (alone, shared))


@pytest.mark.once
@pytest.mark.parametrize("name", STEPS)
def test_two_processes_are_one_with_the_joined_batch(micro, ends, name):
    micro.assert_split(name, *micro.assert_joined_batch(ends, name))


@pytest.mark.once
@pytest.mark.parametrize("name", ["fsdp_ddp", "ddp_fsdp"])
def test_a_checkpoint_serves_every_way_of_splitting(ends, name):
    newest = [checkpoint.available(ends / run / "checkpoints")[-1] for run in ("alone", name)]
    assert newest[0].name == newest[1].name == "step_00000006"
    for read in (
        lambda p: load_file(p / "model.safetensors"),
        lambda p: checkpoint.load(p)["model"],
    ):
        alone, changed = map(read, newest)
        assert alone.keys() == changed.keys()
        for key, value in alone.items():
            torch.testing.assert_close(value, changed[key], rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.once
def test_split_weights_in_half_precision(ends):
    logs = [(ends / run / "log.jsonl").read_text().splitlines() for run in ("full", "half")]
    full, half = ([json.loads(line).get("loss") for line in lines] for lines in logs)
    assert len(full) == 9  # six steps and three evaluations
    assert [x for x in half if x] == pytest.approx([x for x in full if x], rel=0.02)
    assert (ends / "half" / "pictures" / "final.png").is_file()  # drawn by both processes together


# -- starts -------------------------------------------------------------------------------------


def test_starting_from_a_language_model(make, backbone):
    trainer = make(f"backbone={backbone}")
    start = load_file(backbone / "model.safetensors")
    own = trainer.model.state_dict()
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(own[key], start[key])
    rows = start["model.embed_tokens.weight"]
    assert torch.equal(own["model.embed_tokens.weight"][: len(rows)], rows)
    trainer.train_step()


def test_starting_from_a_trained_model(arguments, make, tmp_path):
    text_to_image.main(arguments("first", "optim.steps=3"))
    trainer = make(f"init={tmp_path / 'first'}", "tokenizer=nowhere")
    trained = load_file(checkpoint.find(tmp_path / "first") / "model.safetensors")
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(value, trained[key]), key


def test_an_original_file_gives_the_tokens(make, image_tokenizer, released):
    """Read as one: the file's own name, the resolution asked for."""
    expected = TokenFlowTokenizer.from_pretrained(image_tokenizer).state_dict()
    file, asked = released(image_tokenizer)
    trainer = make(f"tokenizer={file}", "resolution=256")
    assert asked == [(file, 256)]
    for key, value in trainer.model.tokenizer.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_evaluating_held_out_pairs(make, pairs):
    trainer = make(f"data.held_out={pairs}")
    values = trainer.evaluate()
    assert values["held_out_loss"] == pytest.approx(values["known_loss"])
    assert 0 <= values["held_out_accuracy"] <= 1


def test_unseen_captions_are_held_out(make, pairs):
    captions = sorted(filter(None, list_captions(pairs).values()))
    unseen = captions[:2]
    trainer = make(f"data.unseen={'|'.join(map(re.escape, unseen))}")
    assert sorted({s.caption for s in some(trainer.task.dataset.source, 0)}) == captions[2:]
    assert "held_out_loss" in trainer.evaluate()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.match=(", r"data\.match is no regular expression"),
        ("data.unseen=(", r"data\.unseen is no regular expression"),
    ],
)
def test_captions_that_are_no_expression(make, setting, message):
    with pytest.raises(ConfigError, match=message):
        make(setting)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tokenizer=nowhere", "nothing at nowhere"),
        ("data.path=nowhere", "no folder at nowhere"),
        ("backbone=nowhere", r"nowhere/config\.json is missing.*GGUF"),
        ("init=nowhere", "nothing at nowhere"),
        ("parallel=none", "parallel must be one of ddp, fsdp"),
        ("data.drop=2", r"data\.drop must be within"),
        ("data.streams=[1]", r"data\.streams must be two"),
        ("model.vocabulary=100", r"model\.vocabulary must be within \[257, 16777216\], got 100"),
        ("model.backbone.family=bert", r"backbone\.family"),
    ],
)
def test_errors_end_with_one_line(arguments, given, message):
    with pytest.raises(SystemExit, match=message) as caught:
        text_to_image.main(arguments("run", given))
    assert str(caught.value).startswith("error: ")
