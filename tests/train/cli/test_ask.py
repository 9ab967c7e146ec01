"""``tokenflow ask`` and ``evaluate-understanding``: a trained model answers, and is judged."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tokenflow_ext.train import understanding
from tokenflow_ext.train.cli import entry
from tokenflow_ext.train.cli.commands.ask import split
from tokenflow_ext.train.data import DataError
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.evaluation import understanding as evaluation
from tokenflow_ext.train.evaluation.answering import Answerer

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def run(micro, image_tokenizer, questions, tmp_path_factory) -> Path:
    """A run that has learned a dozen pictures' colours by heart, as far as its tokens tell."""
    folder = tmp_path_factory.mktemp("asked") / "run"
    given = micro.understanding_overrides(
        folder, image_tokenizer, questions, "optim.steps=80", "optim.lr=3e-3", "optim.batch=13",
        "output.eval_every=80", "output.checkpoint_every=80",
    )  # fmt: skip
    understanding.main(given)
    return folder


def said(capsys, *words):
    capsys.readouterr()
    entry.main(["ask", *map(str, words)])
    return capsys.readouterr().out


def test_an_answer_is_the_models(run, questions, capsys):
    found = evaluation.evaluate(str(run), str(questions), ALONE)
    first = found.items[0]
    photo = questions.parent / first.pictures[0]
    asked = "What colour is it?"
    assert said(capsys, photo, asked, "--checkpoint", run).strip() == found.answers[0]
    for dtype in ("bfloat16", "float16"):
        assert said(capsys, photo, asked, "--checkpoint", run, "--dtype", dtype)


def test_a_conversation(run, questions, capsys, monkeypatch):
    photo = questions.parent / "red_disc.png"
    monkeypatch.setattr(sys, "stdin", io.StringIO("What colour is it?\nAnd its shape?\n\nmore\n"))
    answers = said(capsys, photo, "--checkpoint", run).splitlines()
    assert len(answers) == 2
    model = Answerer(run, torch.device("cpu"))
    from PIL import Image

    chat = [{"role": "user", "content": "<image>\nWhat colour is it?"}]
    for answer, question in zip(answers, ("And its shape?", ""), strict=True):
        [found] = model.answer([chat], [[Image.open(photo)]], 128)
        assert found == answer.strip()
        chat += [
            {"role": "assistant", "content": found}, {"role": "user", "content": question}
        ]  # fmt: skip


def test_several_pictures(run, questions, capsys):
    photos = [questions.parent / f"{name}_disc.png" for name in ("red", "blue")]
    assert isinstance(said(capsys, *photos, "Which?", "--checkpoint", run), str)


def test_a_seed_decides_what_is_drawn(run, questions, capsys):
    photo = questions.parent / "red_disc.png"
    hot = ("--temperature", "3", "--max-tokens", "12")
    drawn = [
        said(capsys, photo, "What?", "--checkpoint", run, *hot, "--seed", seed)
        for seed in (0, 0, 1, 2, 3)
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_words_are_pictures_and_a_question(tmp_path):
    photo = tmp_path / "a.png"
    photo.touch()
    assert split([str(photo), "what?"]) == ([str(photo)], "what?")
    assert split([str(photo)]) == ([str(photo)], None)
    assert split([str(photo), "missing.png"]) == ([str(photo), "missing.png"], None)
    assert split([str(photo), "is it a .png"]) == ([str(photo)], "is it a .png")
    with pytest.raises(DataError, match="no picture"):
        split(["what?"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.png", "q"], r"cannot read the image none\.png"),
        (["q"], "no picture: 'q' is not a file"),
        (["PHOTO", "q", "--max-tokens", "0"], "--max-tokens must be 1 or more"),
        (["PHOTO", "q", "--temperature", "nan"], "--temperature must be 0 or more"),
        (["PHOTO", "q", "--seed", "-99999999999999999999"], "--seed must be"),
        (["PHOTO", "q", "--max-tokens", "5000"], "do not fit into the model's context of 1024"),
        (["PHOTO", "q " * 2000], "do not fit into the model's context of 1024"),
        (["PHOTO", "what <image> is"], "2 places for pictures .* and there are 1"),
        (["PHOTO", "q", "--device", "tpu"], "device 'tpu'"),
    ],
)
def test_bad_input_ends_with_one_line(run, questions, words, message):
    photo = str(questions.parent / "red_disc.png")
    given = [photo if word == "PHOTO" else word for word in words]
    with pytest.raises(SystemExit, match=message) as caught:
        entry.main(["ask", *given, "--checkpoint", str(run)])
    assert str(caught.value).startswith("error: ")


def test_what_is_no_model(questions, image_tokenizer, tmp_path):
    photo = str(questions.parent / "red_disc.png")
    with pytest.raises(SystemExit, match="nothing at"):
        entry.main(["ask", photo, "q", "--checkpoint", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="holds no understanding model"):
        entry.main(["ask", photo, "q", "--checkpoint", str(image_tokenizer)])


# -- evaluation -----------------------------------------------------------------------------------


def test_shares_are_counted(run, questions):
    result = evaluation.evaluate(str(run), str(questions), ALONE, train=str(questions), batch=5)
    right = [a == i.truth for a, i in zip(result.answers, result.items, strict=True)]
    found = result.report["right"]
    assert found["all"] == {"questions": 19, "right": sum(right) / 19}
    for kind in ("disc", "square"):
        own = [r for r, i in zip(right, result.items, strict=True) if i.kind == kind]
        assert found[kind] == {"questions": len(own), "right": sum(own) / len(own)}
    # "disc" is always the answer to the second question, a colour to one in six of the first.
    assert result.report["floor"]["all"]["right"] == pytest.approx((6 + 2 + 1) / 19)
    total = sum(n for row in result.report["confusion"].values() for n in row.values())
    assert total == 19


def test_batches_change_no_answer(run, questions):
    one, many = (
        evaluation.evaluate(str(run), str(questions), ALONE, batch=batch).answers
        for batch in (1, 19)
    )
    assert one == many


def test_processes_share_the_questions(run, questions):
    class Second(Processes):
        def gather(self, value):
            return [value]

    whole = evaluation.evaluate(str(run), str(questions), ALONE)
    own = range(1, len(whole.items), 2)
    with pytest.raises(KeyError):  # the other half is another process's
        evaluation.evaluate(str(run), str(questions), Second(1, 2, torch.device("cpu")))
    assert len(own) == 9


def test_the_floor_by_hand():
    def item(question, truth):
        return evaluation.Item("", "", (), (), f"<image>\n{question}", truth)

    train = [item("a?", "x"), item("a?", "y"), item("a?", "y"), item("b?", "z"), item("b?", "w")]
    asked = [item("a?", "x"), item("b?", "z"), item("c?", "y")]
    # of equally common answers the first in the alphabet; to a new question the commonest of all
    assert evaluation.floor(train, asked) == ["y", "w", "y"]


def test_files_and_table(run, questions, tmp_path, capsys):
    out = tmp_path / "answers"
    words = ["evaluate-understanding", "--checkpoint", str(run), "--data", str(questions)]
    words += ["--train", str(questions), "--out", str(out), "--pictures", "3"]
    entry.main(words)
    text = capsys.readouterr().out
    assert "all (19)" in text
    assert "without looking: to each question its commonest answer in" in text
    facts = json.loads((out / "metrics.json").read_text())
    assert facts["data"]["questions"] == 19
    assert {"model", "right", "floor", "confusion", "features", "environment"} <= facts.keys()
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert sum(line["right"] for line in lines) / 19 == facts["right"]["all"]["right"]
    page = (out / "answers.html").read_text()
    assert page.count("<figure>") == 3
    assert "data:image/png;base64," in page
    with pytest.raises(SystemExit, match="is there already"):
        entry.main(words)
    entry.main([*words, "--overwrite", "--limit", "4"])
    assert json.loads((out / "metrics.json").read_text())["data"] == {
        "file": str(questions), "questions": 4, "of": 19,
    }  # fmt: skip


def test_no_training_file_no_floor(run, questions, tmp_path, capsys):
    out = str(tmp_path / "answers")
    entry.main(
        ["evaluate-understanding", "--checkpoint", str(run), "--data", str(questions),
         "--out", out, "--limit", "2"]
    )  # fmt: skip
    assert "name what was trained on with --train FILE" in capsys.readouterr().out


def test_a_picture_that_is_gone(run, questions, tmp_path):
    shutil.copy(questions, tmp_path / "q.json")
    with pytest.raises(SystemExit, match=r"error: cannot read the image .*\.png"):
        entry.main(
            ["evaluate-understanding", "--checkpoint", str(run),
             "--data", str(tmp_path / "q.json"), "--out", str(tmp_path / "out")]
        )  # fmt: skip
