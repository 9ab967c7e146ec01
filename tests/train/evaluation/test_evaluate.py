"""``tokenflow evaluate``: known answers, independent computations, processes, files, messages."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image, ImageFilter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from weights import needs_lite0

from tokenflow_ext.models import TokenFlowTokenizer, WeightsError
from tokenflow_ext.models.metrics import FeatureSums, code_usage, frechet, psnr, ssim, to_uint8
from tokenflow_ext.models.torchvision_shim import ensure_torchvision
from tokenflow_ext.train.cli import entry
from tokenflow_ext.train.data import image_files
from tokenflow_ext.train.data.text_files import DataError
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.evaluation import (
    evaluate,
    fid,
    metrics,
    networks,
    picture_sets,
    preprocess,
    probe,
    report,
    zero_shot,
)

ALONE = Processes(0, 1, torch.device("cpu"))
SIZE = 32


@pytest.fixture(scope="module")
def folder(micro, tmp_path_factory) -> Path:
    """Seven pictures: one below another folder, a portrait, a small one, two sizes to halve."""
    root = micro.draw_images(tmp_path_factory.mktemp("evaluated"), count=5)
    (root / "below").mkdir()
    random = np.random.default_rng(0)
    for name, sides in (("below/noise.png", (70, 150)), ("tiny.png", (20, 24))):
        pixels = random.integers(0, 256, (*sides[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1.5)).save(root / name)
    return root


@pytest.fixture(scope="module")
def paths(folder) -> list[Path]:
    return sorted(folder.rglob("*.png"))


@pytest.fixture(scope="module")
def squares(paths) -> np.ndarray:
    """What is measured, uint8 [N, S, S, 3]: the preprocessing written out once more."""
    made = []
    for path in paths:
        image = Image.open(path).convert("RGB")
        while min(image.size) // 2 >= SIZE:
            image = image.resize([side // 2 for side in image.size], Image.BOX)
        short = min(image.size)
        image = image.resize([round(side * SIZE / short) for side in image.size], Image.BICUBIC)
        pixels = np.array(image)
        top, left = (pixels.shape[0] - SIZE) // 2, (pixels.shape[1] - SIZE) // 2
        made.append(pixels[top : top + SIZE, left : left + SIZE])
    return np.stack(made)


def average_features() -> metrics.Features:
    """Twelve numbers of an image that a test can follow: means of its four quarters."""

    def extract(pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pixels.float() / 255, 2).flatten(1)

    return metrics.Features("fd_efflite0", 12, extract)


def measure(change, paths, **options) -> metrics.EvaluationResult:
    """Figures of a stub that changes images [B, 3, S, S] in [-1, 1] and always chooses code 3."""

    def reconstruct(images):
        return metrics.Reconstruction(torch.full((len(images), 5), 3), change(images))

    return metrics.evaluate(
        reconstruct, paths, SIZE, 8, ALONE, batch=3, features=average_features(), **options
    )


def noisy(images: torch.Tensor) -> torch.Tensor:
    """The same noise on every image, whatever the batch."""
    noise = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(1))
    return images + 0.2 * noise


def blurred(images: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    return torch.nn.functional.avg_pool2d(padded, 5, stride=1)


# -- known answers --------------------------------------------------------------------------------


def test_identical_images(paths):
    got = measure(lambda images: images, paths)
    assert got.metrics["psnr"] is None
    assert "infinite" in got.missing["psnr"]
    assert got.identical == len(paths) == 7
    assert got.metrics["ssim"] == got.metrics["ssim_range_2"] == 1.0
    assert got.metrics["fd_efflite0"] == pytest.approx(0, abs=1e-12)
    assert got.metrics["usage"] == 1 / 8
    assert got.metrics["perplexity"] == pytest.approx(1)
    assert [row["psnr"] for row in got.images] == [None] * 7
    assert torch.equal(got.originals, got.made)


def test_one_identical_image_leaves_the_mean_of_the_others(paths):
    """An infinity must neither swallow the mean nor vanish without a word."""
    first = []

    def change(images):
        made = noisy(images)
        if not first:
            made[0] = images[0]
            first.append(True)
        return made

    got = measure(change, paths)
    others = [row["psnr"] for row in got.images[1:]]
    assert got.images[0]["psnr"] is None
    assert got.identical == 1
    assert got.metrics["psnr"] == pytest.approx(sum(others) / 6)


@pytest.mark.parametrize("change", [noisy, blurred])
def test_figures_are_scikit_images(change, paths, squares):
    got = measure(change, paths)
    expected = {"psnr": [], "ssim": [], "ssim_range_2": []}
    images = torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 127.5 - 1
    made = (change(images) * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for original, other in zip(squares / 255.0, made / 255.0, strict=True):
        expected["psnr"].append(peak_signal_noise_ratio(other, original))
        for name, data_range in (("ssim", 1.0), ("ssim_range_2", 2.0)):
            value = structural_similarity(other, original, channel_axis=-1, data_range=data_range)
            expected[name].append(value)
    for name, values in expected.items():
        assert [row[name] for row in got.images] == pytest.approx(values, rel=1e-9), name
        assert got.metrics[name] == pytest.approx(np.mean(values), rel=1e-9), name
    assert got.metrics["ssim_range_2"] > got.metrics["ssim"] + 0.01

    def statistics(pixels):
        quarters = pixels.reshape(7, 2, SIZE // 2, 2, SIZE // 2, 3).mean(axis=(2, 4)) / 255
        rows = quarters.transpose(0, 3, 1, 2).reshape(7, 12)
        return rows - rows.mean(axis=0), rows.mean(axis=0)

    # tr sqrt(A A^T B B^T) is the nuclear norm of A^T B: seven rows have no covariance of full rank.
    (one, mean_1), (two, mean_2) = statistics(squares), statistics(made)
    cross = np.linalg.svd(one @ two.T, compute_uv=False).sum()
    distance = (np.sum(one**2) + np.sum(two**2) - 2 * cross) / 6 + np.sum((mean_1 - mean_2) ** 2)
    assert got.metrics["fd_efflite0"] == pytest.approx(distance, rel=1e-5)
    assert distance > 1e-5


def test_preprocessing(paths, squares):
    got = measure(lambda images: images, paths, pictures=100)
    assert np.array_equal(got.originals.permute(0, 2, 3, 1).numpy(), squares)
    digests = [hashlib.sha256(pixels.tobytes()) for pixels in squares]
    assert [row["sha256"] for row in got.images] == [digest.hexdigest() for digest in digests]
    assert got.digest == hashlib.sha256(b"".join(d.digest() for d in digests)).hexdigest()
    assert got.enlarged == 1


def test_every_level_survives_the_way_to_the_tokenizer_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(preprocess.to_float(levels)), levels)


def test_limit_is_spread(paths):
    assert preprocess.evenly_spread(paths, None) == preprocess.evenly_spread(paths, 7) == paths
    assert preprocess.evenly_spread(paths, 3) == [paths[0], paths[2], paths[4]]


def test_lpips_is_the_mean_over_images(paths, squares):
    """The last batch is smaller than the others and must not weigh as much."""

    def perceptual(made, originals):
        return (made - originals).abs().mean()

    got = measure(blurred, paths, perceptual=perceptual)
    images = preprocess.to_float(torch.from_numpy(squares).permute(0, 3, 1, 2))
    expected = perceptual(preprocess.to_float(to_uint8(blurred(images))), images)
    assert got.metrics["lpips"] == pytest.approx(expected.item(), rel=1e-5)


def test_no_image_or_a_broken_one_is_an_error(paths, tmp_path):
    with pytest.raises(DataError, match="no image"):
        measure(blurred, [])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png"):
        measure(blurred, [*paths, broken])
    with pytest.raises(DataError, match=r"not finite, among .*picture0\.png"):
        measure(lambda images: images / 0, paths)
    got = measure(blurred, paths[:1])
    assert got.metrics["fd_efflite0"] is None
    assert "two images" in got.missing["fd_efflite0"]


# -- the measures themselves ----------------------------------------------------------------------


def test_both_kinds_of_images_are_measured_alike():
    a, b = torch.randint(0, 256, (2, 2, 3, 16, 16), dtype=torch.uint8)
    floats = [preprocess.to_float(x) for x in (a, b)]
    torch.testing.assert_close(psnr(*floats).double(), psnr(a, b), rtol=1e-5, atol=0)
    torch.testing.assert_close(ssim(*floats).double(), ssim(a, b), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="7 pixels"):
        ssim(a[..., :6], b[..., :6])


def test_code_usage():
    share, perplexity = code_usage(torch.tensor([2, 0, 2, 4]))
    assert share == 0.75
    assert perplexity == pytest.approx(2**1.5)


def covariance(random, width: int) -> torch.Tensor:
    rows = torch.from_numpy(random.normal(size=(3 * width, width)))
    return rows.T @ rows / width


def test_frechet_of_commuting_gaussians():
    """Diagonal covariances: |m1 - m2|^2 + the sum of (s1 - s2)^2."""
    one = (torch.tensor([1.0, 2.0, 3.0]), torch.diag(torch.tensor([4.0, 9.0, 0.0])))
    other = (torch.tensor([1.0, 0.0, 3.0]), torch.diag(torch.tensor([1.0, 16.0, 25.0])))
    assert frechet(one, other) == pytest.approx(4 + 1 + 1 + 25)


def test_frechet_is_scipys():
    random = np.random.default_rng(3)
    means = torch.from_numpy(random.normal(size=(2, 20)))
    one, other = covariance(random, 20), 2 * covariance(random, 20)
    root = scipy.linalg.sqrtm((one @ other).numpy())
    trace = (one + other).trace().item() - 2 * np.trace(root).real
    expected = (means[0] - means[1]).square().sum().item() + trace
    assert frechet((means[0], one), (means[1], other)) == pytest.approx(expected, rel=1e-9)
    assert frechet((means[0], one), (means[0], one)) == pytest.approx(0, abs=1e-10)


def test_sums_of_parts_are_the_gaussian_of_all_rows():
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 3
    whole, parts = FeatureSums(6), [FeatureSums(6), FeatureSums(6)]
    whole.add(rows)
    parts[0].add(rows[:11])
    parts[1].add(rows[11:])
    for mine, theirs in zip(*parts, strict=True):
        mine += theirs
    for mine, theirs in zip(whole.gaussian(), parts[0].gaussian(), strict=True):
        torch.testing.assert_close(mine, theirs)
    mean, sample = whole.gaussian()
    torch.testing.assert_close(mean, rows.double().mean(dim=0))
    torch.testing.assert_close(sample, torch.cov(rows.double().T))
    with pytest.raises(ValueError, match="two rows"):
        FeatureSums(6).gaussian()


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of torch's, whatever this machine has."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


class Page(HTMLParser):
    """Sources, captions and tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources, self.tags, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        found = dict(attributes)
        self.sources += [found[name] for name in ("src", "href") if name in found]

    def handle_data(self, data):
        self.text += data


@needs_lite0
def test_the_command(image_tokenizer, folder, paths, squares, cache, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["evaluate", "--checkpoint", str(image_tokenizer), "--data", str(folder)]
    arguments += ["--device", "cpu", "--out", str(out), "--batch-size", "4", "--pictures", "3"]
    entry.main(arguments)
    said = capsys.readouterr().out
    report = json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)
    model = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    images = preprocess.to_float(torch.from_numpy(squares).permute(0, 3, 1, 2))
    with torch.no_grad():
        codes = model.encode(images)
        made = to_uint8(model.decode(codes)[0])
    expected = psnr(made, to_uint8(images)).item()
    figures = report["figures"]
    assert figures["psnr"] == pytest.approx(expected, rel=1e-4)
    assert figures["usage"] == len(codes.unique()) / 64
    assert figures["rfid"] is None
    assert figures["lpips"] is None
    assert math.isfinite(figures["fd_efflite0"])
    assert report["missing"].keys() == {"rfid", "lpips"}
    assert report["data"]["images"] == 7
    assert report["data"]["folder"] == str(folder)
    weights = (image_tokenizer / "model.safetensors").read_bytes()
    assert report["tokenizer"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert report["tokenizer"]["tokens_per_image"] == 21
    assert "bicubic filter, a = -0.5, antialiased" in report["preprocessing"]
    assert report["paper"]["384"] == {"rfid": 0.63, "psnr": 22.77, "ssim_range_2": 0.731}
    assert report["definitions"].keys() == figures.keys()
    assert report["environment"]["torch"] == torch.__version__
    rows = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [p.relative_to(folder).as_posix() for p in paths]

    for text in (f"{expected:.2f}", "21.41 / 22.77", "0.687 / 0.731", "FD-EffLite0 (not FID)"):
        assert text in said, text
    flat = " ".join(said.split())  # lines are wrapped
    assert report["preprocessing"] in flat
    for file in (fid.WEIGHTS, networks.VGG16):
        assert f"{cache / file}" in flat
    assert "7 images for features of 112 channels" in flat

    page = Page((out / "pictures.html").read_text())
    assert len(page.sources) == 6
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"script", "link"} & set(page.tags)
    assert f"{rows[0]['image']}: {rows[0]['psnr']:.2f} dB" in page.text
    with Image.open(out / "pictures.png") as sheet:
        assert sheet.size == (3 * 34 * 4, 2 * 34 * 4)  # three over three, gaps of 2, enlarged


def test_a_report_is_not_written_over(image_tokenizer, folder, cache, tmp_path):
    out = tmp_path / "out"
    arguments = ["evaluate", "--checkpoint", str(image_tokenizer), "--data", str(folder)]
    arguments += ["--device", "cpu", "--out", str(out)]
    entry.main(arguments)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(before) == sorted(report.FILES)
    with pytest.raises(SystemExit, match="is there already"):
        entry.main([*arguments, "--limit", "2"])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    entry.main([*arguments, "--limit", "2", "--overwrite", "--pictures", "0"])
    assert json.loads((out / "metrics.json").read_text())["data"]["images"] == 2
    assert not (out / "pictures.png").exists()  # the earlier report's would be of other images


def test_images_of_any_name(image_tokenizer, folder, cache, tmp_path):
    """Listings are JSON and give the bytes back, the page is UTF-8 and no name writes into it."""
    root = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(folder, root)
    names = [b"b\xe9.png", b"a\n<script>.png", "é\u2028.png".encode()]
    for number, raw in enumerate(names):
        os.rename(root / f"picture{number}.png", os.fsencode(root) + b"/" + raw)
    evaluate.run(str(image_tokenizer), str(root), str(tmp_path / "out"), ALONE)
    lines = (tmp_path / "out" / "images.jsonl").read_bytes().decode("utf-8").split("\n")
    found = {os.fsencode(json.loads(line)["image"]) for line in lines if line}
    assert found == {os.fsencode(p.relative_to(root)) for p in root.rglob("*.png")}
    assert set(names) < found
    report = json.loads((tmp_path / "out" / "metrics.json").read_bytes().decode("utf-8"))
    assert os.fsencode(report["data"]["folder"]) == os.fsencode(root)
    page = Page((tmp_path / "out" / "pictures.html").read_bytes().decode("utf-8"))
    assert "script" not in page.tags
    for shown in ("b\\xe9.png", "a\\n<script>.png", "é\\u2028.png", "below " + str(tmp_path)):
        assert shown in page.text


def test_a_figure_that_is_not_finite_is_missing(paths):
    def perceptual(made, originals):
        return torch.tensor(torch.nan)

    got = measure(blurred, paths, perceptual=perceptual)
    assert got.metrics["lpips"] is None
    assert got.missing["lpips"] == "not finite: nan"


def test_errors_end_with_one_line(image_tokenizer, folder, cache, tmp_path):
    arguments = ["evaluate", "--checkpoint", str(image_tokenizer), "--device", "cpu"]
    arguments += ["--out", str(tmp_path / "out"), "--data"]
    for more, message in (
        ([str(tmp_path / "none")], "no folder at"),
        ([str(folder), "--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        ([str(folder), "--limit", "0"], "--limit must be 1 or more"),
        ([str(folder), "--weights", "none.pth"], "FID needs"),
        ([str(folder), "--vgg16", "none.pth"], r"no file at none\.pth"),
    ):
        with pytest.raises(SystemExit, match=message):
            entry.main([*arguments, *more])
    assert not (tmp_path / "out").exists()


def test_without_any_weights_nothing_is_named_in_their_place(cache, monkeypatch):
    def no_weights(*_):
        raise WeightsError("pip install a package")

    monkeypatch.setattr(networks, "build_teacher", no_weights)
    features, missing = networks.choose_features(None, torch.device("cpu"))
    assert features is None
    assert str(cache / fid.WEIGHTS) in missing["rfid"]
    assert missing["fd_efflite0"] == "pip install a package"


@needs_lite0
def test_the_stand_in_grows_with_the_damage(paths):
    features = networks.lite0_features(torch.device("cpu"))
    made = torch.stack([torch.from_numpy(np.array(Image.open(p).resize((64, 64)))) for p in paths])
    made = preprocess.to_float(made[..., :3].permute(0, 3, 1, 2))

    def distance(change) -> float:
        sums = [FeatureSums(112), FeatureSums(112)]
        for part, images in zip(sums, (made, change(made)), strict=True):
            part.add(features.extract(to_uint8(images)))
        return frechet(sums[0].gaussian(), sums[1].gaussian())

    twice = [distance(lambda x: x), distance(blurred), distance(lambda x: blurred(blurred(x)))]
    assert twice[0] < 1e-6 * twice[1]
    assert 1.2 * twice[1] < twice[2]


@needs_lite0
def test_the_teachers_head_knows_what_it_sees():
    """EfficientNet-Lite0's own answers on photographs that come in packages."""
    from tokenflow_ext.models.towers.config import TowerConfig
    from tokenflow_ext.models.towers.teachers import build_teacher
    from tokenflow_ext.train.data import photographs

    head = networks.TeacherHead()
    teacher = build_teacher(TowerConfig("efficientnet_lite0", 224, 16, width=112))
    named = {path.stem: path for path in photographs()}
    classes = {"chelsea": (281, 282, 285), "coffee": (504, 967, 968), "rocket": (657, 744, 812)}
    for name, known in classes.items():  # cats; espresso and cups; missile, projectile, shuttle
        square = image_files.read_square(named[name], 224)[None]
        logits = head(teacher(square))
        assert logits.shape == (1, 1000)
        assert int(logits.argmax()) in known, name


@needs_lite0
def test_agreement_of_the_teachers_head_is_counted(paths):
    """Images whose decoded tokens are the teacher's agree, those of another image do not."""
    from tokenflow_ext.models import TokenizerConfig
    from tokenflow_ext.models.towers.teachers import build_teacher

    config = TokenizerConfig.preset("tiny")
    head, missing = networks.choose_head(config, None, torch.device("cpu"))
    assert missing == {}
    teacher = build_teacher(config.teacher)

    def reconstruct(images):
        wanted = teacher(images)
        found = wanted.clone()
        found[:1] = torch.randn_like(found[:1]) * 40
        same = (head(found).argmax(1) == head(wanted).argmax(1)).float().mean()
        return metrics.Reconstruction(torch.zeros(len(images), 1, dtype=torch.int64), images,
                                      None, same)  # fmt: skip

    torch.manual_seed(0)
    got = metrics.evaluate(reconstruct, paths, SIZE, 64, ALONE, batch=len(paths))
    assert got.metrics["semantic_top1"] == pytest.approx((len(paths) - 1) / len(paths))


def test_the_linear_probe_reads_what_is_linear():
    rng = np.random.default_rng(0)
    labels = ["a"] * 30 + ["b"] * 20 + ["c"] * 10
    noise = rng.normal(size=(60, 12))
    told = noise.copy()
    told[:, 3] += 12 * np.array([ord(label) - ord("a") for label in labels])
    told[:, 5] += 12 * np.array([label == "b" for label in labels])
    assert probe.linear_probe(told, labels) == 1.0
    assert probe.linear_probe(noise, labels) < 0.65
    assert probe.linear_probe(told * 1e3 + 7, labels) == 1.0  # its scale does not matter
    assert probe.floor(labels) == 0.5


def test_classes_are_the_first_folders():
    root = Path("data")
    names = [probe.class_of(root / name, root) for name in ("cat/x/1.png", "dog/2.png", "3.png")]
    assert names == ["cat", "dog", ""]
    assert probe.why_not(["a"] * 5 + ["b"] * 5) is None
    assert "one class" in probe.why_not(["a"] * 9)
    assert "class b has 4 pictures" in probe.why_not(["a"] * 9 + ["b"] * 4)


def test_the_probe_is_part_of_an_evaluation(paths):
    labels = ["a", "b"] * 5
    many = [paths[i % len(paths)] for i in range(10)]

    def reconstruct(images):
        told = torch.arange(len(images)) % 2
        pooled = torch.stack([told.float() * 9, torch.zeros(len(images))], 1)[:, :, None]
        return metrics.Reconstruction(
            torch.zeros(len(images), 1, dtype=torch.int64), images, None, None, pooled
        )

    found = metrics.evaluate(reconstruct, many, SIZE, 64, ALONE, batch=4, labels=labels).metrics
    assert found["probe"] == 1.0
    assert found["probe_teacher"] <= 0.5
    assert found["probe_floor"] == 0.5
    without = metrics.evaluate(reconstruct, many, SIZE, 64, ALONE, batch=4).metrics
    assert without["probe"] is None


def test_zero_shot_picks_the_nearest_name():
    names = np.eye(3)
    labels = ["b", "a", "c", "a"]
    features = np.array([[0.1, 5, 0], [7, 1, 1], [0, 0, 1], [0, 2, 1]])
    assert zero_shot.zero_shot(features, labels, names) == 0.75


def clip_folder(folder, width=12):
    """A text tower of CLIP's kind with random weights, and a text tokenizer."""
    from tokenizers.processors import TemplateProcessing
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from tokenflow_ext.train.tasks.language import make_text_tokenizer

    text = make_text_tokenizer(["a photo of a cat.", "a photo of a great dog."], 300)
    text.add_special_tokens({"eos_token": "</s>", "pad_token": "<pad>"})
    ends = [("</s>", text.eos_token_id)]
    text.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=ends
    )
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(text), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=width, eos_token_id=text.eos_token_id,
        bos_token_id=text.bos_token_id, pad_token_id=text.pad_token_id,
    )  # fmt: skip
    CLIPTextModelWithProjection(config).save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


def test_names_are_embedded_by_a_text_tower(tmp_path):
    folder = str(clip_folder(tmp_path / "clip"))
    found = zero_shot.name_embeddings(folder, ["cat", "great_dog", "great dog"])
    assert found.shape == (3, 12)
    assert np.allclose(np.linalg.norm(found, axis=1), 1)
    assert np.array_equal(found[1], found[2])
    assert not np.allclose(found[0], found[1])
    with pytest.raises(WeightsError, match=r"no CLIP at .*: wanted is a folder of transformers"):
        zero_shot.name_embeddings(str(tmp_path), ["cat"])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="cannot load CLIP at"):
        zero_shot.name_embeddings(str(tmp_path), ["cat"])


def test_zero_shot_is_part_of_an_evaluation(paths):
    labels = ["a", "b"] * 5
    many = [paths[i % len(paths)] for i in range(10)]

    def reconstruct(images):
        told = torch.nn.functional.one_hot(torch.arange(len(images)) % 2, 2).float()
        pooled = torch.stack([told, told.flip(1)], 1)
        return metrics.Reconstruction(
            torch.zeros(len(images), 1, dtype=torch.int64), images, None, None, pooled
        )

    def run(names):
        return metrics.evaluate(
            reconstruct, many, SIZE, 64, ALONE, batch=4, labels=labels, names=names
        )

    found = run(np.eye(2))
    assert (found.metrics["zero_shot"], found.metrics["zero_shot_teacher"]) == (1.0, 0.0)
    other = run(np.eye(3)[:2])
    assert other.metrics["zero_shot"] is None
    assert "gives 3 channels, the semantic tokens have 2" in other.missing["zero_shot"]


def test_clip_without_classes_is_refused(image_tokenizer, folder, tmp_path):
    with pytest.raises(SystemExit, match="--clip is for images in a folder for each class"):
        entry.main(
            ["evaluate", "--checkpoint", str(image_tokenizer), "--data", str(folder),
             "--out", str(tmp_path / "o"), "--clip", str(tmp_path)]
        )  # fmt: skip


def test_other_teachers_have_no_head_of_their_own():
    from tokenflow_ext.models import TokenizerConfig

    head, missing = networks.choose_head(TokenizerConfig.preset("B"), None, torch.device("cpu"))
    assert head is None
    assert "clip has no classifier" in missing["semantic_top1"]


def test_vgg16_in_the_cache_is_found(cache, monkeypatch):
    read = []

    def stub(path):
        read.append(path)
        return torch.nn.Identity()

    monkeypatch.setattr(networks, "LPIPS", stub)
    none, missing = networks.choose_perceptual(None, torch.device("cpu"))
    assert none is None
    assert str(cache / networks.VGG16) in missing["lpips"]
    cache.mkdir(parents=True)
    (cache / networks.VGG16).touch()
    assert networks.choose_perceptual(None, torch.device("cpu"))[1] == {}
    networks.choose_perceptual("mine.pth", torch.device("cpu"))
    assert read == [cache / networks.VGG16, "mine.pth"]


def test_processes_with_other_weights_are_told(image_tokenizer, folder, cache, tmp_path):
    class Two(Processes):
        def gather(self, value):
            return [value, {}]

    group = Two(0, 2, torch.device("cpu"))
    with pytest.raises(WeightsError, match="do not find the same weights"):
        evaluate.run(str(image_tokenizer), str(folder), str(tmp_path / "out"), group)


@pytest.mark.once
def test_two_processes_are_one(micro, image_tokenizer, folder, tmp_path):
    """Seven images for two processes, and one for two: dealt out, none twice."""
    script = Path(entry.__file__).with_name("__main__.py")
    runs = []
    for world, limit in ((1, 7), (2, 7), (2, 1)):
        out = tmp_path / f"out{world}{limit}"
        arguments = ["evaluate", "--checkpoint", str(image_tokenizer), "--data", str(folder)]
        arguments += ["--out", str(out), "--limit", str(limit), "--batch-size", "2"]
        process = micro.launch([*arguments, "--device", "cpu"], processes=world, script=script)
        runs.append((out, process))
    outputs = [micro.finish(process) for _, process in runs]
    one, two, few = (json.loads((out / "metrics.json").read_text()) for out, _ in runs)
    assert outputs[1].count("SSIM, range 1") == 1  # one process speaks
    assert one["data"] == two["data"]
    assert one["figures"].keys() == two["figures"].keys()
    for name, value in one["figures"].items():
        if value is None:
            assert two["figures"][name] is None, name
        else:
            assert two["figures"][name] == pytest.approx(value, rel=1e-4), name
    files = [(out / "images.jsonl").read_text().splitlines() for out, _ in runs]
    alone, shared, _ = ([json.loads(line) for line in lines] for lines in files)
    for a, b in zip(alone, shared, strict=True):
        assert (a["image"], a["sha256"]) == (b["image"], b["sha256"])
        assert a["psnr"] == pytest.approx(b["psnr"], abs=1e-3)
    pages = [Page((out / "pictures.html").read_text()).sources for out, _ in runs]
    assert pages[0][::2] == pages[1][::2]  # the originals, in one order
    assert two["environment"]["processes"] == 2
    assert few["data"]["images"] == 1


@pytest.mark.once
def test_rfid_is_torch_fidelitys(paths, squares, tmp_path, monkeypatch):
    """Our sums of Inception's features against the library's own FID of the same pictures."""
    ensure_torchvision()
    pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")
    from torch_fidelity import FeatureExtractorInceptionV3

    # The published weights are not at hand: random ones serve, the arithmetic is the same.
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(torch, "load", lambda *_, **__: {})
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path="-")
    weights = tmp_path / "weights.pth"
    torch.save(network.state_dict(), weights)
    monkeypatch.setattr(fid, "_DIGEST", hashlib.sha256(weights.read_bytes()).hexdigest()[:8])
    features, missing = networks.choose_features(str(weights), torch.device("cpu"))
    assert (features.metric, missing) == ("rfid", {})
    features_of = metrics.evaluate(
        lambda images: metrics.Reconstruction(
            torch.zeros(len(images), 1, dtype=torch.int64), blurred(images)
        ),
        paths,
        SIZE,
        8,
        ALONE,
        features=features,
        pictures=len(paths),
    )
    for name, pixels in (("a", features_of.originals), ("b", features_of.made)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(pixels):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i}.png")
    found, _ = picture_sets.compare(tmp_path / "a", tmp_path / "b", weights, more=True)
    assert features_of.metrics["rfid"] == pytest.approx(found["fid"], rel=1e-3)
    assert found.keys() == {
        "fid", "inception_score", "inception_score_deviation", "precision", "recall",
    }  # fmt: skip
    # The same pictures as an array, and statistics.
    np.savez(tmp_path / "a.npz", features_of.originals.permute(0, 2, 3, 1).numpy())
    with torch.no_grad():
        rows = features.extract(features_of.made).double().numpy()
    np.savez(tmp_path / "statistics.npz", mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
    by_statistics, _ = picture_sets.compare(
        tmp_path / "a.npz", tmp_path / "statistics.npz", weights
    )
    assert by_statistics["fid"] == pytest.approx(found["fid"], rel=1e-3)
    with pytest.raises(DataError, match="need pictures, not statistics"):
        picture_sets.compare(tmp_path / "a.npz", tmp_path / "statistics.npz", weights, more=True)


def _npz(path, **arrays):
    np.savez(path, **arrays)
    return path


@needs_lite0
def test_the_stand_in_where_inception_is_not_there(tmp_path, monkeypatch):
    """Its figure, by its own name, against the formula in NumPy; and why there is no FID."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    rng = np.random.default_rng(0)
    one, other = (rng.integers(0, high, (12, 40, 48, 3), dtype=np.uint8) for high in (256, 128))
    a = _npz(tmp_path / "a.npz", arr_0=one)
    found, definition = picture_sets.compare(a, _npz(tmp_path / "b.npz", arr_0=other))
    assert found.keys() == {"fd_efflite0"}
    assert fid.WEIGHTS in definition
    extract = networks.lite0_features(torch.device("cpu")).extract
    rows = [extract(torch.from_numpy(x).permute(0, 3, 1, 2)).double().numpy() for x in (one, other)]
    (m, c), (n, d) = ((x.mean(0), np.cov(x, rowvar=False)) for x in rows)
    root = np.trace(scipy.linalg.sqrtm(c @ d).real)
    expected = ((m - n) ** 2).sum() + np.trace(c) + np.trace(d) - 2 * root
    assert found["fd_efflite0"] == pytest.approx(expected, rel=1e-3)
    assert picture_sets.compare(a, a)[0]["fd_efflite0"] == pytest.approx(0, abs=1e-6)
    for options in ({"more": True}, {"weights": "nowhere.pth"}):
        with pytest.raises(WeightsError):
            picture_sets.compare(a, a, **options)
    statistics = _npz(tmp_path / "s.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(WeightsError, match="Inception"):
        picture_sets.compare(a, statistics)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "has no arr_0, but x"),
        ({"arr_0": np.zeros((4, 8, 8, 3))}, r"arr_0 must be uint8 \[N, H, W, 3\], got float64"),
        ({"arr_0": np.zeros((4, 3, 8, 8), np.uint8)}, "must be uint8"),
        ({"arr_0": np.zeros((1, 8, 8, 3), np.uint8)}, "holds 1"),
        ({"mu": np.zeros(4), "sigma": np.zeros((4, 3))}, "mu and sigma are"),
        ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, "not finite"),
        ({"arr_0": np.array([{}], dtype=object)}, "cannot read"),
    ],
)
def test_npz_files_that_are_none(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        picture_sets.read(_npz(tmp_path / "a.npz", **arrays))


def test_what_is_no_set_of_pictures(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"cannot read .*a\.npz"):
        picture_sets.read(tmp_path / "a.npz")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"a\.txt is no \.npz"):
        picture_sets.read(tmp_path / "a.txt")
    for i, side in enumerate((8, 9)):
        Image.new("RGB", (side, 8)).save(tmp_path / f"{i}.png")
    with pytest.raises(DataError, match="different sizes"):
        picture_sets.read(tmp_path)
