"""Every script of examples/ runs as its head says, and what it prints is true."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import call_chains
import numpy as np
import pytest
import torch
import understanding_models
from PIL import Image

from tokenflow_ext.models import (
    PixelConfig,
    QuantizerConfig,
    SemanticConfig,
    TokenFlowTokenizer,
    TokenizerConfig,
    TowerConfig,
)
from tokenflow_ext.models.tokenizer import original_checkpoint, var_checkpoint
from tokenflow_ext.train.data import photographs
from tokenflow_ext.train.data.image_files import open_image, to_square
from tokenflow_ext.train.evaluation.answering import Answerer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
PICTURE = EXAMPLES.parent / "docs" / "images" / "reconstruction.png"
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    """Runs a script in this process, and gives what it prints."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with torch.random.fork_rng():
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def fails(run: Run, name: str, *arguments: object) -> str:
    """The one line that the script ends with."""
    with pytest.raises(SystemExit) as end:
        run(name, *arguments)
    assert isinstance(end.value.code, str)  # printed to stderr, with exit status 1
    assert end.value.code.startswith("error: ")
    assert "\n" not in end.value.code
    return end.value.code


def test_none_is_left_out() -> None:
    tested = set(re.findall(r'\brun\(\s*"(\w+\.py)"', Path(__file__).read_text()))
    assert tested == {path.name for path in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_head_says_how_to_run_it(script: Path) -> None:
    head = ast.get_docstring(ast.parse(script.read_text()))
    [command] = [line.strip() for line in head.splitlines() if "python " in line]
    assert shlex.split(command)[:2] == ["python", f"examples/{script.name}"]


# -- the quantizer --------------------------------------------------------------------------------


def test_train_quantizer(run: Run) -> None:
    output = run("train_quantizer.py")
    errors = [float(error) for error in re.findall(r"relative error ([\d.]+)", output)]
    assert len(errors) == 5
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 8


def test_swap_tokenflow(run: Run) -> None:
    output = run("swap_tokenflow.py")
    assert "392 indices" in output
    assert "(2, 561) indices" in output
    assert "decoding the indices gives f_hat: True" in output


def test_swap_llamagen(run: Run) -> None:
    output = run("swap_llamagen.py")
    assert "the same as by the matrix of distances: 768 of 768" in output
    assert "decoding the indices gives z_q: True" in output


def test_swap_var(run: Run) -> None:
    output = run("swap_var.py")
    assert "680 tokens, input of the transformer (2, 679, 32)" in output
    assert "decoding the tokens gives f_hat: True" in output


def test_swap_vector_quantize_pytorch(run: Run) -> None:
    pytest.importorskip("vector_quantize_pytorch")
    output = run("swap_vector_quantize_pytorch.py")
    counts = re.findall(r"(\w+): (\d+) of (\d+) indices are the same", output)
    assert len(counts) == len(output.splitlines()) == 9
    assert all(int(same) == int(total) >= 200 for _, same, total in counts), output


def test_swap_without_the_other_library(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    line = fails(run, "swap_vector_quantize_pytorch.py")
    assert line.endswith("pip install vector-quantize-pytorch")


# -- the sampler ----------------------------------------------------------------------------------


def test_sample_with_guidance(run: Run) -> None:
    output = run("sample_with_guidance.py")
    shares = [float(share) for share in re.findall(r"([\d.]+)% of the tokens", output)]
    assert len(shares) == 4
    assert shares == sorted(shares)
    assert shares[-1] > 90 > 20 > shares[0]
    assert "from two half batches: True" in output


def test_sample_scales(run: Run) -> None:
    output = run("sample_scales.py")
    assert re.findall(r"tokens \(2, (\d+)\)", output) == ["1", "4", "16", "64"]
    assert "the model was asked 10 times" in output  # once, and three times at three scales


def test_sample_loop(run: Run) -> None:
    *rows, last = run("sample_loop.py").splitlines()
    tokens = torch.tensor([ast.literal_eval(row) for row in rows])
    assert tokens.shape == (3, 16)
    assert 0 <= tokens.min() <= tokens.max() < 1024
    assert last == "the second row alone gets the same tokens: True"


def test_sample_generate(run: Run) -> None:
    *rows, last = run("sample_generate.py").splitlines()
    drawn = [ast.literal_eval(row.partition(": ")[2]) for row in rows]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(0 <= token < 1024 for row in drawn for token in row)
    assert last == "the same seed gives the same tokens: True"


# -- a photograph ---------------------------------------------------------------------------------


def tokenflow_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, int]:
    """Small random weights under the names of TokenFlow's B, and how many tokens it has."""
    config = call_chains.small_original(folder / "weights.pt")
    monkeypatch.setattr(original_checkpoint, "infer_config", lambda *_: config)  # B, by its names
    return folder / "weights.pt", 561


def var_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, int]:
    """Small random weights in the form of VAR's file. Its sizes are read off the shapes."""
    torch.manual_seed(0)
    pixel = PixelConfig(
        channels=8, multipliers=(1, 1, 2, 2, 4), res_blocks=1, z_channels=8, code_dim=8
    )
    quantizer = QuantizerConfig(
        64, var_checkpoint.SCALES[256], l2_norm=False, kind="var", phi_shared=4
    )
    config = TokenizerConfig(256, pixel, SemanticConfig(TowerConfig("none")), quantizer)
    return TokenFlowTokenizer(config).save_original(folder / "weights.pth"), 680


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tokenizer of 64 px images with eight scales, as `save_pretrained` writes it."""
    config = TokenizerConfig.preset("tiny")
    return TokenFlowTokenizer(config).save_pretrained(tmp_path_factory.mktemp("run") / "saved")


@pytest.mark.parametrize("write", [tokenflow_file, var_file])
def test_reconstruct_photo(
    run: Run, write: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, tokens = write(tmp_path, monkeypatch)
    output = run("reconstruct_photo.py", weights, photographs()[0], tmp_path / "back.png")
    counts = re.findall(r"^ *(\d+) tokens: (-?[\d.]+) dB$", output, re.MULTILINE)
    assert int(counts[-1][0]) == tokens
    with Image.open(tmp_path / "back.png") as picture:
        back = np.asarray(picture, dtype=np.float64)
    photo = np.asarray(to_square(open_image(photographs()[0]), back.shape[0]), dtype=np.float64)
    expected = 10 * np.log10(255**2 / np.square(back - photo).mean())
    assert float(counts[-1][1]) == pytest.approx(expected, abs=0.02)


def test_reconstruct_photo_writes_over_nothing(run: Run, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "back.png"
    run("reconstruct_photo.py", saved, PICTURE, out)
    before = out.read_bytes()
    assert str(out) in fails(run, "reconstruct_photo.py", saved, PICTURE, out)
    assert out.read_bytes() == before


def test_reconstruct_photo_bad_input(run: Run, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "back.png"
    missing = tmp_path / "missing.png"
    assert str(missing) in fails(run, "reconstruct_photo.py", saved, missing, out)
    assert str(missing) in fails(run, "reconstruct_photo.py", missing, PICTURE, out)
    assert str(PICTURE) in fails(run, "reconstruct_photo.py", PICTURE, PICTURE, out)
    assert not out.exists()


def test_draw_scales(run: Run, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "scales.png"
    output = run("draw_scales.py", saved, "--out", out)
    scales = TokenizerConfig.preset("tiny").quantizer.scales
    assert output == f"4 crops in {1 + len(scales)} columns: {out}\n"
    with Image.open(out) as picture:
        assert picture.size == (130 * (1 + len(scales)), 550)
        before = picture.tobytes()
    assert "is there already" in fails(run, "draw_scales.py", saved, "--out", out)
    with Image.open(out) as picture:
        assert picture.tobytes() == before


@pytest.mark.parametrize(
    "command", [("reconstruct_photo.py", PICTURE), ("draw_scales.py", "--out")], ids=lambda c: c[0]
)
def test_a_tokenizer_without_pixels(run: Run, command: tuple, tmp_path: Path) -> None:
    tower = TowerConfig("clip", 16, 4, width=16, depth=1, heads=2, mlp_width=32)
    config = TokenizerConfig(
        16,
        PixelConfig(enabled=False),
        SemanticConfig(
            tower, code_dim=6, decoder_width=24, decoder_depth=1, decoder_heads=4, decoder_grid=4
        ),
        QuantizerConfig(48, (1, 2, 4)),
    )
    TokenFlowTokenizer(config).save_pretrained(tmp_path / "blind")
    script, option = command
    assert "pixel" in fails(run, script, tmp_path / "blind", option, tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("script", ["reconstruct_photo.py", "ask_picture.py"])
@pytest.mark.parametrize("arguments", [(), ("a", "b"), ("a", "b", "c", "d")], ids=len)
def test_other_arguments_print_the_head(run: Run, script: str, arguments: tuple) -> None:
    with pytest.raises(SystemExit) as end:
        run(script, *arguments)
    assert end.value.code == ast.get_docstring(ast.parse((EXAMPLES / script).read_text()), False)


# -- a question -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def understanding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that answers, with random weights."""
    folder = tmp_path_factory.mktemp("understanding")
    for part in understanding_models.understanding():
        part.save_pretrained(folder)
    return folder


def test_ask_picture(run: Run, understanding: Path) -> None:
    output = run("ask_picture.py", understanding, PICTURE, "What color is it?")
    [answer] = Answerer(understanding, torch.device("cpu")).answer(
        [[{"role": "user", "content": "<image>\nWhat color is it?"}]], [[open_image(PICTURE)]], 32
    )
    assert answer
    assert output.strip() == answer.strip()


def test_ask_picture_bad_input(run: Run, understanding: Path, saved: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert str(missing) in fails(run, "ask_picture.py", understanding, missing, "What?")
    assert str(missing) in fails(run, "ask_picture.py", missing, PICTURE, "What?")
    assert "no understanding model" in fails(run, "ask_picture.py", saved, PICTURE, "What?")
