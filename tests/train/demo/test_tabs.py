"""What the tabs do, without a browser, and which models get one."""

from __future__ import annotations

import atexit
import io
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tokenflow_ext.models import CheckpointError, ConfigError, TokenFlowTokenizer
from tokenflow_ext.train import text_to_image, understanding, unified
from tokenflow_ext.train.cli import entry
from tokenflow_ext.train.data import BrokenImageError, DataError
from tokenflow_ext.train.demo import models
from tokenflow_ext.train.demo.patches import indices_of
from tokenflow_ext.train.demo.temporary import folder_of_gradio
from tokenflow_ext.train.evaluation.preprocess import crops_of

# Gradio decides where it writes when it is imported, and writes there later too.
_folder = ExitStack()
_folder.enter_context(folder_of_gradio())
atexit.register(_folder.close)
pytest.importorskip("gradio", reason="the demo needs gradio")

from tokenflow_ext.train.demo import ask, codebook, draw, page, parts, reconstruct  # noqa: E402

CPU = torch.device("cpu")
BRIEF = ("optim.steps=1", "output.eval_every=1", "output.checkpoint_every=1")


@pytest.fixture(scope="module")
def text_run(micro, image_tokenizer, pairs, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("demo") / "text"
    text_to_image.main(micro.text_overrides(run, image_tokenizer, pairs, *BRIEF))
    return run


@pytest.fixture(scope="module")
def asked_run(micro, image_tokenizer, questions, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("demo") / "asked"
    understanding.main(micro.understanding_overrides(run, image_tokenizer, questions, *BRIEF))
    return run


@pytest.fixture(scope="module")
def examples(images) -> parts.Examples:
    return parts.Examples(str(images))


@pytest.fixture(scope="module")
def tab(image_tokenizer, images, examples) -> reconstruct.Reconstruct:
    tokenizer = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    data = crops_of(str(images), None, 32)
    return reconstruct.Reconstruct(tokenizer, indices_of(tokenizer, data, "mine"), examples)


# -- which models get a tab -----------------------------------------------------------------------


def test_each_kind_is_recognised(image_tokenizer, classes_run, text_run, asked_run):
    found = models.load(
        [str(image_tokenizer), str(classes_run), str(text_run), str(asked_run)], CPU
    )
    assert list(found.tokenizers) == ["saved"]
    assert list(found.drawing) == ["var", "text"]
    assert list(found.answering) == ["asked"]


def test_a_model_that_draws_brings_its_tokenizer(classes_run, asked_run):
    found = models.load([str(classes_run)], CPU)
    assert list(found.tokenizers) == ["var"]
    assert found.tokenizers["var"] is found.drawing["var"].model.tokenizer
    assert not models.load([str(asked_run)], CPU).tokenizers


def test_a_model_both_ways(micro, image_tokenizer, questions, pairs, tmp_path):
    run = tmp_path / "both"
    unified.main(micro.unified_overrides(run, image_tokenizer, questions, pairs, *BRIEF))
    found = models.load([str(run)], CPU)
    assert list(found.tokenizers) == list(found.drawing) == list(found.answering) == ["both"]


def test_the_page_has_a_tab_for_each_kind(
    image_tokenizer, classes_run, text_run, asked_run, images, tmp_path
):
    import gradio as gr

    def tabs(*sources):
        with folder_of_gradio():
            made = page.build(models.load(list(map(str, sources)), CPU), str(images), 2)
        return [block.label for block in made.blocks.values() if isinstance(block, gr.Tab)]

    assert tabs(image_tokenizer) == ["Reconstruct", "Codebook"]
    assert tabs(asked_run) == ["Ask"]
    assert tabs(classes_run) == ["Reconstruct", "Draw", "Codebook"]
    shutil.copytree(image_tokenizer, tmp_path / "other")
    assert tabs(image_tokenizer, tmp_path / "other", classes_run, text_run, asked_run) == [
        "Reconstruct",
        *("saved", "other"),
        "Draw",
        *("var", "text"),
        "Ask",
        "Codebook",
        *("saved", "other"),
    ]


def test_the_family_has_all_tabs_of_a_tokenizer(family_runs, images):
    import gradio as gr

    with folder_of_gradio():
        found = models.load(list(map(str, family_runs.values())), CPU)
        made = page.build(found, str(images), 2)
    labels = [block.label for block in made.blocks.values() if isinstance(block, gr.Tab)]
    names = ["groups", "signs"]
    assert labels == ["Reconstruct", *names, "Codebook", *names]
    [group] = [block for block in made.blocks.values() if isinstance(block, gr.Radio)][:1]
    assert [name for name, _ in group.choices] == ["semantic 1", "semantic 2", "pixel 1", "pixel 2"]


def test_a_tokenizer_that_decodes_no_pictures_has_its_codes_shown(
    blind_run, image_tokenizer, images
):
    import gradio as gr

    def built(*sources):
        with folder_of_gradio():
            made = page.build(models.load(list(map(str, sources)), CPU), str(images), 2)
        blocks = made.blocks.values()
        told = [one.value for one in blocks if isinstance(one, gr.HTML) and one.value]
        labels = [one.label for one in blocks if isinstance(one, gr.Tab)]
        return labels, [piece for piece in told if "decodes no pictures" in piece]

    labels, said = built(blind_run)
    assert labels == ["Codebook"]
    assert len(said) == 1
    assert "<b>blind</b> decodes no pictures (its pixel.enabled is false)" in said[0]
    labels, said = built(image_tokenizer, blind_run)
    assert labels == ["Reconstruct", "Codebook", "saved", "blind"]
    assert len(said) == 1
    assert built(image_tokenizer)[1] == []


def test_weights_without_a_decoder_are_refused_by_what_is_missing(image_tokenizer, tmp_path):
    folder = tmp_path / "torn"
    shutil.copytree(image_tokenizer, folder)
    state = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in state.items() if not name.startswith("decoder.")}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"torn.*decoder\."):
        models.load([str(folder)], CPU)


def test_two_tokenizers_of_one_name(image_tokenizer, tmp_path):
    shutil.copytree(image_tokenizer, tmp_path / "other" / "saved")
    found = models.load([str(image_tokenizer), str(tmp_path / "other" / "saved")], CPU)
    assert list(found.tokenizers) == ["saved", "saved~2"]


def test_a_kind_without_a_tab_is_refused_by_name(tmp_path):
    shape = LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match=r"llama has no tab in the demo: .*config\.json"):
        models.load([str(tmp_path / "llama")], CPU)


def test_nothing_there(tmp_path, image_tokenizer):
    with pytest.raises(CheckpointError, match="nothing at"):
        models.load([str(image_tokenizer), str(tmp_path / "none")], CPU)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--known", "0"), "--known must be 1 or more"),
        (("--port", "70000"), "--port must be 65535 or less"),
        (("--port", "-1"), "--port must be 0 or more"),
    ],
)
def test_options_that_do_not_fit(image_tokenizer, words, said):
    with pytest.raises(SystemExit, match=said):
        entry.main(["demo", "--checkpoint", str(image_tokenizer), *words])


def test_without_gradio_its_extra_is_named(image_tokenizer, monkeypatch):
    import importlib.util

    plain = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "gradio" else plain(name)
    )
    with pytest.raises(SystemExit, match=r"gradio: pip install 'tokenflow_ext\[demo\]'"):
        entry.main(["demo", "--checkpoint", str(image_tokenizer)])


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
