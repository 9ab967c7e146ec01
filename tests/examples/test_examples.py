"""Every script of examples/ runs as its head says, and what it prints is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torchrun
from PIL import Image

from tokenflow_ext.models import TokenFlowTokenizer, TokenizerConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: object) -> str:
    process = torchrun.launch(EXAMPLES / name, [str(argument) for argument in arguments])
    return torchrun.finish(process)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tokenizer of 64 px images with four scales."""
    config = TokenizerConfig.preset("tiny")
    return TokenFlowTokenizer(config).save_pretrained(tmp_path_factory.mktemp("run") / "saved")


def test_none_is_left_out() -> None:
    tested = set(re.findall(r'run\(\s*"(\w+\.py)"', Path(__file__).read_text()))
    assert tested == {path.name for path in EXAMPLES.glob("*.py")}


def test_quantize_features() -> None:
    output = run("quantize_features.py", "--steps", 60)
    losses = [float(loss) for loss in re.findall(r"vq loss ([\d.]+)", output)]
    errors = [float(error) for error in re.findall(r"relative error ([\d.]+)", output)]
    assert losses[-1] < losses[0] / 2
    assert len(errors) == 4
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5


def test_reconstruct_photo(checkpoint: Path, tmp_path: Path) -> None:
    photo, sheet = tmp_path / "photo.png", tmp_path / "sheet.png"
    Image.new("RGB", (90, 70), (200, 40, 40)).save(photo)
    output = run("reconstruct_photo.py", photo, "--checkpoint", checkpoint, "--out", sheet)
    assert len(re.findall(r"PSNR -?[\d.]+ dB", output)) == len(
        TokenizerConfig.preset("tiny").quantizer.scales
    )
    with Image.open(sheet) as picture:
        assert picture.getpixel((64, 24 + 64)) == (200, 40, 40)  # the original, in the first column
        before = picture.tobytes()
    with pytest.raises(AssertionError, match="is there already"):
        run("reconstruct_photo.py", photo, "--checkpoint", checkpoint, "--out", sheet)
    with Image.open(sheet) as picture:
        assert picture.tobytes() == before


def test_reconstruct_photo_takes_held_out_crops_by_default(
    checkpoint: Path, tmp_path: Path
) -> None:
    sheet = tmp_path / "sheet.png"
    run("reconstruct_photo.py", "--checkpoint", checkpoint, "--scales", 1, 8, "--out", sheet)
    with Image.open(sheet) as picture:
        assert picture.size == (3 * 132 - 4, 24 + 4 * 132 - 4)


def test_sample_with_guidance() -> None:
    output = run("sample_with_guidance.py")
    shares = [float(share) for share in re.findall(r"([\d.]+)% of the tokens", output)]
    assert len(shares) == 4
    assert shares == sorted(shares)
    assert shares[-1] > 90 > 20 > shares[0]
    assert "from two half batches: True" in output
    assert len(re.findall(r"scale \d x \d", output)) == 3
