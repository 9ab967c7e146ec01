"""Training understanding: steps, parts, resuming, processes, starts, and errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.train import understanding
from tokenflow_ext.train.cli.commands.tokenize import tokenize
from tokenflow_ext.train.config import load_understanding_config
from tokenflow_ext.train.data.conversations import IGNORED
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.engine.loop import Trainer
from tokenflow_ext.train.tasks.understanding import UnderstandingTask, load_understanding

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def arguments(micro, image_tokenizer, questions, tmp_path):
    """arguments("run", "optim.steps=3", ...): the command line of a run below tmp_path."""

    def build(run: str, *more: str) -> list[str]:
        return micro.understanding_overrides(tmp_path / run, image_tokenizer, questions, *more)

    return build


@pytest.fixture
def make(arguments):
    """make("optim.steps=3", ...): a trainer, ready for steps."""

    def build(*more: str) -> Trainer:
        config = load_understanding_config(None, arguments("run", *more))
        trainer = Trainer(config, ALONE, UnderstandingTask)
        trainer.prepare()
        return trainer

    return build


def changed(trainer, steps=2):
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    for _ in range(steps):
        trainer.train_step()
    after = trainer.model.state_dict()
    return {k for k in before if not torch.equal(before[k], after[k])}, set(before)


def test_projector_and_language_model_train(make):
    moved, every = changed(make())
    assert moved == {name for name in every if "vision_tower" not in name}


def test_stage_one_trains_the_projector_alone(make):
    moved, _ = changed(make("model.trained=[projector]", "data.template=plain"))
    part = "model.multi_modal_projector.linear_"
    assert moved == {f"{part}{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}


def test_the_loss_is_that_of_the_answers(make):
    """Held against the definition: cross-entropy of every learned id, all logits computed."""
    trainer = make()
    batch = next(trainer.batches)
    model = trainer.model
    with torch.no_grad():
        logits = model(
            input_ids=batch.ids, attention_mask=batch.valid, pixel_values=batch.pictures
        ).logits
    want = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(),
        batch.labels[:, 1:].flatten(),
        ignore_index=IGNORED,
    )
    total, right, _ = trainer.task._losses(model, batch)
    learned = (batch.labels[:, 1:] != IGNORED).sum()
    assert len(right) == learned
    assert (total / learned).item() == pytest.approx(want.item(), rel=1e-5)


def test_evaluation_is_greedy_answers(make):
    """A conversation counts as right exactly where the greedy answer is the true one."""
    trainer = make("optim.steps=300", "optim.lr=3e-3", "data.evaluated=12", "optim.batch=8")
    for _ in range(120):
        trainer.train_step()
    task = trainer.task
    with trainer.averaged():
        shares = trainer.evaluate()["known_right"]
        right = 0
        for said, example in task.evaluated["known"]:
            if len(said.turns) == 2:
                right += task._answer(said, example) == said.turns[1].text
        single = [e for s, e in task.evaluated["known"] if len(s.turns) == 2]
        assert task._score(single)[1] == pytest.approx(right / len(single))
    assert shares > 0.3


@pytest.mark.parametrize("features", ["last", "full", "residual", "continuous"])
def test_each_kind_of_features_trains(make, features):
    trainer = make(f"model.features={features}")
    losses = [trainer.train_step()["loss"].item() for _ in range(6)]
    assert losses[-1] < losses[0]


def test_tokens_are_what_pictures_are(make, questions, image_tokenizer, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for picture in questions.parent.glob("*.png"):
        shutil.copy(picture, folder)
    tokenize(str(folder), str(image_tokenizer), str(tmp_path / "tokens"))
    on_the_fly, ready = make(), make(f"data.tokens={tmp_path / 'tokens'}")
    for _ in range(3):
        for a, b in zip(next(on_the_fly.batches), next(ready.batches), strict=True):
            assert torch.equal(a, b)


def test_checkpointing_changes_no_gradient(make):
    plain, again = make(), make("model.checkpointing=yes")
    for trainer in (plain, again):
        trainer.train_step()
    for (name, a), b in zip(plain.model.named_parameters(), again.model.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_full_precision(make, precision):
    full, half = make(), make(f"optim.precision={precision}")
    for _ in range(3):
        a, b = full.train_step(), half.train_step()
    assert b["loss"].item() == pytest.approx(a["loss"].item(), rel=0.02)


def test_adapters_alone_train(make):
    lora = ("model.lora.rank=4", "model.lora.alpha=8")
    trainer = make(*lora)
    moved, every = changed(trainer, 3)
    assert moved == {n for n in every if "lora_" in n or "multi_modal_projector" in n}
    assert len(moved) == 2 * 7 * 2 + 4  # two layers of seven linear ones


def test_adapters_are_saved_merged_and_apart(make, tmp_path):
    import peft

    trainer = make("model.lora.rank=4", "model.lora.alpha=8", "optim.lr=1e-2")
    for _ in range(3):
        trainer.train_step()
    batch = next(trainer.batches)
    given = {
        "input_ids": batch.ids,
        "attention_mask": batch.valid,
        "pixel_values": batch.pictures,
    }
    own = trainer.model.eval()
    with torch.no_grad():
        want = own(**given).logits
    weights = {k: v.clone() for k, v in own.state_dict().items()}
    folder = tmp_path / "saved"
    folder.mkdir()
    trainer.task.save(weights, folder)
    merged = load_understanding(folder)[0].eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**given).logits, want, rtol=1e-4, atol=1e-5)
    found = trainer.task.weights(folder)
    assert all(torch.equal(found[k], v) for k, v in weights.items())
    # peft reads the adapter over the model that it was trained on.
    plain = make().model.eval()
    base = {k.replace(".base_layer.", "."): v for k, v in weights.items() if "lora_" not in k}
    plain.load_state_dict(base)
    adapted = peft.PeftModel.from_pretrained(plain, folder / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(**given).logits, want, rtol=1e-4, atol=1e-5)


# -- resuming -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("optim.accumulate=2", "optim.ema_decay=0.9", "optim.precision=bf16", "data.workers=1"),
        ("model.trained=[projector]", "model.checkpointing=yes", "optim.schedule=constant"),
        ("model.lora.rank=2",),
    ],
    ids=["plain", "averaged", "projector", "adapters"],
)
def test_six_steps_are_three_and_three(micro, arguments, tmp_path, settings):
    micro.assert_halves_are_whole(
        understanding.main, lambda run: arguments(run, *settings), tmp_path
    )


@pytest.mark.once
def test_killed_while_writing(micro, arguments, tmp_path):
    micro.assert_a_kill_costs_an_interval(
        understanding.main, arguments, tmp_path, micro.UNDERSTANDING_SCRIPT
    )


def test_what_a_run_leaves(arguments, questions, tmp_path, capsys):
    given = arguments(
        "run", "optim.steps=3", "output.tensorboard=yes", f"data.held_out={questions}"
    )
    understanding.main(given)
    text = capsys.readouterr().out
    run = tmp_path / "run"
    assert "13 conversations, 16 visual tokens a picture" in text
    assert "wholly right answers, held-out conversations" in text
    assert (run / "pictures" / "final.png").is_file()
    assert list((run / "tensorboard").iterdir())
    assert load_understanding_config(run / "config.yaml") == load_understanding_config(None, given)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if r["kind"] == "train"] == [1, 2, 3]
    assert [r["step"] for r in lines if r["kind"] == "evaluation"] == [0, 3]
    newest = checkpoint.available(run / "checkpoints")[-1]
    files = checkpoint.verify(newest)["files"]
    assert {"model.safetensors", "processor_config.json", "tokenizer.json"} <= files.keys()
    # The checkpoint is a folder of transformers, and answers by its means alone.
    model = AutoModelForImageTextToText.from_pretrained(newest)
    processor = AutoProcessor.from_pretrained(newest)
    from PIL import Image

    picture = Image.open(next(questions.parent.glob("*.png")))
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}],
        }
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


def test_a_checkpoint_is_the_model_bit_by_bit(make, tmp_path):
    trainer = make("model.window=3")
    trainer.train_step()
    weights = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.task.save(weights, tmp_path / "saved")
    found = trainer.task.weights(tmp_path / "saved")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[k], v) for k, v in weights.items())


def test_resuming_another_model_is_refused(arguments, tmp_path):
    given = arguments("run", "optim.steps=3")
    understanding.main(given)
    for key in ("model.features=full", "model.window=3", "model.trained=[projector]"):
        with pytest.raises(SystemExit, match=key.split("=")[0].replace(".", r"\.")):
            understanding.main([*given, "--resume", key])
    other = TokenFlowTokenizer.from_pretrained(given[1].removeprefix("tokenizer="))
    with torch.no_grad():
        other.quantizer.codebooks[0][0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match=r"another image tokenizer than .*other"):
        understanding.main([*given, "--resume", f"tokenizer={tmp_path / 'other'}"])


# -- processes ----------------------------------------------------------------------------------

STEPS = {
    "ddp": ("parallel=ddp",),
    "fsdp": ("parallel=fsdp", "optim.ema_decay=0.5", "model.checkpointing=yes"),
    "projector": ("parallel=fsdp", "model.trained=[projector]"),
}


@pytest.fixture(scope="module")
def ends(micro, image_tokenizer, questions, tmp_path_factory) -> Path:
    """A folder with what two processes, and one, made of the same steps; and a run that changes its
    way of splitting the work when it is resumed."""
    folder = tmp_path_factory.mktemp("together")

    def given(run: str, *more: str) -> list[str]:
        return micro.understanding_overrides(
            folder / run, image_tokenizer, questions, "optim.batch=8", "data.evaluated=5", *more
        )

    keep = "optim.schedule=constant"
    changing = micro.split_otherwise(given, "changing", ("fsdp", "ddp"), keep)
    runs = [given("alone", keep)], changing
    return micro.train_together(folder, "understanding", given, STEPS, runs)


@pytest.mark.once
@pytest.mark.parametrize("name", STEPS)
def test_two_processes_are_one_with_the_joined_batch(micro, ends, name):
    micro.assert_joined_batch(ends, name)


@pytest.mark.once
def test_a_checkpoint_serves_every_way_of_splitting(ends):
    runs = [load_understanding(ends / name)[0].state_dict() for name in ("alone", "changing")]
    assert runs[0].keys() == runs[1].keys()
    for key, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][key], rtol=1e-3, atol=1e-4, msg=key)


# -- starts -------------------------------------------------------------------------------------


def test_stage_two_starts_from_stage_one(arguments, make, tmp_path):
    understanding.main(
        arguments("one", "optim.steps=3", "model.trained=[projector]", "data.template=plain")
    )
    trainer = make(f"init={tmp_path / 'one'}", "tokenizer=nowhere")
    saved = load_understanding(tmp_path / "one")[0].state_dict()
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(value, saved[key]), key
    moved, every = changed(trainer)
    assert moved == {name for name in every if "vision_tower" not in name}


def test_starting_from_a_language_model(make, backbone):
    trainer = make(f"language_model={backbone}", "data.template=plain")
    from safetensors.torch import load_file

    start = load_file(backbone / "model.safetensors")
    own = trainer.model.state_dict()
    key = "layers.0.mlp.up_proj.weight"
    assert torch.equal(own[f"model.language_model.{key}"], start[f"model.{key}"])
    trainer.train_step()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tokenizer=nowhere", "nothing at nowhere"),
        ("data.path=nowhere", "no conversations at nowhere"),
        ("language_model=nowhere", r"nowhere/config\.json is missing"),
        ("init=nowhere", "nothing at nowhere"),
        ("parallel=none", "parallel must be one of ddp, fsdp"),
        ("data.template=none", r"data\.template must be one of vicuna, chatml, plain"),
        ("data.mask=none", r"data\.mask must be one of"),
        ("data.mask=original", "of data.template 'chatml' alone"),
        ("data.length=3", "no conversation in .* of more than 3 ids"),
        ("model.features=none", r"model\.features must be one of"),
        ("model.features=semantic", "semantic branch"),
        ("model.window=4", r"model\.window must be one of"),
        ("model.trained=[]", r"model\.trained must name a part"),
        ("model.lora={rank: 2} parallel=fsdp", "model.lora is not for parallel=fsdp"),
        ("model.lora.rank=2 model.trained=[projector]", "model.lora is for a language model"),
        ("model.trained=[tower]", r"model\.trained must be one of"),
        ("model.tokenizer_dtype=int8", r"model\.tokenizer_dtype must be one of"),
        ("model.backbone.max_position_embeddings=16", "a picture is 16 tokens"),
    ],
)
def test_errors_end_with_one_line(arguments, given, message):
    with pytest.raises(SystemExit, match=message) as caught:
        understanding.main(arguments("run", *re.split(r" (?=\w+[.=])", given)))
    assert str(caught.value).startswith("error: ")
