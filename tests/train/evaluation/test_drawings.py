"""Drawings judged: what captions say, the judge, the shares, and the command."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.train import text_to_image, unified
from tokenflow_ext.train.cli.entry import main
from tokenflow_ext.train.data import DataError
from tokenflow_ext.train.evaluation import drawings, judge
from tokenflow_ext.train.evaluation.judge import attributes, shares, train_judge

CAPTION = r"A (?P<colour>\w+) (?P<shape>\w+)\. On grey\."
UNSEEN = r"A (red|blue) disc\. On grey\."


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch):
    """Two colours and two shapes are soon learned."""
    monkeypatch.setattr(judge, "_LEAST", 100)


# -- captions and shares --------------------------------------------------------------------------


def test_attributes_are_the_named_groups():
    found = attributes(drawings.CAPTION, ["a teal triangle", "a red circle"])
    assert found == [
        {"colour": "teal", "shape": "triangle"},
        {"colour": "red", "shape": "circle"},
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"a (\w+)", "names nothing"),
        (r"a (?P<x>", "no regular expression"),
        (r"a (?P<x>\w+)", "is not of the form"),
        (r"a (?P<x>\w+) circle|(?P<y>.*)", "is not of the form"),
    ],
)
def test_captions_of_another_form(pattern, message):
    with pytest.raises(DataError, match=message):
        attributes(pattern, ["a red circle"])


@given(st.lists(st.tuples(*[st.sampled_from("ab")] * 4), max_size=20))
def test_shares_are_counted(rows):
    said = [{"x": row[0], "y": row[1]} for row in rows]
    found = [{"x": row[2], "y": row[3]} for row in rows]
    result = shares(said, found)
    if not rows:
        assert result == {"all": 0.0}
        return
    values = np.array(rows)
    right = values[:, :2] == values[:, 2:]
    assert result["x"] == pytest.approx(right[:, 0].mean())
    assert result["y"] == pytest.approx(right[:, 1].mean())
    assert result["all"] == pytest.approx(right.all(1).mean())


# -- the judge ------------------------------------------------------------------------------------

COLOURS = {"red": (230, 20, 20), "blue": (20, 20, 230)}


def painted(colour, shape, rng):
    """A shape somewhere on grey, [3, 32, 32] uint8."""
    y, x = np.mgrid[0:32, 0:32]
    cx, cy, size = (int(rng.integers(*span)) for span in ((12, 20), (12, 20), (6, 10)))
    if shape == "disc":
        inside = (x - cx) ** 2 + (y - cy) ** 2 < size**2
    else:
        inside = (abs(x - cx) < size) & (abs(y - cy) < size)
    pixels = np.full((32, 32, 3), 128, np.uint8)
    pixels[inside] = COLOURS[colour]
    return torch.from_numpy(pixels).permute(2, 0, 1)


def examples(count, seed):
    rng = np.random.default_rng(seed)
    said = [
        {"colour": rng.choice(list(COLOURS)), "shape": rng.choice(["disc", "square"])}
        for _ in range(count)
    ]
    images = torch.stack([painted(one["colour"], one["shape"], rng) for one in said])
    return images.float() / 127.5 - 1, said


@pytest.mark.once
def test_the_judge_learns_and_leaves_the_generator_alone():
    images, said = examples(300, 0)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    trained = train_judge(images, said)
    assert torch.equal(torch.get_rng_state(), state)
    fresh, wanted = examples(200, 1)
    assert shares(wanted, trained.judge(fresh))["all"] > 0.97
    again = train_judge(images, said)
    assert again.judge(fresh) == trained.judge(fresh)


# -- the evaluation -------------------------------------------------------------------------------


class Painter:
    """Draws what it is asked for, or another colour, in the place of a model."""

    def __init__(self, tokenizer, wrong=False):
        self.model = SimpleNamespace(tokenizer=tokenizer, device=torch.device("cpu"))
        self.batch, self.weights, self.facts, self.wrong = 8, "none", {}, wrong

    def draw(self, prompts, seeds):
        for prompt, seed in zip(prompts, seeds, strict=True):
            _, colour, shape = prompt.split()
            if self.wrong:
                colour = {"red": "blue", "blue": "red"}[colour]
            yield painted(colour, shape, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Folders "real" and "test" with pictures of coloured shapes, and a place without a model."""
    root = tmp_path_factory.mktemp("shapes")
    for name, count, seed in (("real", 240, 0), ("test", 60, 1)):
        images, said = examples(count, seed)
        (root / name).mkdir()
        lines = []
        for i, (image, one) in enumerate(zip(images, said, strict=True)):
            pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(root / name / f"{i}.png")
            text = f"a {one['colour']} {one['shape']}"
            lines.append(json.dumps({"file_name": f"{i}.png", "text": text}))
        (root / name / "metadata.jsonl").write_text("\n".join(lines))
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text("{}")
    (root / "model" / "model.safetensors").write_bytes(b"")
    return root


@pytest.mark.once
@pytest.mark.parametrize("wrong", [False, True])
def test_what_is_drawn_right_and_wrong(shapes, image_tokenizer, wrong):
    tokenizer = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    report, drawn = drawings.evaluate(
        str(shapes / "model"), Painter(tokenizer, wrong), str(shapes / "real"),
        str(shapes / "test"), unseen="a red disc", each=25,
    )  # fmt: skip
    assert report["judge"]["pictures"] == 60
    assert report["judge"]["real"]["all"] > 0.95
    groups = report["drawings"]
    assert {name: group["drawings"] for name, group in groups.items()} == {
        "captions of training": 75, "captions held out": 25,
    }  # fmt: skip
    for group in groups.values():
        assert group["as asked for"]["shape"] > 0.9
        assert abs(group["as asked for"]["colour"] - (not wrong)) < 0.05
        assert "answers as the judge" not in group
    assert report["held out"] == ["a red disc"]
    assert len(drawn.images) == 100
    sheet = drawings.as_sheet(drawn, "a red disc", columns=2)
    assert sheet.ndim == 3
    table = drawings.as_table(report)
    assert "judge: 60 real test pictures" in table
    assert "25 of captions held out" in table


@pytest.fixture(scope="module")
def run(micro, image_tokenizer, questions, pairs, tmp_path_factory):
    """A run both ways of two steps."""
    folder = tmp_path_factory.mktemp("both") / "run"
    unified.main(
        micro.unified_overrides(
            folder, image_tokenizer, questions, pairs, "optim.steps=2", f"drawing.unseen={UNSEEN}"
        )
    )
    return folder


def test_the_command(run, pairs, tmp_path, capsys):
    given = [
        "evaluate-drawings", "--checkpoint", str(run), "--real", str(pairs), "--caption", CAPTION,
        "--unseen", UNSEEN, "--each", "2", "--out", str(tmp_path / "out"), "--device", "cpu",
        "--ask", "colour=What colour is it?",
    ]  # fmt: skip
    main(given)
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "drawings.json").read_text())
    assert found["captions"] == 12
    assert found["held out"] == ["A blue disc. On grey.", "A red disc. On grey."]
    seen, held_out = found["drawings"].values()
    assert (seen["drawings"], held_out["drawings"]) == (20, 4)
    assert set(seen["answers as the judge"]) == {"colour", "all"}
    assert set(seen["as asked for"]) == {"colour", "shape", "all"}
    for value in (f"{seen['as asked for']['all']:.1%}", "4 of captions held out"):
        assert value in said
    with Image.open(tmp_path / "out" / "drawings.png") as sheet:
        assert sheet.width > 8 * 128
    with pytest.raises(SystemExit, match="is there already"):
        main(given)
    main([*given, "--overwrite"])
    assert json.loads((tmp_path / "out" / "drawings.json").read_text()) == found


@pytest.mark.once
def test_drawings_are_the_generator_s(run, pairs):
    """Prompts, seeds and answers, computed apart."""
    from tokenflow_ext.train.evaluation.answering import Answerer
    from tokenflow_ext.train.tasks.image_generator import ImageGenerator

    questions = {"colour": "What colour is it?"}
    generator = ImageGenerator.load(run, batch=5)
    report, drawn = drawings.evaluate(
        str(run), generator, str(pairs), None, caption=CAPTION, each=1, seed=7, questions=questions
    )
    assert drawn.prompts == sorted(set(drawn.prompts))
    (image,) = generator.draw([drawn.prompts[3]], [10])
    assert (image.int() - drawn.images[3].int()).abs().max() <= 1  # another batch
    picture = Image.fromarray(drawn.images[3].permute(1, 2, 0).numpy())
    chat = [{"role": "user", "content": "<image>\nWhat colour is it?"}]
    (answer,) = Answerer(run, torch.device("cpu")).answer([chat], [[picture]], new=8)
    assert drawn.answers[3] == {"colour": answer}
    wanted = attributes(CAPTION, drawn.prompts)
    right = [one == judged for one, judged in zip(wanted, drawn.judged, strict=True)]
    found = report["drawings"]["captions of training"]["as asked for"]["all"]
    assert found == pytest.approx(np.mean(right))
    assert report["judge"] == {}


@pytest.mark.once
def test_a_model_that_draws_alone(micro, image_tokenizer, pairs, tmp_path, capsys):
    run = tmp_path / "run"
    text_to_image.main(micro.text_overrides(run, image_tokenizer, pairs, "optim.steps=2"))
    given = ["evaluate-drawings", "--checkpoint", str(run), "--real", str(pairs), "--caption",
             CAPTION, "--each", "1", "--out", str(tmp_path / "out"), "--device", "cpu"]  # fmt: skip
    with pytest.raises(SystemExit, match="answers no questions: it draws alone"):
        main([*given, "--ask", "colour=What?"])
    main(given)
    found = json.loads((tmp_path / "out" / "drawings.json").read_text())
    assert found["questions"] == {}
    assert "answers as the judge" not in found["drawings"]["captions of training"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--unseen", "nothing"], "matches none of the 12 captions"),
        (["--unseen", "("], "no regular expression"),
        (["--caption", r"a (?P<colour>\w+)"], "is not of the form"),
        (["--ask", "size=How large?"], "a question about size, which"),
        (["--ask", "colour"], "--ask takes NAME=QUESTION"),
        (["--each", "0"], "--each must be 1 or more"),
        (["--guidance", "-1"], "--guidance must be 0 or more"),
        (["--checkpoint", "nowhere"], "nothing at nowhere"),
        (["--real", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_ends_in_a_line(run, pairs, tmp_path, more, message):
    given = ["evaluate-drawings", "--checkpoint", str(run), "--real", str(pairs), "--caption",
             CAPTION, "--each", "1", "--out", str(tmp_path / "out"), "--device", "cpu"]  # fmt: skip
    with pytest.raises(SystemExit, match=message):
        main([*given, *more])
    assert not (tmp_path / "out" / "drawings.json").exists()
