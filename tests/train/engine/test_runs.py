"""A run's folder: one writer, what a resumed run may change, and what is never lost."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenflow_ext.models import CheckpointError, ConfigError
from tokenflow_ext.models.serialization.config import to_plain
from tokenflow_ext.models.serialization.files import OutputError
from tokenflow_ext.models.serialization.pretrained import not_finite
from tokenflow_ext.train import text_to_image, tokenizer
from tokenflow_ext.train.config import (
    DecoderConfig,
    TextConfig,
    TrainConfig,
    leaves,
    load_config,
    load_text_config,
    to_yaml,
)
from tokenflow_ext.train.data.text_files import DataError
from tokenflow_ext.train.engine import checkpoint, logs, runs
from tokenflow_ext.train.engine.distributed import Launcher, Processes
from tokenflow_ext.train.engine.loop import Trainer
from tokenflow_ext.train.tasks.tokenizer import TokenizerTask

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def arguments(micro, images, tmp_path):
    """Settings of a pixel-only run of three steps in tmp_path / "run"."""
    return micro.overrides(tmp_path / "run", images, *micro.PIXEL_ONLY, "optim.steps=3")


@pytest.fixture(scope="module")
def done(micro, images, tmp_path_factory):
    """A finished run of three steps, of two images' band and with a checkpoint each step."""
    run = tmp_path_factory.mktemp("done") / "run"
    settings = (*micro.PIXEL_ONLY, "optim.steps=3", "output.checkpoint_every=1", "loss.gan=0.1")
    given = micro.overrides(run, images, *settings, "loss.gan_start=0", "output.keep=9")
    tokenizer.main(given)
    return run, given


@pytest.fixture
def copy(done, tmp_path):
    """A copy of it, and its settings."""
    run, given = done
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run", [f"run={tmp_path / 'run'}", *given[1:]]


# -- one writer -----------------------------------------------------------------------------------


def test_a_folder_has_one_writer(arguments, tmp_path):
    run = tmp_path / "run"
    with runs.lock(run):
        with pytest.raises(SystemExit, match=f"another process trains in {run} .process") as end:
            tokenizer.main([*arguments, "--resume"])
        assert "\n" not in str(end.value)
        assert os.listdir(run) == [runs.LOCK_FILE]
    with runs.lock(run):  # let go of
        pass


def test_the_lock_ends_with_the_process_and_not_with_its_children(tmp_path):
    def holds():
        with (tmp_path / runs.LOCK_FILE).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        with runs.lock(tmp_path):
            grandchild = os.fork()  # as a process that reads data
            os.write(tell, b"%d\n" % grandchild if grandchild else b"")
            time.sleep(60)
        os._exit(0)
    grandchild = int(os.read(ready, 20))
    assert holds()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        assert not holds()
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_the_lock_follows_no_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / runs.LOCK_FILE).symlink_to(tmp_path / "mine")
    with pytest.raises(OutputError, match="cannot write into"), runs.lock(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_run_needs_a_folder(arguments, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(SystemExit, match=r"error: cannot write into .*/run") as end:
        tokenizer.main(arguments)
    assert "\n" not in str(end.value)


def test_a_model_larger_than_the_machine_is_refused_before_it_is_made(arguments):
    wide = ("model.pixel.channels=60000", "model.pixel.multipliers=[1,1,1,1]")
    with pytest.raises(SystemExit, match=r"model asks for \d+\.\d GiB of weights, and this"):
        tokenizer.main([*arguments, *wide, "model.pixel.groups=1"])


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with runs.lock(tmp_path):
        assert "nothing keeps another run out" in capsys.readouterr().out


# -- what is refused changes nothing --------------------------------------------------------------


def test_a_failed_start_leaves_the_folder_free(arguments, tmp_path):
    with pytest.raises(SystemExit, match="nowhere"):
        tokenizer.main([*arguments, "data.path=nowhere"])
    with pytest.raises(SystemExit, match="VGG16"):
        tokenizer.main([*arguments, "loss.perceptual=1"])
    tokenizer.main(arguments)
    assert checkpoint.available(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize("name", ["log.jsonl", "summary.json", "pictures/final.png"])
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_what_is_no_runs_is_not_written_over(arguments, tmp_path, name, resume):
    mine = tmp_path / "run" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(SystemExit, match=f"{name.split('/')[0]} is no run's") as end:
        tokenizer.main([*arguments, *resume])
    assert "\n" not in str(end.value)
    assert mine.read_text() == "mine"
    assert sorted(os.listdir(tmp_path / "run")) == sorted([runs.LOCK_FILE, name.split("/")[0]])


def test_a_refused_resume_leaves_the_run_as_it_was(copy, capsys):
    run, _ = copy
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    for given, said in (
        ("seed=1", r"seed: 0 -> 1 \(it decides which sample comes when\)"),
        ("model.quantizer.scales=[1,4]", r"model\.quantizer\.scales: \[1, 2, 4\] -> \[1, 4\]"),
        ("data.path=nowhere", "nowhere"),
        ("optim.nothing=1", r"optim\.nothing"),
        ("optim.batch=7", None),
    ):
        with pytest.raises(SystemExit, match=said) as end:
            tokenizer.main([f"run={run}", "--resume", given, "optim.accumulate=2"])
        assert "\n" not in str(end.value)
    after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    assert after == before
    capsys.readouterr()
    tokenizer.main([f"run={run}", "--resume"])
    assert "the resumed run changes" not in capsys.readouterr().out


def test_nothing_to_resume_is_said_before_it_starts(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit, match="nowhere"):
        tokenizer.main([*arguments, "--resume", "data.path=nowhere"])
    said = f"--resume: {tmp_path / 'run'} holds no run to continue"
    assert said in capsys.readouterr().out
    tokenizer.main([*arguments, "--resume"])
    assert said in capsys.readouterr().out
    tokenizer.main([*arguments, "--resume"])
    assert "--resume:" not in capsys.readouterr().out


# -- every key of a configuration -----------------------------------------------------------------

OTHER = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.125}


def changed(value):
    """Another value of the same type."""
    if isinstance(value, list):
        return [*map(changed, value[:-1]), changed(value[-1])] if value else ["x"]
    return OTHER.get(type(value), lambda v: f"{v or ''}x")(value)


@pytest.mark.parametrize("kind", [TrainConfig, DecoderConfig, TextConfig])
def test_every_key_takes_effect_or_is_refused_by_name(kind, tmp_path):
    config = kind()
    keys = leaves(to_plain(config))
    refused, named = set(), set()
    for key, value in keys.items():
        before = keys | {key: changed(value), "loss.gan": 1.0, "data.streams": [1, 1]}
        if key in ("loss.gan", "data.streams"):
            before[key] = changed(value)
        text = to_yaml_of(before)
        try:
            lines = runs.changes(tmp_path, text, config)
        except ConfigError as error:
            refused |= {key} if f"{key}: " in str(error) else set()
        else:
            named |= {line.partition(":")[0] for line in lines}
    assert refused | named | {"run"} == set(keys)
    start = {"seed", "data.streams", "init", "tokenizer", "backbone", "resolution", "decoder"}
    assert start & set(keys) <= refused | {"init", "tokenizer"}  # moved, not come or gone
    kept = {"optim.lr", "optim.betas", "optim.weight_decay", "optim.steps", "data.path"}
    assert kept <= named
    if kind is TrainConfig:
        assert {k for k in keys if k.startswith("model.")} <= refused
        assert {"loss.discriminator", "preset", "codebook.kmeans_batches"} <= refused


def to_yaml_of(flat):
    """Dotted keys as nested YAML."""
    nested: dict = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return json.dumps(nested)


@pytest.mark.parametrize(
    ("was", "now", "why"),
    [
        ("optim.lr_scale.codebooks=1", "optim.lr_scale.codebooks=0", "frozen"),
        ("optim.lr_scale.codebooks=0", "optim.lr_scale.codebooks=1", "frozen"),
        ("data.streams=[2,1]", "optim.batch=8", r"data\.streams"),
        ("loss.gan=1", "loss.discriminator=stylegan", "discriminator"),
        ("init=a", "init=null", "started from"),
    ],
)
def test_what_depends_on_other_settings(tmp_path, was, now, why):
    after = [was, now] if was.split("=")[0] != now.split("=")[0] else [now]
    with pytest.raises(ConfigError, match=why):
        runs.changes(tmp_path, to_yaml(load_config(None, [was])), load_config(None, after))


@pytest.mark.parametrize("now", ["init=b", "loss.discriminator=stylegan", "optim.batch=8"])
def test_what_may_change_otherwise(tmp_path, now):
    before = load_config(None, ["init=a"])
    lines = runs.changes(tmp_path, to_yaml(before), load_config(None, ["init=a", now]))
    assert [line.partition(":")[0] for line in lines] == [now.partition("=")[0]]


def test_an_average_does_not_come_or_go(tmp_path):
    before, after = (load_text_config(None, [f"optim.ema_decay={v}"]) for v in (0, 0.9))
    with pytest.raises(ConfigError, match="average"):
        runs.changes(tmp_path, to_yaml(before), after)


def test_a_checkpoint_of_an_earlier_release_lacks_keys(tmp_path):
    assert runs.changes(tmp_path, "optim: {lr: 0.002}", load_config()) == []


@pytest.mark.parametrize("text", ["[1]", "{", "1: 2", "a: &a [*a]"])
def test_a_saved_configuration_that_is_none_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="the configuration in"):
        runs.changes(tmp_path, text, load_config())


def test_the_optimizer_takes_up_what_is_asked_for(copy, capsys):
    """Against an optimizer and a schedule that were made with these settings from the start."""
    run, given = copy
    asked = ["optim.lr=0.5", "optim.betas=[0.5,0.75]", "optim.weight_decay=0.25", "optim.steps=9"]
    asked += ["optim.discriminator_lr=0.125", "optim.lr_scale.pixel_encoder=0.5"]
    trainer = Trainer(load_config(None, [*given, *asked]), ALONE, TokenizerTask)
    trainer.restore(checkpoint.available(run / "checkpoints")[-1])
    assert trainer.step == 3
    # Warm-up of two steps, then a cosine to 2% at the ninth.
    factor = [0.5, 1.0] + [0.02 + 0.49 * (1 + math.cos(math.pi * n / 7)) for n in range(7)]
    for _ in range(2):
        for group in trainer.task.generator.optimizer.param_groups:
            rate = 0.25 if group["name"] == "pixel_encoder" else 0.5
            assert group["lr"] == pytest.approx(rate * factor[trainer.step])
            assert tuple(group["betas"]) == (0.5, 0.75)
            assert group["weight_decay"] == 0.25
        (group,) = trainer.task.pixel_loss.discriminator.optimizer.param_groups
        assert group["lr"] == pytest.approx(0.125 * factor[trainer.step])
        if trainer.step == 3:
            trainer.prepare()
            trainer.train_step()
    trainer.stop_reading()
    tokenizer.main([f"run={run}", "--resume", *asked[:1]])
    said = capsys.readouterr().out
    assert "the resumed run changes optim.lr: 0.002 -> 0.5" in said
    assert load_config(run / "config.yaml").optim.lr == 0.5


def test_loss_scaling_can_be_switched_on(copy):
    run, _ = copy
    tokenizer.main([f"run={run}", "--resume", "optim.precision=fp16", "optim.steps=4"])
    last = checkpoint.available(run / "checkpoints")[-1]
    assert last.name == "step_00000004"
    assert checkpoint.load(last)["scaler"]["scale"] > 0


def test_other_data_are_told(micro, copy, tmp_path, capsys):
    run, _ = copy
    micro.draw_images(tmp_path / "more", count=5)
    tokenizer.main([f"run={run}", "--resume", f"data.path={tmp_path / 'more'}", "optim.steps=4"])
    said = capsys.readouterr().out
    assert "the resumed run changes data.path" in said
    assert "the data have changed: 3 images, digest" in said
    assert "-> 5 images" in said


# -- numbers that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "said"),
    [("loss", "total"), ("weight", "decoder"), ("average", "weights"), ("moment", "exp_avg")],
)
def test_no_checkpoint_holds_what_is_not_finite(
    arguments, tmp_path, monkeypatch, capsys, broken, said
):
    """Two good steps and one after which something is not finite, between two looks of the log."""
    step = Trainer.train_step

    def poisoned(self):
        values = step(self)
        if self.step == 3:
            with torch.no_grad():
                if broken == "loss":
                    values["total"] = values["total"] * math.nan
                elif broken == "weight":
                    self.model.decoder.conv_out.weight[0, 0, 0, 0] = math.inf
                elif broken == "average":
                    self.task.ema.weights["decoder.conv_out.weight"][0] = math.nan
                else:
                    next(iter(self.task.generator.optimizer.state.values()))["exp_avg"][
                        0
                    ] = -math.inf
        return values

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    run = tmp_path / "run"
    every = ("output.log_every=100", "output.eval_every=100", "output.checkpoint_every=1")
    with pytest.raises(SystemExit, match=rf"step \d: .*{said}.* not finite") as end:
        tokenizer.main([*arguments, *every, "optim.steps=5"])
    assert "\n" not in str(end.value)
    good = run / "checkpoints" / "step_00000002"
    assert f"the last good checkpoint is {good}" in str(end.value)
    assert checkpoint.available(run / "checkpoints")[-1] == good
    assert not_finite(dict(load_file(good / "model.safetensors"))) == []
    monkeypatch.setattr(Trainer, "train_step", step)
    tokenizer.main([*arguments, *every, "optim.steps=5", "--resume", "optim.lr=1e-4"])
    assert checkpoint.available(run / "checkpoints")[-1].name == "step_00000005"


def test_a_rate_that_is_far_too_high_ends_in_one_line(arguments, tmp_path):
    with pytest.raises(SystemExit, match="there is no good checkpoint") as end:
        tokenizer.main([*arguments, "optim.lr=1e30", "optim.steps=9"])
    assert "\n" not in str(end.value)
    assert not checkpoint.available(tmp_path / "run" / "checkpoints")


def test_gradients_that_overflow_under_loss_scaling_are_no_end(arguments, tmp_path):
    tokenizer.main([*arguments, "optim.precision=fp16", "output.log_every=3"])
    assert checkpoint.available(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize("file", ["training.pt", "model.safetensors"])
def test_an_old_checkpoint_that_is_not_finite_is_refused(copy, file):
    run, _ = copy
    newest = checkpoint.available(run / "checkpoints")[-1]
    if file == "training.pt":
        state = torch.load(newest / file, weights_only=True)
        next(iter(state["optimizer"]["state"].values()))["exp_avg_sq"][0] = math.nan
        torch.save(state, newest / file)
    else:
        state = load_file(newest / file)
        state["decoder.conv_out.bias"][0] = math.inf
        save_file(state, newest / file, metadata={"format": "tokenflow-tokenizer"})
    seal(newest, file)
    with pytest.raises(SystemExit, match=rf"{newest}.* not finite") as end:
        tokenizer.main([f"run={run}", "--resume"])
    assert "\n" not in str(end.value)


def seal(path: Path, *names: str) -> None:
    """Make the manifest agree with files that were changed."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in names:
        file = path / name
        facts = {"bytes": file.stat().st_size, "sha256": checkpoint.digest(file)}
        manifest["files"][name] = facts
    (path / "manifest.json").write_text(json.dumps(manifest))


# -- hostile states -------------------------------------------------------------------------------


def vast(shape):
    """A tensor of that shape in four bytes."""
    return torch.zeros(1).expand(shape)


STATES = {
    "no step": lambda s: s.pop("step"),
    "no optimizer": lambda s: s.pop("optimizer"),
    "a text for a step": lambda s: s.update(step="3"),
    "a negative step": lambda s: s.update(step=-1),
    "half a sample": lambda s: s.update(position=1.5),
    "no seconds": lambda s: s.update(seconds=[]),
    "no figures": lambda s: s.update(first=3),
    "a list": lambda s: s.update(optimizer=[]),
    "nothing": lambda s: s.update(optimizer={}),
    "half of Adam": lambda s: s["optimizer"].update(state={0: {"exp_avg": torch.zeros(1)}}),
    "other weights": lambda s: s["optimizer"]["state"].update({9999: {}}),
    "a vast moment": lambda s: s["optimizer"]["state"][0].update(exp_avg=vast((1 << 20, 1 << 20))),
    "a text for a moment": lambda s: s["optimizer"]["state"][0].update(exp_avg="text"),
    "another kind of schedule": lambda s: s.update(scheduler={"last_epoch": "x"}),
    "a negative epoch": lambda s: s.update(scheduler={"last_epoch": -5}),
    "no schedule": lambda s: s.update(scheduler=None),
    "another model": lambda s: s.update(model={"a": torch.zeros(1)}),
    "numbers for weights": lambda s: s.update(model=dict.fromkeys(s["model"], 3)),
    "vast weights": lambda s: s.update(model={k: vast((1 << 20, 1 << 20)) for k in s["model"]}),
    "no generators": lambda s: s.update(random=[{}]),
    "other generators": lambda s: s.update(random=[{"torch": 3, "numpy": [], "python": []}]),
    "a number for generators": lambda s: s.update(random=3),
    "no discriminator": lambda s: s.update(discriminator={}),
    "no mapping": lambda s: s.clear(),
}


@pytest.fixture(scope="module")
def trainer(done):
    run, given = done
    trainer = Trainer(load_config(None, given), ALONE, TokenizerTask)
    trainer.restore(checkpoint.available(run / "checkpoints")[-1])
    return trainer


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_a_state_of_another_form_ends_in_one_line(done, trainer, tmp_path, change):
    newest = tmp_path / "step_00000003"
    shutil.copytree(checkpoint.available(done[0] / "checkpoints")[-1], newest)
    state = torch.load(newest / "training.pt", weights_only=True)
    change(state)
    torch.save(state, newest / "training.pt")
    seal(newest, "training.pt")
    with pytest.raises(CheckpointError, match=str(newest)) as end:
        trainer.restore(newest)
    assert "\n" not in str(end.value)
    assert len(str(end.value)) < 800


@pytest.mark.parametrize("config", [None, 7, "a: [" * 5000, "[1]", "\x00"])
def test_a_checkpoint_without_its_configuration_is_refused(done, tmp_path, config):
    shutil.copytree(done[0], tmp_path / "run")
    newest = checkpoint.available(tmp_path / "run" / "checkpoints")[-1]
    torch.save({"config": config}, newest / "training.pt")
    given = load_config(None, [f"run={tmp_path / 'run'}"])
    with pytest.raises((CheckpointError, ConfigError), match=str(newest)) as end:
        runs.begin(given, resume=True)
    assert "\n" not in str(end.value)
    assert len(str(end.value)) < 800


# -- the log --------------------------------------------------------------------------------------


def open_log(folder, start):
    return logs.RunLog(folder, start, 9, tensorboard=False, progress=False)


def test_the_log_is_cut_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    lines = [json.dumps({"step": n, "kind": "train"}) for n in range(1, 7)]
    damaged = b"\n".join(
        [*(line.encode() for line in lines), b"\xff\x00", b"[]", b'{"step": 7, "k']
    )
    file = tmp_path / "log.jsonl"
    file.write_bytes(damaged)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            open_log(tmp_path, 4)
    assert file.read_bytes() == damaged
    log = open_log(tmp_path, 4)
    log.values(5, {"a": 1.0}, "train")
    log.close()
    kept = file.read_text().splitlines()
    assert kept == [*lines[:4], '{"step": 5, "kind": "train", "a": 1.0}']
    assert (
        "2 lines after step 4 are taken out, to be written again, and 3" in capsys.readouterr().out
    )


def test_neither_log_nor_pictures_follow_a_link(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").symlink_to(mine)
    (tmp_path / "run" / "final.png").symlink_to(mine)
    log = open_log(tmp_path / "run", 0)
    log.values(1, {}, "train")
    picture = torch.zeros(1, 3, 8, 8)
    log.picture(1, tmp_path / "run" / "final.png", picture, picture)
    log.close()
    assert mine.read_text() == "mine\n"


def test_a_log_that_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(OutputError, match=r"log\.jsonl is no file"):
        open_log(tmp_path, 0)


# -- several processes ----------------------------------------------------------------------------


class Group(Processes):
    """A process of two, whose other one has what it is told."""

    def gather(self, value):
        return [value, self.other] if self.first else [self.other, value]


def group(rank, other):
    made = Group(rank, 2, torch.device("cpu"))
    object.__setattr__(made, "other", other)
    return made


def test_what_one_process_cannot_do_ends_all():
    with pytest.raises(DataError), group(0, False).together():
        raise DataError("here")
    with pytest.raises(SystemExit) as end, group(0, True).together():
        pass
    assert end.value.code == 1
    with pytest.raises(SystemExit), group(1, True).together():
        raise DataError("the first one says it")
    with group(1, False).together():
        pass


def test_a_process_ends_with_its_launcher(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    launcher = Launcher()
    launcher.check()
    another = os.getppid() + 1
    monkeypatch.setattr(os, "getppid", lambda: another)
    with pytest.raises(SystemExit, match=r"torchrun .* has ended"):
        launcher.check()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    Launcher().check()  # alone a process may outlive the shell it was started from


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE"])
def test_an_environment_that_is_no_torchruns_is_named(arguments, monkeypatch, variable):
    monkeypatch.setenv(variable, "many")
    with pytest.raises(SystemExit, match=f"{variable} must be a number, got 'many'"):
        tokenizer.main(arguments)


def test_a_text_run_is_held_to_the_same(micro, pairs, image_tokenizer, tmp_path):
    run = tmp_path / "run"
    given = micro.text_overrides(run, image_tokenizer, pairs, "optim.steps=3")
    text_to_image.main(given)
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(SystemExit, match=r"model\.prompt_length: 6 -> 7"):
        text_to_image.main([f"run={run}", "--resume", "model.prompt_length=7"])
    assert (run / "config.yaml").read_bytes() == before
    with runs.lock(run), pytest.raises(SystemExit, match="another process trains"):
        text_to_image.main([f"run={run}", "--resume"])
    text_to_image.main([f"run={run}", "--resume", "optim.lr=1e-5", "optim.steps=4"])
    state = checkpoint.load(checkpoint.available(run / "checkpoints")[-1])
    assert state["optimizer"]["param_groups"][0]["initial_lr"] == 1e-5
