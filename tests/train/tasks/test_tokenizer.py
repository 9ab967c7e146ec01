"""Training in one process: what a step does, every loss on and off, precision, errors."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from weights import LITE0_MISSING

from tokenflow_ext.models import ConfigError, TokenFlowTokenizer
from tokenflow_ext.models.metrics import cosine
from tokenflow_ext.train import tokenizer
from tokenflow_ext.train.config import OptimConfig, load_config
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.engine.ema import EMA
from tokenflow_ext.train.engine.loop import Trainer
from tokenflow_ext.train.engine.optimization import learning_rate
from tokenflow_ext.train.tasks.tokenizer import TokenizerTask

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def make(micro, images, tmp_path):
    """make("optim.steps=3", ...): a trainer of the micro tokenizer, ready for steps."""

    def build(*more: str, semantic: bool = False) -> Trainer:
        if semantic and LITE0_MISSING is not None:
            pytest.skip(LITE0_MISSING)
        extra = more if semantic else (*micro.PIXEL_ONLY, *more)
        config = load_config(None, micro.overrides(tmp_path / "run", images, *extra))
        trainer = Trainer(config, ALONE, TokenizerTask)
        trainer.prepare()
        return trainer

    return build


def weights(model) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def changed(before, model) -> set[str]:
    return {k for k, v in model.state_dict().items() if not torch.equal(before[k], v)}


def test_the_schedule():
    cosine = OptimConfig(steps=100, warmup=10, schedule="cosine", final_lr=0.1)
    values = [learning_rate(step, cosine) for step in range(101)]
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert values[10] == 1
    assert values[55] == pytest.approx(0.55)
    assert values[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))
    constant = OptimConfig(steps=100, warmup=10, schedule="constant")
    assert {learning_rate(step, constant) for step in range(10, 101)} == {1.0}


def test_the_average_is_the_moving_average():
    weight = torch.nn.Parameter(torch.randn(1))
    average = EMA({"weight": weight}, 0.9)
    expected = weight.item()
    for step in range(1, 200):
        with torch.no_grad():
            weight.fill_(step)
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.weights["weight"].item() == pytest.approx(expected, rel=1e-5)
    average.swap()
    assert weight.item() == pytest.approx(expected, rel=1e-5)
    assert average.weights["weight"].item() == 199


ADVERSARIES = {
    "patchgan": ("loss.gan_adaptive=yes",),
    "stylegan": (
        "loss.discriminator=stylegan",
        "loss.discriminator_channels=8",
        "loss.discriminator_loss=vanilla",
        "loss.generator_loss=non-saturating",
    ),
}


@pytest.mark.parametrize("adversary", ADVERSARIES.values(), ids=ADVERSARIES)
def test_every_weight_trains_with_every_loss(make, adversary):
    settings = ("loss.gan=0.5", "loss.gan_start=0", "model.quantizer.scale_drop=0", *adversary)
    trainer = make(*settings, semantic=True)
    before, d_before = weights(trainer.model), weights(trainer.task.pixel_loss.discriminator.module)
    for _ in range(2):
        values = trainer.train_step()
    assert all(math.isfinite(v) for v in values.values())
    learned = {k for k, p in trainer.model.named_parameters() if p.requires_grad}
    assert learned <= changed(before, trainer.model)
    assert not any(k.startswith("semantic_encoder") for k in changed(before, trainer.model))
    assert {
        k for k, _ in trainer.task.pixel_loss.discriminator.module.named_parameters()
    } <= changed(d_before, trainer.task.pixel_loss.discriminator.module)


@pytest.mark.parametrize(
    ("off", "idle"),
    [
        ("loss.semantic=0", "decode_task_layer.0.weight"),
        ("loss.pixel=0", "decoder.conv_out.weight"),
        ("loss.vq=0", "quantizer.codebooks.0"),
    ],
)
def test_a_loss_switched_off_moves_nothing(make, off, idle):
    trainer = make(off, semantic=True)
    before = weights(trainer.model)
    for _ in range(2):
        trainer.train_step()
    moved = changed(before, trainer.model)
    assert idle not in moved
    assert {"encode_task_layer.0.weight", "encoder.conv_in.weight"} & moved


def test_the_discriminator_waits_for_its_start(make):
    trainer = make("loss.gan=0.5", "loss.gan_start=2")
    before = weights(trainer.task.pixel_loss.discriminator.module)
    assert "discriminator" not in trainer.train_step()
    assert "discriminator" not in trainer.train_step()
    assert not changed(before, trainer.task.pixel_loss.discriminator.module)
    assert "discriminator" in trainer.train_step()
    assert changed(before, trainer.task.pixel_loss.discriminator.module)


def test_adversarial_losses_are_the_configured_ones(make):
    """By the logits of one step, in numbers."""
    trainer = make("loss.gan=0.5", "loss.gan_start=0", *ADVERSARIES["stylegan"])
    seen = []
    trainer.task.pixel_loss.discriminator.module.register_forward_hook(
        lambda _m, _i, out: seen.append(out.detach())
    )
    values = trainer.train_step()
    (fake, both) = seen
    assert values["generator"].item() == pytest.approx(-fake.sigmoid().log().mean().item())
    real, made = both.sigmoid().chunk(2)
    expected = -0.5 * (real.log().mean() + (1 - made).log().mean())
    assert values["discriminator"].item() == pytest.approx(expected.item())


def test_a_group_of_the_discriminator_is_not_split(make):
    with pytest.raises(ConfigError, match=r"stylegan .* groups of 4: optim\.batch .* got 2"):
        make("loss.gan=0.5", "optim.accumulate=2", *ADVERSARIES["stylegan"])


def test_teacher_and_tower_read_the_same_pixels_in_half_precision(make):
    trainer = make("optim.precision=bf16", "optim.accumulate=1", semantic=True)
    images, target = next(trainer.batches)
    assert images.dtype == torch.float32
    assert target.dtype == torch.bfloat16  # computed under autocast
    assert {p.dtype for p in trainer.task.teacher.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in trainer.task.teacher.parameters())
    assert not trainer.task.teacher.training
    assert cosine(target.float(), trainer.task.teacher(images)) > 0.98
    values = trainer.train_step()
    assert {value.dtype for value in values.values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_full_precision(make, precision):
    full = make("model.quantizer.scale_drop=0")
    half = make("model.quantizer.scale_drop=0", f"optim.precision={precision}")
    assert half.task.generator.scaler.is_enabled() == (precision == "fp16")
    for _ in range(3):
        a, b = full.train_step(), half.train_step()
    assert b["l2"].item() == pytest.approx(a["l2"].item(), rel=0.05)


def test_accumulation_is_one_large_batch(make):
    whole = make("model.quantizer.scale_drop=0")
    parts = make("model.quantizer.scale_drop=0", "optim.accumulate=2", "codebook.kmeans_batches=2")
    parts.model.load_state_dict(whole.model.state_dict())
    for trainer in (whole, parts):
        trainer.train_step()
    assert whole.position == parts.position == 4
    for (name, a), (_, b) in zip(
        whole.model.named_parameters(), parts.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_gradients_are_clipped(make):
    trainer = make("optim.max_grad_norm=0.001")
    assert trainer.train_step()["grad_norm"] > 0.001  # what it was
    norm = torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None])
    assert norm.norm() <= 0.001 * (1 + 1e-5)


def test_parts_have_learning_rates_of_their_own(make, tmp_path):
    scales = ("optim.lr_scale.pixel_encoder=0.5", "optim.lr_scale.codebooks=0")
    trainer = make(*scales, "optim.lr=1e-2", "optim.warmup=2")
    groups = {group["name"]: group for group in trainer.task.generator.optimizer.param_groups}
    assert list(groups) == ["pixel_encoder", "pixel_decoder"]
    before = weights(trainer.model)
    for factor in (0.5, 1.0):  # the warm-up, of every group alike
        assert groups["pixel_encoder"]["lr"] == pytest.approx(0.5e-2 * factor)
        assert groups["pixel_decoder"]["lr"] == pytest.approx(1e-2 * factor)
        trainer.train_step()
    moved = changed(before, trainer.model)
    assert {name.split(".")[0] for name in moved} >= {"encoder", "decoder"}
    assert not [name for name in moved if "codebooks" in name]
    # Adam's first steps are as long as the learning rate, whatever the gradient.
    step = (trainer.model.encoder.conv_in.weight - before["encoder.conv_in.weight"]).abs()
    assert step.max() <= 0.5e-2 * 1.5 * (1 + 1e-3)
    lines = trainer.task.headline().splitlines()
    assert [line.split(" M  ")[1] for line in lines[:3]] == ["lr 0.005", "frozen", "lr 0.01"]
    trainer.save()
    other = make(*scales, "optim.lr=1e-2", "optim.warmup=2")
    other.restore(checkpoint.available(tmp_path / "run" / "checkpoints")[-1])
    for one, two in zip(
        trainer.task.generator.optimizer.param_groups,
        other.task.generator.optimizer.param_groups,
        strict=True,
    ):
        assert (one["name"], one["lr"]) == (two["name"], two["lr"])


def test_the_decoder_alone_trains(make):
    """As the enhanced decoder of arXiv 2412.03069, section 3.1: all else frozen."""
    others = ("pixel_encoder", "codebooks", "semantic_tower", "semantic_head", "semantic_decoder")
    trainer = make(*(f"optim.lr_scale.{part}=0" for part in others), "codebook.kmeans_batches=0")
    before = weights(trainer.model)
    trainer.train_step()
    moved = {n for n in changed(before, trainer.model) if not n.startswith("quantizer.usage")}
    assert moved
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)
    assert not any(name.startswith("encoder") for name in trainer.task.ema.weights)


@pytest.mark.once
def test_recomputed_activations_change_no_step(make):
    plain, again = make(), make("checkpointing=yes")
    for _ in range(2):
        plain.train_step()
        again.train_step()
    for (name, a), b in zip(
        weights(plain.model).items(), again.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


slow = pytest.mark.skipif(
    "TOKENFLOW_SLOW_TESTS" not in os.environ,
    reason="minutes of C++: set TOKENFLOW_SLOW_TESTS=1",
)


@pytest.mark.once
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=slow)])
def test_a_compiled_model_trains_alike(make, monkeypatch, backend):
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: compile_module(m, backend=backend))
    plain, compiled = make(), make("compile=yes")
    assert list(plain.model.state_dict()) == list(compiled.model.state_dict())
    for _ in range(2):
        a, b = plain.train_step(), compiled.train_step()
    for key, value in a.items():
        assert b[key].item() == pytest.approx(value.item(), rel=1e-3), key
    assert compiled.evaluate()["psnr"] == pytest.approx(plain.evaluate()["psnr"], rel=1e-4)


def test_kmeans_starts_codes_on_the_features(make):
    plain, started = make("codebook.kmeans_batches=0"), make()
    images = started.task.crops.held_out
    with torch.no_grad():
        losses = [
            t.model.eval().quantizer(t.model.features(images)).vq_loss for t in (plain, started)
        ]
    assert losses[1] < 0.7 * losses[0]
    for average, codebook in started.task.averaged_codebooks():
        assert torch.equal(average, codebook)


def test_dead_codes_are_restarted_in_model_and_average(make):
    trainer = make("codebook.restart_every=2", "codebook.restart_until=1")
    quantizer = trainer.model.quantizer
    far = torch.nn.functional.normalize(torch.full((8,), -1.0), dim=0)
    with torch.no_grad():
        quantizer.codebooks[0][5] = far
    trainer.train_step()
    quantizer.usage_ema[5] = 0
    trainer.train_step()
    assert not torch.allclose(quantizer.codebooks[0][5], far, atol=0.1)
    average, codebook = trainer.task.averaged_codebooks()[0]
    assert torch.equal(codebook[5], average[5])
    assert quantizer.usage_ema[5] > 0


def test_codebooks_by_moving_average(make):
    trainer = make("model.quantizer.codebook_update=ema")
    before = weights(trainer.model)
    trainer.train_step()
    assert "quantizer.codebooks.0" in changed(before, trainer.model)


@pytest.mark.once
def test_training_learns(make):
    trainer = make("optim.lr=5e-3", "optim.steps=60", "optim.batch=8", "optim.ema_decay=0.8")
    first = trainer.evaluate()["psnr"]
    for _ in range(60):
        trainer.train_step()
    assert trainer.evaluate()["psnr"] > first + 3


def test_a_loss_that_is_not_finite_is_an_error(make):
    trainer = make("output.log_every=1")
    with torch.no_grad():
        trainer.model.decoder.conv_out.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"step 1.*l2"):
        trainer.fit()


def test_a_run_leaves_what_it_says(micro, images, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = micro.overrides(run, images, *micro.PIXEL_ONLY, "output.tensorboard=yes")
    tokenizer.main(arguments)
    text = capsys.readouterr().out
    assert "codebook_size: 64" in text
    assert "PSNR" in text
    assert str(run / "pictures" / "final.png") in text
    assert (run / "pictures" / "final.png").is_file()
    assert list((run / "tensorboard").iterdir())
    assert load_config(run / "config.yaml") == load_config(None, arguments)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in lines if r["kind"] == "held_out"] == [0, 3, 6]
    resident = 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    memory = [r["peak_memory_gib"] for r in lines if r["kind"] == "train"]
    assert memory == sorted(memory)
    # Linux adds up its counters of pages late: a few pages lie between two readings.
    assert 0.05 < memory[-1] <= resident / 2**30 + 1e-3
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    logged = [event.value for event in board.Scalars("train/peak_memory_gib")]
    assert logged == pytest.approx(memory)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["last"]["psnr"] == lines[-1]["psnr"]
    saved = checkpoint.available(run / "checkpoints")
    assert [p.name for p in saved] == ["step_00000003", "step_00000006"]
    model = TokenFlowTokenizer.from_pretrained(saved[-1])  # the average is ready for use
    assert model.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 21)
    with pytest.raises(SystemExit, match="already holds a run"):
        tokenizer.main(arguments)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("loss.perceptual=1", "VGG16"),
        ("data.path=nowhere", "nowhere"),
        ("optim.batch=5", "accumulation"),
        ("optim.nothing=1", "nothing"),
        ("init=nowhere", "nowhere"),
    ],
)
def test_errors_end_with_one_line(micro, images, tmp_path, argument, message):
    arguments = micro.overrides(
        tmp_path / "run", images, *micro.PIXEL_ONLY, "optim.accumulate=2", argument
    )
    with pytest.raises(SystemExit, match=message) as caught:
        tokenizer.main(arguments)
    assert str(caught.value).startswith("error: ")


def test_a_missing_teacher_is_named(micro, images, tmp_path):
    file = tmp_path / "teacher.pth"
    arguments = micro.overrides(tmp_path / "run", images, f"teacher_weights={file}")
    with pytest.raises(SystemExit, match=str(file)):
        tokenizer.main(arguments)


def test_resuming_another_model_is_refused(micro, images, tmp_path):
    arguments = micro.overrides(tmp_path / "run", images, *micro.PIXEL_ONLY, "optim.steps=3")
    tokenizer.main(arguments)
    with pytest.raises(SystemExit, match=r"model\.quantizer\.codebook_size: 64 -> 32"):
        tokenizer.main([*arguments, "--resume", "model.quantizer.codebook_size=32"])
    newest = checkpoint.available(tmp_path / "run" / "checkpoints")[-1]
    (newest / "training.pt").write_bytes((newest / "training.pt").read_bytes()[:1000])
    with pytest.raises(SystemExit, match=r"training\.pt is truncated"):
        tokenizer.main([*arguments, "--resume"])


def test_restart_takes_rows_of_every_scale(make):
    """Of each as many as there are, up to its share of the codes, none twice."""
    trainer = make("model.quantizer.codebook_size=24", "codebook.restart_rows=by_scale")
    task = trainer.task
    rows = torch.arange(3 * 21, dtype=torch.float32).unsqueeze(1).expand(-1, 40)  # 3 images
    found = task._evenly_by_scale(rows)[:, 0].long()
    assert len(set(found.tolist())) == len(found) == 3 + 8 + 8  # 24 codes by 3 scales: 8 of each
    place = found % 21
    assert [int(((place >= a) & (place < b)).sum()) for a, b in ((0, 1), (1, 5), (5, 21))] == [
        3, 8, 8,
    ]  # fmt: skip


def test_dead_codes_are_restarted_by_scale(make):
    trainer = make(
        "codebook.restart_every=1", "codebook.restart_until=1", "codebook.restart_rows=by_scale"
    )
    quantizer = trainer.model.quantizer
    with torch.no_grad():
        quantizer.usage_ema.zero_()
        quantizer.usage_ema[0] = 1.0
    before = [code.clone() for code in quantizer.codebooks]
    trainer.train_step()
    changed = sum(
        int((a != b).any(dim=1).sum()) for a, b in zip(before, quantizer.codebooks, strict=True)
    )
    assert changed > 32


def test_usage_by_scale(make):
    """Against a count of the held-out crops' own tokens."""
    trainer = make()
    values = trainer.evaluate()
    with trainer.averaged() as model, torch.no_grad():
        tokens = model.encode(trainer.task.crops.held_out)
    start = 0
    for number, side in enumerate((1, 2, 4), start=1):
        own = tokens[:, start : start + side * side]
        start += side * side
        most = min(64, own.numel())
        assert values[f"usage_scale_{number}"] == pytest.approx(len(own.unique()) / most)
