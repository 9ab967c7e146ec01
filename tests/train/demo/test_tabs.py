"""What the tabs do, without a browser."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tokenflow_ext.models import ConfigError, TokenFlowTokenizer
from tokenflow_ext.train.cli import entry
from tokenflow_ext.train.data import BrokenImageError, DataError
from tokenflow_ext.train.demo import models
from tokenflow_ext.train.demo.patches import indices_of
from tokenflow_ext.train.evaluation.preprocess import crops_of

pytest.importorskip("gradio", reason="the demo needs gradio")

from tokenflow_ext.train.demo import ask, codebook, draw, parts, reconstruct

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def examples(images) -> parts.Examples:
    return parts.Examples(parts.readable(str(images), None))


@pytest.fixture(scope="module")
def tab(image_tokenizer, images, examples) -> reconstruct.Reconstruct:
    tokenizer = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    data = crops_of(str(images), None, 32)
    return reconstruct.Reconstruct(tokenizer, indices_of(tokenizer, data, "mine"), examples)


def test_what_cannot_be_read_is_left_out_and_told(tmp_path, capsys):
    for name in "abcd":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "d.png").write_bytes(whole[: len(whole) // 2])
    found = parts.readable(str(tmp_path), None)
    assert [path.name for path in found] == ["a.png", "c.png"]
    said = capsys.readouterr().err
    assert "2 images; left out: 2 images that cannot be read (cannot read the image" in said
    assert len(parts.Examples(found).paths) == 2
    for path in found:
        path.unlink()
    with pytest.raises(DataError, match=r"no image below .* can be read: 2 images that cannot"):
        parts.readable(str(tmp_path), None)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_so_many_are_looked_at(tmp_path, limit):
    for name in "abcd":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    assert len(parts.readable(str(tmp_path), limit)) == limit


# -- reconstruct ----------------------------------------------------------------------------------


def test_a_session_of_clicks(tab):
    picture, chosen, *_, code = tab.example(1)
    assert (chosen, code) == (15, int(picture.tokens[15]))  # row 3, column 3 of 4 x 4
    _, chosen, *pieces, code = tab.choose(picture, 2)
    assert (chosen, code) == (2, int(picture.tokens[2]))
    assert f"Code {code} at 2 × 2, row 1, column 2" in pieces[2]
    other = (code + 5) % 64
    changed, *_, number = tab.swap(picture, 2, other)
    assert (changed.swapped, number) == ([2], other)
    assert picture.swapped == []
    assert tab.put_back(changed, 2, False)[0].swapped == []
    assert tab.put_back(changed, 5, False)[0].swapped == [2]
    assert tab.put_back(changed, 5, True)[0].swapped == []
    assert 0 <= tab.random(picture, 4)[-1] < 64


@pytest.mark.parametrize("code", [None, 1.5, -1, 64, float("nan")])
def test_a_number_that_is_no_code(tab, code):
    picture, *_ = tab.example(0)
    with pytest.raises(DataError):
        tab.swap(picture, 3, code)


def test_an_uploaded_picture_is_read_by_its_bytes(tab, images):
    content = (images / "picture2.png").read_bytes()
    picture, *_ = tab.uploaded(content)
    assert torch.equal(picture.tokens, tab.example(2)[0].tokens)
    webp = io.BytesIO()
    Image.new("RGB", (40, 50), "red").save(webp, "WEBP")
    assert tab.uploaded(webp.getvalue())[0].original.shape == (3, 32, 32)


@pytest.mark.parametrize("content", [b"", b"<svg></svg>", b"%PDF-1.4", b"\x89PNG\r\n\x1a\nbroken"])
def test_bytes_that_are_no_picture(tab, content):
    with pytest.raises(BrokenImageError, match="cannot read the image that you chose"):
        tab.uploaded(content)


def test_a_picture_of_too_many_pixels(tab, monkeypatch):
    content = io.BytesIO()
    Image.new("1", (3000, 3000)).save(content, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(BrokenImageError, match="decompression bomb"):
        tab.uploaded(content.getvalue())


def test_a_line_of_pixels_is_cut_to_its_middle():
    pixels = np.zeros((2, 400, 3), np.uint8)
    pixels[:, 190:210] = 255
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    image = parts.read_upload(content.getvalue())
    assert image.size == (32, 2)
    assert np.array_equal(np.asarray(image), pixels[:, 184:216])


def test_errors_are_told_in_one_escaped_line():
    import gradio as gr

    def fail(kind, *words):
        raise kind(*words)

    # Where there is no page, Gradio warns.
    with pytest.warns(UserWarning, match="^no &lt;b&gt;such&lt;/b&gt; thing$"):
        assert parts.told(fail)(DataError, "no <b>such</b>\nthing") == gr.skip()
    with pytest.raises(ZeroDivisionError):  # a fault of the program stays one
        parts.told(fail)(ZeroDivisionError)

    def items():
        yield 1
        raise ConfigError("late")

    steps = parts.told(items)()
    assert next(steps) == 1
    with pytest.warns(UserWarning, match="late"):
        assert list(steps) == [gr.skip()]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory: CUDA"),
        (RuntimeError("can't allocate memory: you tried 8589934592 bytes"), "asked for 8.0 GiB"),
        (RuntimeError("a shape"), None),
    ],
)
def test_too_little_memory_is_told_and_other_faults_are_not(error, said):
    def fail():
        raise error

    if said is None:
        with pytest.raises(RuntimeError, match="a shape"):
            parts.told(fail)()
    else:
        with pytest.warns(UserWarning, match=said):
            parts.told(fail)()


# -- draw -----------------------------------------------------------------------------------------


def pixels_of(piece: str) -> np.ndarray:
    """The first picture in a piece of the page."""
    import base64

    code = piece.split("base64,")[1].split('"')[0]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(code))))


def test_a_drawing_is_that_of_tokenflow_generate(text_run, tmp_path):
    found = models.load([str(text_run)], CPU).drawing["text"]
    drawn = draw.Draw(found)
    pieces = list(drawn.pictures("A red disc.", 7, guidance=2.0, steps="two"))
    assert [piece.count('class="tf-step"') for piece in pieces] == [1, 2, 3, 3]
    assert "21 tokens, 3 of 3 scales" in pieces[-1]
    words = ("--steps", "two", "--guidance", "2", "--seed", "7", "--out", str(tmp_path / "out"))
    entry.main(
        ["generate", "A red disc.", "--checkpoint", str(text_run), "--device", "cpu", *words]
    )
    [file] = (tmp_path / "out").iterdir()
    assert np.array_equal(pixels_of(pieces[-1]), np.asarray(Image.open(file)))
    assert (found.guidance, found.steps) == (7.5, "three")  # another session's are as they were


def test_a_class_is_that_of_tokenflow_sample(classes_run, tmp_path):
    drawn = draw.Draw(models.load([str(classes_run)], CPU).drawing["var"])
    *_, last = drawn.pictures("bee", 3, guidance=2.5)
    file = tmp_path / "all.npz"
    entry.main(
        ["sample", "bee", "--checkpoint", str(classes_run), "--device", "cpu", "--npz", str(file),
         "--seed", "3", "--guidance", "2.5"]
    )  # fmt: skip
    with np.load(file) as arrays:
        assert np.array_equal(pixels_of(last), arrays["arr_0"][0])


@pytest.mark.parametrize("seed", [None, -1, 0.5, 2**53, float("nan"), float("inf")])
def test_a_seed_that_is_none(classes_run, seed):
    drawn = draw.Draw(models.load([str(classes_run)], CPU).drawing["var"])
    with pytest.raises(DataError, match="the seed must be"):
        next(drawn.pictures("bee", seed))


def test_a_class_that_there_is_not(classes_run):
    drawn = draw.Draw(models.load([str(classes_run)], CPU).drawing["var"])
    with pytest.raises(DataError, match="wasp"):
        list(drawn.pictures("wasp", 0))


# -- ask ------------------------------------------------------------------------------------------


def test_an_answer_grows_to_that_of_tokenflow_ask(asked_run, questions, examples, capsys):
    tab = ask.Ask(models.load([str(asked_run)], CPU).answering["asked"], examples)
    photo = questions.parent / "red_disc.png"
    picture = Image.open(photo).convert("RGB")
    talks = list(tab.answer(picture, [], "What colour is it?", 12))
    lengths = [len(talk[-1]["content"]) for talk in talks]
    assert lengths == sorted(lengths)
    assert talks[-1][0] == {"role": "user", "content": "What colour is it?"}
    capsys.readouterr()
    entry.main(
        ["ask", str(photo), "What colour is it?", "--checkpoint", str(asked_run), "--device", "cpu",
         "--max-tokens", "12"]
    )  # fmt: skip
    assert talks[-1][1]["content"] == capsys.readouterr().out.strip()
    more = list(tab.answer(picture, talks[-1], "<image> And its shape?", 3))
    assert [message["role"] for message in more[-1]] == ["user", "assistant"] * 2


@pytest.mark.parametrize(
    ("picture", "question", "longest", "said"),
    [
        (False, "What?", 5, "pick a picture"),
        (True, "  ", 5, "empty"),
        (True, "a\0b", 5, "NUL"),
        (True, "What?", 10**6, "do not fit into the model's context"),
    ],
)
def test_what_cannot_be_asked(asked_run, examples, picture, question, longest, said):
    tab = ask.Ask(models.load([str(asked_run)], CPU).answering["asked"], examples)
    image = examples.open(0) if picture else None
    with pytest.raises(DataError, match=said):
        list(tab.answer(image, [], question, longest))


# -- codebook -------------------------------------------------------------------------------------


def test_another_group_and_another_code(family_runs, images):
    tokenizer = TokenFlowTokenizer.from_pretrained(family_runs["groups"])
    indices = indices_of(tokenizer, crops_of(str(images), None, 16), "groups")
    for index in indices:
        plane, card, used, shared = codebook.whole(index)
        most = int(index.hits.argmax())
        assert f"Code {most}" in card
        assert f'class="tf-chosen" data-number="{most}"' in plane
        assert f"of {len(index.codes)} codes are used" in used
        assert f"By the group {index.codes.name}" in shared
        assert "Code 5" in codebook.code(index, 5)[1]


def test_clusters(tab):
    [index] = tab.indices
    piece = codebook.clusters(index)
    [entry] = index.clusters
    assert f"{len(entry.largest_first()) / 64:.0%} of its codes" in piece
    assert piece.count("<img") == 1


# -- what pages send ------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [-1, 3, "1", None, 1.0])
def test_a_click_on_what_there_is_not(sent):
    import gradio as gr

    assert parts.number(gr.EventData(None, {"number": 2}), 3) == 2
    with pytest.raises(DataError, match="of 3"):
        parts.number(gr.EventData(None, {"number": sent}), 3)


def test_a_session_that_is_no_longer_in_memory():
    assert parts.held(0) == 0
    with pytest.raises(DataError, match="pick one again"):
        parts.held(None)
