"""A model that learned a dozen pictures by heart, and the commands that draw with it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokenflow_ext.models import WeightsError
from tokenflow_ext.train import text_to_image, tokenizer
from tokenflow_ext.train.cli import entry, image_generator
from tokenflow_ext.train.data import captions
from tokenflow_ext.train.data.image_files import to_pixels
from tokenflow_ext.train.data.outputs import OutputError
from tokenflow_ext.train.data.text_files import DataError
from tokenflow_ext.train.evaluation import fid
from tokenflow_ext.train.tasks.image_generator import ImageGenerator


@pytest.fixture(scope="module")
def learned(micro, image_tokenizer, pairs, tmp_path_factory) -> Path:
    """The run of a model over-fitted to twelve pictures."""
    run = tmp_path_factory.mktemp("learned") / "run"
    settings = ("optim.steps=240", "optim.batch=12", "optim.lr=6e-3", "optim.warmup=10")
    every = [f"output.{name}_every=240" for name in ("log", "eval", "checkpoint")]
    text_to_image.main(
        micro.text_overrides(run, image_tokenizer, pairs, *settings, *every, "data.evaluated=12")
    )
    return run


@pytest.fixture(scope="module")
def generator(learned) -> ImageGenerator:
    return ImageGenerator.load(learned, steps="one", guidance=0.0, batch=5)


def originals(generator: ImageGenerator, pairs: Path) -> tuple[list[str], torch.Tensor]:
    """Captions and tokens of the dozen."""
    samples = captions.some(captions.Pictures(pairs, 32), 0)
    pictures, texts = captions.collate(samples)
    return texts, generator.model.tokenizer.encode(pictures)


def test_a_dozen_pictures_are_reproduced(learned, generator, pairs):
    summary = json.loads((learned / "summary.json").read_text())
    assert summary["first"]["known_accuracy"] < 0.1
    assert summary["last"]["known_accuracy"] > 0.95
    texts, tokens = originals(generator, pairs)
    # What the tokenizer makes of each is what should be drawn, from the caption alone.
    expected = to_pixels(generator.model.tokenizer.decode(tokens)[0])
    drawn = list(generator.draw(texts, range(len(texts))))
    same = [np.array_equal(d.permute(1, 2, 0), e) for d, e in zip(drawn, expected, strict=True)]
    assert sum(same) >= 10
    # A sentence less, as truncation cuts them in training, is still the same picture.
    first = captions.first_sentence(texts[0])
    assert first != texts[0]


def test_an_image_depends_on_prompt_and_seed_alone(generator):
    options = {
        "model": generator.model,
        "text_tokenizer": generator.text_tokenizer,
        "guidance": 2.0,
    }
    texts = ["A red disc.", "something else", ""]
    together = list(ImageGenerator(**options, batch=3).draw(texts, [5, 6, 7]))
    single = list(ImageGenerator(**options, batch=1).draw(texts[::-1], [7, 6, 5]))[::-1]
    for a, b in zip(together, single, strict=True):
        # The tokens are the same; the decoder's convolutions may round another way.
        assert (a.int() - b.int()).abs().max() <= 1
    # A model that is sure may draw the same with another seed, but not with every one.
    others = list(ImageGenerator(**options, batch=8).draw(["something else"] * 16, range(90, 106)))
    assert max((together[1].int() - other.int()).abs().max() for other in others) > 20


@pytest.mark.parametrize(("steps", "runs"), [("three", 7), ("two", 5), ("one", 3)])
def test_the_bar_counts_every_run(generator, steps, runs, capsys):
    other = ImageGenerator(generator.model, generator.text_tokenizer, steps=steps, batch=2)
    assert other.runs == runs  # three scales, of which the first is drawn once
    list(other.draw(["a", "b", "c"], [0, 1, 2]))
    assert f"{2 * runs}/{2 * runs}" in capsys.readouterr().err


def test_generate_writes_pictures_and_a_grid(learned, tmp_path, capsys):
    out = tmp_path / "out"
    prompts = ["A red disc. On grey.", "Ça! / ..?"]
    command = ["--checkpoint", str(learned), "--out", str(out), "--seed", "3", "--guidance", "0"]
    entry.main(["generate", *prompts, *command, "--grid", "--each", "2", "--steps", "one"])
    assert "5 pictures" in capsys.readouterr().out
    names = ["00000_a_red_disc_on_grey.png", "00000_a_red_disc_on_grey_1.png"]
    names += ["00001_a.png", "00001_a_1.png", "grid.png"]
    assert sorted(p.name for p in out.iterdir()) == names
    with Image.open(out / names[0]) as image:
        assert image.size == (32, 32)
        assert (image.text["prompt"], image.text["seed"]) == (prompts[0], "3")
    before = (out / names[1]).read_bytes()
    entry.main(["generate", *prompts, *command, "--each", "2", "--steps", "one"])
    assert (out / names[1]).read_bytes() == before  # the seed decides
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 2 * 128


def test_prompts_from_a_file(learned, tmp_path):
    (tmp_path / "prompts.txt").write_text("A red disc.\n\nA blue square.\n")
    command = ["--checkpoint", str(learned), "--out", str(tmp_path / "out"), "--steps", "one"]
    entry.main(["generate", "--prompts", str(tmp_path / "prompts.txt"), *command])
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["00000_a_red_disc.png", "00001_a_blue_square.png"]


def test_the_layout_of_geneval(learned, tmp_path):
    lines = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"},
        {"tag": "colors", "include": [], "prompt": "a red disc"},
    ]
    file, out = tmp_path / "evaluation_metadata.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["generate", "--prompts", str(file), "--layout", "geneval", "--steps", "one"]
    command += ["--checkpoint", str(learned), "--out", str(out)]
    entry.main(command)
    for number, line in enumerate(lines):
        folder = out / f"{number:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == line
        samples = sorted(p.name for p in (folder / "samples").iterdir())
        assert samples == [f"{m:05d}.png" for m in range(4)]
    # A run that was broken off draws what is missing, and draws it as before.
    kept, lost = out / "00000/samples/00001.png", out / "00001/samples/00002.png"
    content, stamp = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    entry.main(command)
    assert lost.read_bytes() == content
    assert kept.stat().st_mtime_ns == stamp


def test_the_layout_of_dpg(learned, tmp_path):
    source, out = tmp_path / "prompts", tmp_path / "out"
    source.mkdir()
    (source / "COCOval2014_1.txt").write_text("A red disc.\n")
    (source / "drawtext_2.txt").write_text("A blue square.")
    command = ["--checkpoint", str(learned), "--out", str(out), "--steps", "one"]
    entry.main(["generate", "--prompts", str(source), "--layout", "dpg", *command])
    assert sorted(p.name for p in out.iterdir()) == ["COCOval2014_1.png", "drawtext_2.png"]
    with Image.open(out / "COCOval2014_1.png") as image:
        assert image.size == (64, 64)  # two by two, nothing between them


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "nowhere.txt"], r"cannot read the prompts nowhere\.txt"),
        (["--prompts", "PLAIN", "--layout", "geneval"], "prompt"),
        (["--prompts", "PLAIN", "--layout", "dpg"], "folder of ITEM"),
        (["a prompt", "--layout", "dpg"], "needs the benchmark's file"),
        (["a prompt", "--each", "0"], "--each must be 1"),
        (["a prompt", "--guidance", "-1"], "--guidance must be 0"),
        (["a prompt", "--guidance", "nan"], "--guidance must be 0 or more, got nan"),
        (["a prompt", "--guidance", "inf"], "--guidance must be 0 or more, got inf"),
        (["a prompt", "--batch-size", "0"], "--batch-size must be 1"),
        (["a prompt", "--seed", str(2**64)], "--seed must be a whole number of 64 bits"),
        (["a prompt", "--device", "cuda:99"], "device 'cuda:99'"),
        (["a prompt", "--device", "nonsense"], "device 'nonsense'"),
        (["caf\udce9"], r"prompt 1: 'caf\\udce9' is no Unicode text"),
        (["a", "--negative", "\udce9"], "--negative"),
        (["a", "--out", "PLAIN"], r"cannot write into .*plain\.txt"),
        (["a", "--checkpoint", "nowhere"], "nothing at nowhere"),
    ],
)
def test_generate_says_what_is_wrong(learned, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "plain.txt").write_text("A red disc.\n")
    given = [str(tmp_path / "plain.txt") if a == "PLAIN" else a for a in arguments]
    monkeypatch.setattr(ImageGenerator, "load", lambda *_, **__: pytest.fail("a model was read"))
    with pytest.raises(SystemExit, match=message):
        entry.main(["generate", "--checkpoint", str(learned), "--out", str(tmp_path / "o"), *given])
    assert not (tmp_path / "o").exists()


def test_what_is_there_is_drawn_once_and_never_written_over(learned, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--checkpoint", str(learned), "--out", str(out), "--guidance", "0", "--grid"]
    command += ["--steps", "one"]
    entry.main(["generate", "peach", "peach", *command])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(before) == ["00000_peach.png", "00001_peach.png", "grid.png"]
    assert before["00000_peach.png"] != before["00001_peach.png"]  # seeds of their own
    entry.main(["generate", "peach", "peach", *command])
    said = capsys.readouterr()
    assert "2 pictures are in" in said.err
    assert "0 pictures in" in said.out

    # Whatever else decides a picture: another seed, guidance, negative, filter or case.
    for more in (
        ["peach", "peach", "--seed", "1"],
        ["peach", "peach", "--guidance", "1"],
        ["peach", "peach", "--negative", "x"],
        ["peach", "peach", "--steps", "two"],
        ["Peach"],
    ):
        with pytest.raises(SystemExit, match=r"00000_peach\.png is there already"):
            entry.main(["generate", *command, *more])
    with pytest.raises(SystemExit, match=r"grid\.png is there already"):
        entry.main(["generate", "peach", *command])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    entry.main(["generate", "peach", "peach", *command, "--seed", "1", "--overwrite"])
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(after) == sorted(before)
    assert all(after[name] != before[name] for name in after)


def test_another_model_and_other_files_are_refused(learned, generator, tmp_path):
    prompts = image_generator.plain_prompts(["a"])
    options = {"model": generator.model, "text_tokenizer": generator.text_tokenizer, "steps": "one"}
    image_generator.write(ImageGenerator(**options, weights="one"), prompts, tmp_path)
    with pytest.raises(OutputError, match=r"00000_a\.png is there already"):
        image_generator.write(ImageGenerator(**options, weights="other"), prompts, tmp_path)
    for make in (
        Path.mkdir,
        os.mkfifo,
        lambda p: p.write_bytes(b"mine"),
        lambda p: p.symlink_to("x"),
    ):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        make(tmp_path / "00000_a.png")
        with pytest.raises(OutputError, match=r"00000_a\.png is there already"):
            image_generator.write(ImageGenerator(**options), prompts, tmp_path)
    # An item of a benchmark that is called like the sheet.
    with pytest.raises(OutputError, match="written twice"):
        image_generator.write(
            generator,
            [image_generator.Prompt("a", "grid")],
            tmp_path / "new",
            layout="dpg",
            grid=True,
        )


def test_the_seed_is_any_whole_number_of_64_bits(generator, tmp_path):
    """numpy's too; and the same bits are the same seed."""
    prompts = image_generator.plain_prompts(["a"])
    made = {}
    for name, seed in (
        ("python", 5),
        ("numpy", np.int64(5)),
        ("unsigned", np.uint64(2**64 - 1)),
        ("negative", -1),
        ("last", 2**63 - 1),
    ):
        files = image_generator.write(generator, prompts, tmp_path / name, each=2, seed=seed)
        made[name] = [np.array(Image.open(file)) for file in files]
    for one, other in (("python", "numpy"), ("unsigned", "negative")):
        assert np.array_equal(made[one], made[other]), (one, other)
    with pytest.raises(TypeError):
        image_generator.write(generator, prompts, tmp_path / "float", seed=1.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no prompt in"),
        (b"\n \n", "no prompt in"),
        (b'{"prompt": null}\n', "line 1: a prompt must be text, got None"),
        (b'{"prompt": "a"}\n\n{"prompt": 5}\n', "line 3: a prompt must be text, got 5"),
        (b'{"prompt": ["a"]}', "a prompt must be text"),
        (b'{"prompt": " "}', "the prompt is empty"),
        (b'{"text": "a"}', 'no "prompt", but text'),
        (b"[1]", "line 1: expected"),
        (b'"a"', "line 1: expected"),
        (b"{", "line 1: expected"),
        (b'{"prompt": "\\udce9"}', "no Unicode text"),
        (b'{"prompt": "a\\u0000b"}', "NUL"),
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
        ('{"prompt": "a"}'.encode("utf-16"), "UTF-16"),
        (b'{"prompt": "caf\xe9"}', "0xe9 is not UTF-8"),
    ],
)
def test_a_prompts_file_that_is_wrong_is_named(tmp_path, content, message):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    for layout in ("plain", "geneval"):
        with pytest.raises(DataError, match=message) as raised:
            image_generator.read_prompts(file, layout)
        assert str(file) in str(raised.value)


def test_prompts_of_every_encoding_that_is_utf8(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa cat\xe2\x80\xa8on a mat\r\n\n caf\xc3\xa9 \n")
    texts = [prompt.text for prompt in image_generator.read_prompts(file, "plain")]
    assert texts == ["a cat\u2028on a mat", "café"]
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(DataError, match="cannot read the prompts"):
            image_generator.read_prompts(tmp_path / name, "plain")
    items = tmp_path / "items"
    items.mkdir()
    with pytest.raises(DataError, match="no prompt in"):
        image_generator.read_prompts(items, "dpg")
    (items / "a.txt").write_bytes(b" \n")
    with pytest.raises(DataError, match=r"a\.txt: the prompt is empty"):
        image_generator.read_prompts(items, "dpg")


def test_a_tokenizer_is_no_model_that_draws(image_tokenizer, tmp_path):
    with pytest.raises(SystemExit, match="text_tokenizer"):
        entry.main(["generate", "a", "--checkpoint", str(image_tokenizer)])


def test_tiles_and_labels():
    images = [np.full((2, 2, 3), value, np.uint8) for value in (0, 10, 20)]
    sheet = image_generator.tile(images, 2)
    assert sheet.shape == (4, 4, 3)
    assert [sheet[0, 0, 0], sheet[0, 2, 0], sheet[2, 0, 0], sheet[2, 2, 0]] == [0, 10, 20, 255]
    labels = ["one", "a label of many words that will not fit", "donaudampfschifffahrt" * 3]
    grid = image_generator.labelled(images, labels, least=64)
    assert grid.shape[1] == 2 * 68
    assert (grid[70:80] < 100).any()  # something is written


def test_train_text_is_the_entry_point(monkeypatch):
    called = []
    monkeypatch.setattr(text_to_image, "main", called.append)
    monkeypatch.setattr(tokenizer, "main", lambda _: pytest.fail("the tokenizer's"))
    entry.main(["train-text", "--resume", "optim.lr=1e-4"])
    assert called == [["--resume", "optim.lr=1e-4"]]


# -- FID ------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path) -> list[str]:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / name / f"{i}.png")
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_fid_asks_for_what_it_lacks(folders, tmp_path, monkeypatch):
    find = fid.importlib.util.find_spec
    monkeypatch.setattr(fid.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install 'tokenflow_ext"):
        entry.main(["fid", *folders, "--more"])
    monkeypatch.setattr(fid.importlib.util, "find_spec", find)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(WeightsError, match=rf"no file {tmp_path}/checkpoints/{fid.WEIGHTS}"):
        fid.find_weights()
    with pytest.raises(WeightsError, match=r"no file nowhere\.pth.*--weights FILE"):
        fid.find_weights("nowhere.pth")
    other = tmp_path / "other.pth"
    torch.save({"a": torch.zeros(1)}, other)
    with pytest.raises(WeightsError, match="SHA-256 begins with"):
        fid.find_weights(other)
    Path(folders[1], "0.png").unlink()
    with pytest.raises(SystemExit, match="holds 1"):
        entry.main(["fid", *folders])
    with pytest.raises(SystemExit, match="no folder at nowhere"):
        entry.main(["fid", folders[0], "nowhere"])


def test_fid_is_the_librarys(folders, tmp_path, monkeypatch, capsys):
    """The weights that were checked are those handed over, and the number is printed as it is."""
    weights, given = tmp_path / "weights.pth", {}
    torch.save({"a": torch.zeros(1)}, weights)
    monkeypatch.setattr(fid, "_DIGEST", hashlib.sha256(weights.read_bytes()).hexdigest()[:8])

    def calculate_metrics(**options):
        given.update(options)
        return {"frechet_inception_distance": 12.5}

    library = types.ModuleType("torch_fidelity")
    library.calculate_metrics = calculate_metrics
    library.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "torch_fidelity", library)
    entry.main(["fid", *folders, "--weights", str(weights)])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "FID 12.5000"
    assert "2048 pool features of FID's Inception" in said[1]
    assert given["feature_extractor_weights_path"] == str(weights)
    for name, folder in (("input1", folders[0]), ("input2", folders[1])):
        for i, pixels in enumerate(given[name]):
            assert torch.equal(pixels, torch.full((3, 8, 8), i, dtype=torch.uint8)), folder
    assert (given["fid"], given["isc"], given["prc"]) == (True, False, False)
    weights.write_bytes(b"not a pickle")
    monkeypatch.setattr(fid, "_DIGEST", hashlib.sha256(b"not a pickle").hexdigest()[:8])
    with pytest.raises(SystemExit, match="cannot be read as a torch file"):
        entry.main(["fid", *folders, "--weights", str(weights)])
