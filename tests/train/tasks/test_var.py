"""Training VAR: steps, resuming, processes, starts with other classes, and errors."""

from __future__ import annotations

import itertools
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenflow_ext.models import VAR, TokenFlowTokenizer, VarConfig
from tokenflow_ext.models.serialization.config import ConfigError
from tokenflow_ext.train import var
from tokenflow_ext.train.cli.commands.tokenize import tokenize
from tokenflow_ext.train.config import load_var_config
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.engine.loop import Trainer
from tokenflow_ext.train.engine.optimization import learning_rate
from tokenflow_ext.train.tasks.var import VarTask

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def arguments(micro, image_tokenizer, classes, tmp_path):
    """arguments("run", "optim.steps=3", ...): the command line of a run below tmp_path."""

    def build(run: str, *more: str) -> list[str]:
        return micro.var_overrides(tmp_path / run, image_tokenizer, classes, *more)

    return build


@pytest.fixture
def make(arguments):
    """make("optim.steps=3", ...): a trainer, ready for steps."""

    def build(*more: str) -> Trainer:
        trainer = Trainer(load_var_config(None, arguments("run", *more)), ALONE, VarTask)
        trainer.prepare()
        return trainer

    return build


def test_every_weight_trains(make):
    trainer = make("model.shared_adaln=yes", "model.class_drop=0.5")
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    codes = [c.clone() for c in trainer.model.tokenizer.quantizer.codebooks]
    for _ in range(3):
        trainer.train_step()
    after = trainer.model.state_dict()
    same = [k for k in before if torch.equal(before[k], after[k])]
    assert {k for k in same if not k.endswith("zero_k_bias")} == {"lvl_1L"}
    for old, new in zip(codes, trainer.model.tokenizer.quantizer.codebooks, strict=True):
        assert torch.equal(old, new)  # the image tokenizer is frozen


def test_the_loss_is_that_of_its_classes(make, classes):
    trainer = make("model.class_drop=0")
    assert trainer.model.config.class_names == ("disc", "square")
    labels, tokens = next(trainer.batches)
    known = {}
    tokenizer = trainer.model.tokenizer
    source = trainer.task.dataset.source
    for i, path in enumerate(source.paths):
        encoded = tokenizer.encode(source.middle(i)[None])[0]
        known[tuple(encoded.tolist())] = path.parent.name
    for label, row in zip(labels.tolist(), tokens.tolist(), strict=True):
        assert trainer.model.config.class_names[label] == known[tuple(row)]
    with torch.no_grad():
        loss = trainer.model(labels, tokens).loss
    values = make("model.class_drop=0").train_step()
    assert values["loss"].item() == pytest.approx(loss.item(), rel=1e-5)


def test_pictures_are_tokenized_as_shards_are(make, classes, image_tokenizer, tmp_path):
    out = tmp_path / "tokens"
    tokenize(str(classes), str(image_tokenizer), str(out), shard_size=5)
    on_the_fly, ready = make(), make(f"data.path={out}")
    assert ready.task.dataset.tokenized
    for _ in range(3):
        for a, b in zip(next(on_the_fly.batches), next(ready.batches), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("other", ["model.checkpointing=yes", "model.attention=flex"])
def test_what_changes_no_gradient(make, other):
    drops = ("model.class_drop=0.3", "model.drop_path=0.3")
    plain, again = make(*drops), make(*drops, other)
    for trainer in (plain, again):
        torch.manual_seed(3)
        trainer.train_step()
    for (name, a), b in zip(plain.model.named_parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_accumulation_is_one_large_batch(make):
    drops = ("model.class_drop=0", "model.drop_path=0")
    whole, parts = make(*drops), make(*drops, "optim.accumulate=2")
    for trainer in (whole, parts):
        trainer.train_step()
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_full_precision(make, precision):
    drops = ("model.class_drop=0", "model.drop_path=0")
    full, half = make(*drops), make(*drops, f"optim.precision={precision}")
    for _ in range(3):
        a, b = full.train_step(), half.train_step()
    assert b["loss"].item() == pytest.approx(a["loss"].item(), rel=0.02)


def test_weight_decay_is_for_matrices(make):
    """Decoupled: a step without gradients shrinks decayed weights by lr * decay, and no other."""
    trainer = make("optim.weight_decay=0.5", "optim.lr=0.1", "optim.warmup=0")
    before = {k: v.detach().clone() for k, v in trainer.model.named_parameters()}
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.task.transformer.update()
    linear = {
        f"{name}.weight"
        for name, module in trainer.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    for name, value in trainer.model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if name in linear else before[name]
        torch.testing.assert_close(value.detach(), expected, msg=name)


def test_the_schedule_of_the_paper():
    config = load_var_config(
        None,
        ["optim.steps=1000", "optim.warmup=20", "optim.warmup_lr=0.005", "optim.final_lr=0.1"],
    ).optim
    rates = [learning_rate(step, config) for step in range(1001)]
    assert rates[0] == pytest.approx(0.005 + 0.995 / 20)
    assert rates[9] == pytest.approx(0.005 + 0.995 / 2)
    flat = 20 + 0.05 * 980
    assert all(rate == pytest.approx(1.0) for rate in rates[19 : int(flat)])
    middle = (flat + 1000) / 2
    assert rates[math.floor(middle)] == pytest.approx(0.55, abs=1e-3)
    assert rates[1000] == pytest.approx(0.1)
    falls = [a - b for a, b in itertools.pairwise(rates[70:])]
    assert max(falls) == pytest.approx(min(falls))


# -- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("optim.accumulate=2", "optim.ema_decay=0.9", "optim.precision=bf16", "data.workers=1"),
    ],
    ids=["plain", "averaged"],
)
def test_six_steps_are_three_and_three(micro, arguments, tmp_path, settings):
    """Dropped classes and branches too."""
    drops = ("model.class_drop=0.5", "model.drop_path=0.5")
    micro.assert_halves_are_whole(var.main, lambda run: arguments(run, *settings, *drops), tmp_path)


@pytest.mark.once
def test_killed_between_checkpoints(micro, arguments, tmp_path):
    settings = ("optim.steps=12", "output.checkpoint_every=2")
    var.main(arguments("whole", *settings))
    resumed = [*arguments("killed", *settings), "--resume"]
    process = micro.launch(resumed, script=micro.VAR_SCRIPT)
    run = tmp_path / "killed"
    for line in process.stdout:
        if "step 6," in line or checkpoint.available(run / "checkpoints"):
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.read()
    process.wait()
    process.stdout.close()
    micro.finish(micro.launch(resumed, script=micro.VAR_SCRIPT))
    micro.assert_same_end(tmp_path / "whole", run)


def test_what_a_run_leaves(arguments, tmp_path, capsys):
    given = arguments("run", "optim.steps=3")
    var.main(given)
    text = capsys.readouterr().out
    run = tmp_path / "run"
    assert "12 pictures of 2 classes, 21 tokens an image" in text
    assert "right tokens, training pictures" in text
    assert (run / "pictures" / "final.png").is_file()
    assert load_var_config(run / "config.yaml") == load_var_config(None, given)
    model = VAR.from_pretrained(checkpoint.find(run))
    assert model.config.class_names == ("disc", "square")
    assert model.config.class_numbers(["square", "0", "disc"]) == [1, 0, 0]
    assert model.generate(torch.tensor([0, 1]), seed=0).shape == (2, 3, 32, 32)


def test_resuming_something_else_is_refused(arguments, tmp_path, classes):
    given = arguments("run", "optim.steps=3")
    var.main(given)
    with pytest.raises(SystemExit, match=r"model\.depth: 2 -> 1"):
        var.main([*given, "--resume", "model.depth=1"])
    other = shutil.copytree(classes, tmp_path / "other")
    (other / "square").rename(other / "box")
    with pytest.raises(SystemExit, match="has 2 classes, the data has 2, or others"):
        var.main([*given, "--resume", f"data.path={other}"])
    changed = TokenFlowTokenizer.from_pretrained(given[1].removeprefix("tokenizer="))
    with torch.no_grad():
        changed.quantizer.codebooks[0][0] += 1
    changed.save_pretrained(tmp_path / "changed")
    with pytest.raises(SystemExit, match=r"another image tokenizer than .*changed"):
        var.main([*given, "--resume", f"tokenizer={tmp_path / 'changed'}"])


# -- processes ------------------------------------------------------------------------------------

STEPS = {
    "ddp": ("parallel=ddp",),
    "fsdp": ("parallel=fsdp", "optim.ema_decay=0.5", "model.checkpointing=yes"),
    "shared": ("parallel=fsdp", "optim.accumulate=2", "model.shared_adaln=yes"),
}


@pytest.fixture(scope="module")
def ends(micro, image_tokenizer, classes, tmp_path_factory) -> Path:
    """A folder with what two processes, and one, made of the same steps; and a run that changes its
    way of splitting the work when it is resumed."""
    folder = tmp_path_factory.mktemp("together")

    def given(run: str, *more: str) -> list[str]:
        drops = ("model.class_drop=0", "model.drop_path=0")  # drawn by each process for itself
        return micro.var_overrides(
            folder / run, image_tokenizer, classes, "optim.batch=8", "data.evaluated=5", *drops,
            *more,
        )  # fmt: skip

    keep = ("optim.schedule=constant", "optim.ema_decay=0.9")
    changed = micro.split_otherwise(given, "changed", ("fsdp", "ddp"), *keep)
    runs = [given("alone", *keep)], changed
    return micro.train_together(folder, "var", given, STEPS, runs)


@pytest.mark.once
@pytest.mark.parametrize("name", STEPS)
def test_two_processes_are_one_with_the_joined_batch(micro, ends, name):
    alone, shared = micro.assert_joined_batch(ends, name)
    assert alone["pictures"].shape == shared["pictures"].shape
    micro.assert_split(name, alone, shared)


@pytest.mark.once
def test_a_checkpoint_serves_every_way_of_splitting(ends):
    newest = [checkpoint.available(ends / run / "checkpoints")[-1] for run in ("alone", "changed")]
    alone, changed = (load_file(path / "model.safetensors") for path in newest)
    assert alone.keys() == changed.keys()
    for key, value in alone.items():
        torch.testing.assert_close(value, changed[key], rtol=1e-3, atol=1e-4, msg=key)


# -- starts ---------------------------------------------------------------------------------------


def test_starting_from_a_trained_model(arguments, make, tmp_path):
    var.main(arguments("first", "optim.steps=3"))
    trainer = make(f"init={tmp_path / 'first'}", "tokenizer=nowhere", "model.class_drop=0.75")
    trained = load_file(checkpoint.find(tmp_path / "first") / "model.safetensors")
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(value, trained[key]), key
    assert trainer.model.config.class_drop == 0.75


@pytest.mark.parametrize("form", ["released", "saved"])
def test_fine_tuning_with_other_classes(make, image_tokenizer, tmp_path, capsys, form):
    """The class table is new but for its last row, all else is kept, and a line says so."""
    tokenizer = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    torch.manual_seed(5)
    shape = VarConfig.for_tokenizer(tokenizer, depth=3, width=48, heads=3, classes=7)
    model = VAR(shape, tokenizer)
    if form == "released":
        source = model.save_released(tmp_path / "var.pth")
    else:
        source = model.save_pretrained(tmp_path / "saved")
    trainer = make(f"init={source}", "model.drop_path=0.25")
    own = trainer.model.state_dict()
    start = model.state_dict()
    assert own.keys() == start.keys()
    for key, value in start.items():
        if key == "class_emb.weight":
            assert own[key].shape == (3, 48)
            assert torch.equal(own[key][-1], value[-1])
            assert not any(torch.equal(row, old) for row in own[key][:-1] for old in value)
        else:
            assert torch.equal(own[key], value), key
    kept = len(start) - 1
    said = capsys.readouterr().err
    assert "has 7 classes, the data has 2: class_emb.weight is made anew but for the row" in said
    assert f"of no class, {kept} other tensors are kept" in said
    assert trainer.model.blocks[2].drop_path == 0.25
    assert trainer.model.config.class_names == ("disc", "square")
    trainer.train_step()


def test_a_fine_tuned_run_is_resumed(micro, arguments, image_tokenizer, tmp_path):
    tokenizer = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    shape = VarConfig.for_tokenizer(tokenizer, depth=2, width=32, heads=2, classes=7)
    VAR(shape, tokenizer).save_pretrained(tmp_path / "start")
    for run in ("whole", "halves"):
        var.main(arguments(run, f"init={tmp_path / 'start'}"))
    shutil.rmtree(checkpoint.available(tmp_path / "halves" / "checkpoints")[-1])
    var.main([f"run={tmp_path / 'halves'}", "--resume"])
    micro.assert_same_end(tmp_path / "whole", tmp_path / "halves")


def test_as_many_classes_are_the_same_ones(make, image_tokenizer, tmp_path):
    """Released weights have no names: as many classes are taken to be theirs."""
    tokenizer = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    model = VAR(
        VarConfig.for_tokenizer(tokenizer, depth=1, width=32, heads=2, classes=2), tokenizer
    )
    trainer = make(f"init={model.save_pretrained(tmp_path / 'saved')}")
    assert torch.equal(trainer.model.class_emb.weight, model.class_emb.weight)
    assert trainer.model.config.class_names == ("disc", "square")


def test_evaluating_held_out_pictures(make, classes, tmp_path):
    trainer = make(f"data.held_out={classes}")
    values = trainer.evaluate()
    assert values["held_out_loss"] == pytest.approx(values["known_loss"])
    other = shutil.copytree(classes, tmp_path / "other")
    (other / "square").rename(other / "box")
    with pytest.raises(Exception, match="'box' is none of the 2"):
        make(f"data.held_out={other}")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.depth=0", r"depth must be positive"),
        ("model.width=31", "multiple of"),
        ("model.attention=full", r"model\.attention must be one of"),
        ("sample.top_k=[5,5]", "must name as many|one number"),
        ("data.label_keys=[]", r"data\.label_keys must name keys"),
        ("optim.schedule=step", "must be one of cosine, linear, constant"),
        ("optim.flat=1", r"optim\.flat must be within"),
        ("data.resize=0.5", r"data\.resize must be"),
        ("model.prompt_length=3", "unknown field"),
    ],
)
def test_bad_settings(make, setting, message):
    with pytest.raises(ConfigError, match=message):
        make(setting)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tokenizer=nowhere", "nothing at nowhere"),
        ("data.path=nowhere", "no folder at nowhere"),
        ("data.path=''", r"data\.path=FOLDER is missing"),
        ("tokenizer=''", r"tokenizer=PATH is missing"),
        ("init=nowhere", "nothing at nowhere"),
        ("model.classes=1", r"model\.classes is 1, and there are 2"),
        ("data.classes=nowhere.txt", r"nowhere\.txt"),
    ],
)
def test_errors_end_with_one_line(arguments, given, message):
    with pytest.raises(SystemExit, match=message) as caught:
        var.main(arguments("run", given))
    assert str(caught.value).startswith("error: ")
