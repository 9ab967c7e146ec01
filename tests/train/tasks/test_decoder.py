"""Fine-tuning of the pixel decoder: what moves, what must not, and that it resumes and splits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tokenflow_ext.models import TokenFlowTokenizer, TokenizerConfig
from tokenflow_ext.train import decoder
from tokenflow_ext.train.cli import entry
from tokenflow_ext.train.config import load_config, load_decoder_config
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.engine.loop import Trainer
from tokenflow_ext.train.engine.parallel import evaluating
from tokenflow_ext.train.tasks.decoder import DecoderTask, with_enhanced_decoder

ALONE = Processes(0, 1, torch.device("cpu"))
TOGETHER = Path(__file__).parents[1] / "together.py"
GAN = ("loss.gan=0.5", "loss.gan_start=0")


@pytest.fixture(scope="module")
def original_file(micro, images, tmp_path_factory) -> Path:
    """A tokenizer under the original names and in their kind of file, of micro sizes."""
    folder = tmp_path_factory.mktemp("released")
    model = TokenFlowTokenizer(released_config(micro, images))
    for group in model.quantizer.codebooks:
        group.data.normal_()
    return model.save_original(folder / "released.pt")


def released_config(micro, images) -> TokenizerConfig:
    """With CLIP's tower at the micro sizes."""
    tower = ("kind=clip", "image_size=32", "patch_size=8", "width=16", "depth=1", "heads=2")
    tower += ("mlp_width=32", "input_scale=1.0")
    semantic = [
        f"model.{part}.{value}" for part in ("semantic.tower", "teacher") for value in tower
    ]
    frozen = "model.semantic.frozen=no"
    return load_config(None, micro.overrides(Path("run"), images, *semantic, frozen)).model


@pytest.fixture
def make(micro, image_tokenizer, images, tmp_path):
    """make("decoder=enhanced", ...): a trainer over the micro tokenizer, ready for steps."""

    def build(*more: str, init: Path = image_tokenizer) -> Trainer:
        given = micro.decoder_overrides(tmp_path / "run", init, images, *more)
        trainer = Trainer(load_decoder_config(None, given), ALONE, DecoderTask)
        trainer.prepare()
        return trainer

    return build


def state(model) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def pictures(count: int = 3, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, 3, size, size, generator=generator) * 2 - 1


@pytest.mark.parametrize("kind", ["kept", "enhanced"])
def test_the_decoder_moves_and_nothing_else(make, image_tokenizer, kind):
    start = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    trainer = make(f"decoder={kind}", *GAN, "loss.gan_adaptive=yes")
    before = state(trainer.model)
    for _ in range(2):
        trainer.train_step()
    for averaged in (False, True):
        with trainer.averaged() if averaged else evaluating(trainer.model):
            model = trainer.model
            after = state(model)
            moved = {k for k, v in after.items() if not torch.equal(v, before[k])}
            assert moved == {k for k in after if k.startswith("decoder.")}
            assert torch.equal(model.encode(pictures()), start.encode(pictures()))
        assert not any(part.training for part in model.modules())
    frozen = [p for k, p in trainer.model.named_parameters() if not k.startswith("decoder.")]
    assert all(p.grad is None for p in frozen)
    assert sum(
        p.numel() for g in trainer.task.generator.optimizer.param_groups for p in g["params"]
    ) == sum(p.numel() for p in trainer.model.decoder.parameters())


def test_the_decoder_starts_from_what_it_was(make, image_tokenizer):
    start = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    trainer = make()
    assert trainer.model.config == start.config
    for key, value in start.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[key], value), key


def test_the_enhanced_decoder_starts_anew_once(make, image_tokenizer, tmp_path):
    start = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    start.unused_tensors["note"] = torch.ones(1)
    made = with_enhanced_decoder(start)
    pixel = start.config.pixel
    assert made.config.pixel.decoder_channels == 2 * pixel.channels == 16
    assert made.config.pixel.decoder_res_blocks == 2 * pixel.res_blocks
    assert made.decoder.conv_out.weight.shape == (3, 16, 3, 3)
    assert len(made.decoder.conv_blocks[0].res) == 2 * pixel.res_blocks + 1
    assert made.unused_tensors == start.unused_tensors
    # A decoder that is one already goes on from its weights.
    assert with_enhanced_decoder(made) is made
    folder = made.save_pretrained(tmp_path / "enhanced")
    again = make("decoder=enhanced", init=folder)
    for key, value in made.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value), key


@pytest.mark.once
def test_it_learns_from_what_decode_reads(make):
    """The quantized features of a step are those of the tokens, every scale of them."""
    trainer = make("optim.batch=16")
    images, quantized = next(trainer.batches)
    model = trainer.model
    assert not quantized.quantized.requires_grad
    assert torch.equal(quantized.indices, model.encode(images))
    expected = model.decode(quantized.indices)[0]
    torch.testing.assert_close(trainer.task.decode(quantized).images, expected)


def test_the_losses_are_those_of_the_images(make):
    trainer = make(*GAN)
    images, quantized = next(trainer.batches)
    trainer.batches = iter([(images, quantized)])
    made = trainer.model.decode(quantized.indices)[0].detach()
    logits = trainer.task.pixel_loss.discriminator.module(made)
    values = trainer.train_step()
    l2 = (made - images).square().mean()
    torch.testing.assert_close(values["l2"], l2)
    torch.testing.assert_close(values["total"], l2 - 0.5 * logits.mean().detach())
    assert values["semantic"] == values["vq"] == 0


@pytest.mark.once
@pytest.mark.parametrize("kind", ["kept", "enhanced"])
def test_training_improves_the_images(make, kind):
    trainer = make(f"decoder={kind}", "optim.lr=1e-2", "optim.steps=30", "optim.ema_decay=0.8")
    first = trainer.evaluate()
    for _ in range(30):
        trainer.train_step()
    last = trainer.evaluate()
    assert last["psnr"] > first["psnr"] + 0.5
    assert (last["usage"], last["perplexity"]) == (first["usage"], first["perplexity"])


def test_a_run_ends_with_a_whole_tokenizer(micro, original_file, images, tmp_path, capsys):
    """From an original checkpoint to an original checkpoint, by the command."""
    config = released_config(micro, images)
    source = TokenFlowTokenizer.from_pretrained(original_file, config=config)
    folder = source.save_pretrained(tmp_path / "source")
    run = tmp_path / "run"
    given = micro.decoder_overrides(run, folder, images, "decoder=enhanced", "optim.steps=2")
    entry.main(["train-decoder", *given])
    text = capsys.readouterr().out
    assert "decoder: enhanced" in text
    assert "PSNR" in text
    assert load_decoder_config(run / "config.yaml") == load_decoder_config(None, given)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"train", "held_out"}
    model = TokenFlowTokenizer.from_pretrained(checkpoint.find(run))
    assert model.config == config.with_enhanced_decoder()
    assert torch.equal(model.encode(pictures()), source.encode(pictures()))
    written = model.save_original(tmp_path / "again.pt")
    again = TokenFlowTokenizer.from_pretrained(written, config=model.config)
    assert torch.equal(
        again.decode(again.encode(pictures()))[0], model.decode(model.encode(pictures()))[0]
    )


def test_an_original_file_is_a_start(micro, original_file, images, tmp_path, monkeypatch):
    """Read as one: the file's own name, the resolution asked for, what is left aside kept."""
    asked = []
    config = released_config(micro, images)
    plain = TokenFlowTokenizer.from_pretrained

    def read(path, resolution=None):
        asked.append((Path(path), resolution))
        return plain(path, config=config)

    monkeypatch.setattr(TokenFlowTokenizer, "from_pretrained", read)
    given = micro.decoder_overrides(tmp_path / "run", original_file, images, "resolution=256")
    task = DecoderTask(load_decoder_config(None, [*given, "decoder=enhanced"]), ALONE)
    assert asked == [(original_file, 256)]
    assert "quantize.codebook_used" in task.model.unused_tensors


@pytest.mark.once
@pytest.mark.parametrize(
    "settings",
    [
        ("decoder=enhanced", "loss.gan_start=2", "optim.accumulate=2"),
        (
            "loss.gan_start=0",
            "loss.discriminator=stylegan",
            "loss.discriminator_channels=8",
            "loss.gan_adaptive=yes",
            "optim.precision=bf16",
            "data.workers=1",
        ),
    ],
    ids=["enhanced", "bf16"],
)
def test_six_steps_are_three_and_three(micro, image_tokenizer, images, tmp_path, settings):
    def given(run: str) -> list[str]:
        more = ("loss.gan=0.5", *settings)
        return micro.decoder_overrides(tmp_path / run, image_tokenizer, images, *more)

    micro.assert_halves_are_whole(decoder.main, given, tmp_path)


@pytest.mark.once
def test_two_processes(micro, image_tokenizer, images, tmp_path):
    """A step is that of the joined batch; a run resumes bit for bit."""

    def arguments(run: str, *more: str) -> list[str]:
        return micro.decoder_overrides(tmp_path / run, image_tokenizer, images, *GAN, *more)

    one = arguments("one", "optim.batch=8", "decoder=enhanced", "optim.max_grad_norm=1e9")
    runs = [arguments(run, "data.held_out_crops=3") for run in ("whole", "halves")]
    processes = []
    for world in (1, 2):
        plan = {
            "program": "decoder",
            "steps": {str(tmp_path / f"step{world}.pt"): one},
            "halved": runs if world == 2 else [],
            "runs": [],
        }
        file = tmp_path / f"plan{world}.json"
        file.write_text(json.dumps(plan))
        processes.append(micro.launch([str(file)], processes=world, script=TOGETHER))
    for process in processes:
        micro.finish(process)
    steps = [torch.load(tmp_path / f"step{n}.pt", weights_only=True) for n in (1, 2)]
    assert {k.split(".")[1] for k in steps[0]["gradients"]} == {"decoder", "main"}
    micro.assert_same_step(*steps)
    micro.assert_same_end(tmp_path / "whole", tmp_path / "halves")


def test_the_script(micro, image_tokenizer, images, tmp_path):
    run = tmp_path / "run"
    given = micro.decoder_overrides(run, image_tokenizer, images, "optim.steps=1")
    micro.finish(micro.launch(given, script=micro.DECODER_SCRIPT))
    assert (run / "summary.json").is_file()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("decoder=huge", "decoder must be one of kept, enhanced, got 'huge'"),
        ("loss.semantic=1", r"unknown field loss\.semantic"),
        ("loss.pixel=0", r"loss\.pixel and loss\.perceptual are both 0"),
        ("init=nowhere", "nothing at nowhere"),
        ("resolution=64", "resolution must be 32 for .*, got 64"),
        ("loss.generator_loss=l1", r"loss\.generator_loss must be one of"),
    ],
)
def test_errors_end_with_one_line(micro, image_tokenizer, images, tmp_path, argument, message):
    given = micro.decoder_overrides(tmp_path / "run", image_tokenizer, images, argument)
    with pytest.raises(SystemExit, match=message) as caught:
        decoder.main(given)
    assert str(caught.value).startswith("error: ")


def test_resuming_another_decoder_is_refused(micro, image_tokenizer, images, tmp_path):
    given = micro.decoder_overrides(tmp_path / "run", image_tokenizer, images, "optim.steps=1")
    decoder.main(given)
    with pytest.raises(SystemExit, match=r"decoder: .kept. -> .enhanced."):
        decoder.main([*given, "--resume", "decoder=enhanced", "optim.steps=2"])
