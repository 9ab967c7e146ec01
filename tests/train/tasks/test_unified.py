"""Training both ways: losses, what is held out, resuming, processes, and what a run leaves."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tokenflow_ext.models import CheckpointError, TextToImage, as_text_to_image
from tokenflow_ext.train import understanding, unified
from tokenflow_ext.train.cli.commands.tokenize import tokenize
from tokenflow_ext.train.config import load_unified_config
from tokenflow_ext.train.data.conversations import IGNORED
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.engine.loop import Trainer
from tokenflow_ext.train.evaluation.answering import Answerer
from tokenflow_ext.train.tasks.image_generator import ImageGenerator
from tokenflow_ext.train.tasks.understanding import load_understanding
from tokenflow_ext.train.tasks.unified import UnifiedTask

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def arguments(micro, image_tokenizer, questions, pairs, tmp_path):
    """arguments("run", "optim.steps=3", ...): the command line of a run below tmp_path."""

    def build(run: str, *more: str) -> list[str]:
        return micro.unified_overrides(tmp_path / run, image_tokenizer, questions, pairs, *more)

    return build


@pytest.fixture
def make(arguments):
    """make("optim.steps=3", ...): a trainer, ready for steps."""

    def build(*more: str) -> Trainer:
        trainer = Trainer(load_unified_config(None, arguments("run", *more)), ALONE, UnifiedTask)
        trainer.prepare()
        return trainer

    return build


def moved(trainer, steps=2):
    """Which parts two steps change."""
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    values = [trainer.train_step() for _ in range(steps)]
    after = trainer.model.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    return changed, {k for k in before if "vision_tower" not in k}, set(values[0])


DRAWING = ("mm_projector", "lvl_embed", "pos_1LC")


def of_drawing(name):
    return name.removeprefix("model.language_model.").startswith(DRAWING)


def test_both_ways_train_everything(make):
    changed, trainable, values = moved(make())
    assert changed == trainable
    assert {"loss", "answering", "drawing"} <= values


@pytest.mark.parametrize("way", ["answering", "drawing"])
def test_one_way_leaves_the_other_way_s_parts(make, way):
    changed, trainable, values = moved(make(f"ways=[{way}]"))
    if way == "answering":
        left = {name for name in trainable if of_drawing(name)}
    else:
        left = {name for name in trainable if "multi_modal_projector" in name}
    assert left
    assert changed == trainable - left
    assert {"answering", "drawing"} & values == {way}


def test_the_loss_is_the_sum_of_the_two_by_their_definitions(make):
    trainer = make()
    asked, (ids, tokens, valid) = next(trainer.batches)
    task, model = trainer.task, trainer.model
    with torch.no_grad():
        logits = model(
            input_ids=asked.ids, attention_mask=asked.valid, pixel_values=asked.pictures
        ).logits
        answering = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).double(),
            asked.labels[:, 1:].flatten(),
            ignore_index=IGNORED,
        )
        drawing = as_text_to_image(model)(ids, tokens, valid).loss
    values = task.micro_step((asked, (ids, tokens, valid)), 0)
    assert values["answering"].item() == pytest.approx(answering.item(), rel=1e-5)
    assert values["drawing"].item() == pytest.approx(drawing.item(), rel=1e-5)
    assert values["loss"].item() == pytest.approx((answering + drawing).item(), rel=1e-5)


def test_drawing_alone_is_text_to_image(make):
    """The tokens of the captions' pictures, and none but the captions that are not dropped."""
    trainer = make("ways=[drawing]", "drawing.drop=0.0", "drawing.truncate=0.0")
    asked, (ids, tokens, valid) = next(trainer.batches)
    assert asked is None
    text = trainer.task.text
    said = [text.decode(row[keep]) for row, keep in zip(ids, valid, strict=True)]
    assert all(line.endswith("<img>") for line in said)
    assert tokens.shape == (4, trainer.task.drawing.model.config.image_tokens)


def test_what_is_held_out_is_held_out_of_both(make, capsys):
    unseen = r"drawing.unseen=A (red|blue) disc\. On grey\."
    trainer = make(unseen)
    said = "".join(capsys.readouterr())
    task = trainer.task
    names = [name for c in task.dataset.source.conversations for name in c.pictures]
    assert len(names) == 10
    assert not {"red_disc.png", "blue_disc.png"} & set(names)
    drawn = task.captioned.source.captions_up_to(100)
    assert len(drawn) == 10
    assert not any("red disc" in text or "blue disc" in text for text in drawn)
    held_out = task.evaluated_drawing["held_out"][1]
    assert sorted(held_out) == ["A blue disc. On grey.", "A red disc. On grey."]
    assert "2 conversations about pictures that are held out" in said
    # The one without a picture stays.
    assert any(not c.pictures for c in task.dataset.source.conversations)


def test_a_picture_without_a_caption_may_be_held_out(make, questions, tmp_path, capsys):
    entries = json.loads(questions.read_text())
    for entry in entries[:3]:
        del entry["caption"]
    for name in {entry["image"] for entry in entries if "image" in entry}:
        shutil.copy(questions.parent / name, tmp_path)
    (tmp_path / "some.json").write_text(json.dumps(entries))
    given = f"data.path={tmp_path / 'some.json'}"
    task = make(given, r"drawing.unseen=A white square\. On grey\.").task
    assert len(task.dataset.source) == len(entries) - 4
    assert "3 conversations about pictures without a caption" in "".join(capsys.readouterr())
    # Where nothing is held out, nothing is left out.
    assert len(make(given).task.dataset.source) == len(entries)


def test_tokens_are_what_pictures_are(make, pairs, image_tokenizer, tmp_path):
    tokenize(str(pairs), str(image_tokenizer), str(tmp_path / "tokens"))
    pixels, ready = make(), make(f"drawing.path={tmp_path / 'tokens'}")
    for _ in range(2):
        first, second = next(pixels.batches)[1], next(ready.batches)[1]
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_checkpointing_changes_no_gradient(make):
    gradients = []
    for trainer in (make(), make("model.checkpointing=yes")):
        trainer.task.micro_step(next(trainer.batches), 0)
        gradients.append([p.grad for p in trainer.model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        pytest.param(
            ("optim.accumulate=2", "optim.ema_decay=0.9", "optim.precision=bf16",
             "drawing.workers=1", r"drawing.unseen=A red disc\. On grey\."),
            marks=pytest.mark.once),
    ],
    ids=["plain", "averaged"],
)  # fmt: skip
def test_six_steps_are_three_and_three(micro, arguments, tmp_path, settings):
    micro.assert_halves_are_whole(unified.main, lambda run: arguments(run, *settings), tmp_path)


@pytest.mark.once
def test_two_processes_are_one_with_the_joined_batch(micro, arguments, tmp_path):
    kinds = {"both": (), "drawing": ("ways=[drawing]", "optim.ema_decay=0.5")}

    def given(run: str, *more: str) -> list[str]:
        return arguments(run, "optim.batch=8", *more)

    micro.train_together(tmp_path, "unified", given, kinds)
    for name in kinds:
        micro.assert_joined_batch(tmp_path, name)


def test_what_a_run_leaves(arguments, pairs, tmp_path, capsys):
    """One folder that is asked and drawn with, with the weights of one model."""
    unified.main(arguments("run", "optim.steps=3"))
    text, run = capsys.readouterr().out, tmp_path / "run"
    assert "12 pictures with captions; answering and drawing" in text
    assert "right tokens, training captions" in text
    assert (run / "pictures" / "final.png").is_file()
    newest = checkpoint.available(run / "checkpoints")[-1]
    weights = load_understanding(newest)[0].state_dict()
    generator = ImageGenerator.load(run)
    for key, value in generator.model.state_dict().items():
        saved = key if key.startswith("lm_head") else f"model.language_model.{key[6:]}"
        assert torch.equal(value, weights[saved]), key
    (image,) = generator.draw(["A red disc."], [3])
    assert image.dtype == torch.uint8
    again = ImageGenerator.load(newest)
    assert torch.equal(next(again.draw(["A red disc."], [3])), image)
    assert again.weights == generator.weights
    from PIL import Image

    chat = [[{"role": "user", "content": "<image>\nWhat colour is it?"}]]
    picture = Image.open(next(pairs.glob("*.png")))
    (answer,) = Answerer(run, torch.device("cpu")).answer(chat, [[picture]], new=3)
    assert isinstance(answer, str)


def test_pictures_are_answers_and_drawings(make):
    above, below = make("output.pictures=2").task.pictures()
    assert above.shape == below.shape == (4, 3, 192, 192)
    above, _ = make("output.pictures=3", "ways=[drawing]").task.pictures()
    assert len(above) == 6


@pytest.mark.once
def test_it_learns_both(make):
    trainer = make(
        "optim.steps=300", "optim.lr=3e-3", "optim.batch=12", "data.evaluated=12",
        "drawing.evaluated=12", "drawing.drop=0.0", "drawing.truncate=0.0",
    )  # fmt: skip
    before = trainer.evaluate()
    for _ in range(150):
        trainer.train_step()
    after = trainer.evaluate()
    assert after["known_right"] > 0.6 > before["known_right"]
    assert after["known_drawing_right"] > 0.6 > before["known_drawing_right"]


# -- starts -------------------------------------------------------------------------------------


def test_starting_from_a_language_model(make, backbone):
    trainer = make(f"language_model={backbone}", "data.template=plain")
    start = load_file(backbone / "model.safetensors")
    own = trainer.model.state_dict()
    key = "layers.0.mlp.up_proj.weight"
    assert torch.equal(own[f"model.language_model.{key}"], start[f"model.{key}"])
    trainer.train_step()


def test_starting_from_a_run(arguments, make, tmp_path):
    unified.main(arguments("one", "optim.steps=3"))
    trainer = make(f"init={tmp_path / 'one'}", "tokenizer=nowhere")
    saved = load_understanding(tmp_path / "one")[0].state_dict()
    own = trainer.model.state_dict()
    assert own.keys() == saved.keys()
    assert all(torch.equal(own[key], value) for key, value in saved.items())
    assert isinstance(trainer.task.drawing.model, TextToImage)


def test_an_understanding_run_does_not_draw(micro, arguments, image_tokenizer, questions, tmp_path):
    run = tmp_path / "answers"
    understanding.main(
        micro.understanding_overrides(run, image_tokenizer, questions, "optim.steps=3")
    )
    with pytest.raises(SystemExit, match=r"init=.* does not draw: it answers alone"):
        unified.main(arguments("run", f"init={run}"))
    with pytest.raises(CheckpointError, match="answers questions and does not draw"):
        ImageGenerator.load(run)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ways=[]", "ways must name one or both"),
        ("ways=[singing]", "ways must be one of answering, drawing"),
        ("drawing.path=nowhere", "no folder at nowhere"),
        ("drawing.unseen=(", r"drawing\.unseen is no regular expression"),
        ("drawing.unseen=none", r"leave none of 12 captions to hold out"),
        ("drawing.unseen=A.* drawing.held_out=x", "are two held-out sets"),
        ("drawing.drop=2", r"drawing\.drop must be within"),
        ("drawing.streams=[1]", r"drawing\.streams must be two numbers"),
        ("model.prompt_length=0", r"model\.prompt_length must be"),
        ("model.trained=[projector]", r"model\.trained must be projector, language_model"),
        ("model.lora.rank=2", r"model\.lora is not for training both ways"),
        ("parallel=fsdp", "parallel=fsdp is not for training both ways"),
        ("model.backbone.max_position_embeddings=16", "a picture is 16 tokens"),
        ("init=nowhere", "nothing at nowhere"),
    ],
)
def test_errors_end_with_one_line(arguments, given, message):
    with pytest.raises(SystemExit, match=message) as caught:
        unified.main(arguments("run", *re.split(r" (?=\w+[.=])", given)))
    assert str(caught.value).startswith("error: ")
