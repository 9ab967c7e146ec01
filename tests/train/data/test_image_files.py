"""Picture files: which are found, how they are read, one square for every command."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from tokenflow_ext.train.data import captions, image_files
from tokenflow_ext.train.data.image_files import BrokenImageError, open_image
from tokenflow_ext.train.data.text_files import DataError
from tokenflow_ext.train.evaluation import evaluate, picture_sets

RAMP = np.linspace(0, 1, 300).reshape(12, 25)


@pytest.mark.parametrize("sides", [(90, 70), (64, 200), (31, 33), (300, 17)])
def test_every_command_takes_the_same_square(tmp_path, sides):
    noise = np.random.default_rng(0).integers(0, 256, (*sides[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("noise")
    _, evaluated, _, _ = evaluate.Squares([tmp_path / "a.png"], 32)[0]
    expected = evaluate.to_float(evaluated)
    assert torch.equal(image_files.read_square(tmp_path / "a.png", 32), expected)
    assert torch.equal(captions.Pictures(tmp_path, 32)[0].picture, expected)


@pytest.mark.parametrize("sides", [(1, 1), (1, 40), (30000, 1), (2, 9000), (1, 65000)])
def test_a_square_of_any_shape(sides):
    """Enlarged as a whole, the longest would be 256 x 16,640,000 pixels."""
    plain = np.array(image_files.to_square(Image.new("RGB", sides, (9, 99, 199)), 256))
    assert (plain == (9, 99, 199)).all()
    ends = np.zeros((*sides[::-1], 3), np.uint8)
    middle = tuple(slice(max(0, n // 2 - 20), n // 2 + 20) for n in sides[::-1])
    ends[middle] = 255
    square = np.array(image_files.to_square(Image.fromarray(ends), 64))
    assert square.shape == (64, 64, 3)
    assert (square == 255).all()


# -- deep pixels ----------------------------------------------------------------------------------


def tiff(values: np.ndarray, order: str = "<", photometric: int = 1, **tags: int) -> bytes:
    """A grey TIFF of the numbers as they are, written out by hand."""
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    content = values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits, (height, width) = tags.get("bits", 8 * values.itemsize), values.shape
    width = tags.get("width", width)
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: photometric}
    entries |= {273: 8, 277: 1, 278: height, 279: len(content), 339: kind}
    file = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(content))
    file += content + struct.pack(order + "H", len(entries))
    for tag, value in entries.items():
        file += struct.pack(order + "HHII", tag, 4, 1, value)
    return file + bytes(4)


def png(values: np.ndarray, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 16-bit numbers [H, W, C], written out by hand."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def levels(content: bytes) -> np.ndarray:
    """What is read, [H, W, 3]."""
    return np.asarray(open_image("a.file", content)).astype(int)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pgm(most: int) -> bytes:
    return b"P5 25 12 %d\n" % most + (RAMP * most).round().astype(">u2").tobytes()


DEEP = (RAMP * 65535).round().astype(np.uint16)
TWELVE = (RAMP[:, :24] * 4095).round().astype(int)
PACKED = (TWELVE[:, ::2] << 12 | TWELVE[:, 1::2]).astype(">u4").view(np.uint8)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lambda: png(DEEP[..., None], 0), RAMP),
        (lambda: saved(Image.fromarray(DEEP), "TIFF", compression="tiff_lzw"), RAMP),
        (lambda: tiff(DEEP), RAMP),
        (lambda: tiff(DEEP, ">"), RAMP),
        (lambda: tiff(65535 - DEEP, photometric=0), RAMP),
        (lambda: tiff(RAMP.astype(np.float32)), RAMP),
        (lambda: tiff(RAMP.astype(np.float32), ">"), RAMP),
        pytest.param(
            lambda: b"Pf 25 12 -1.0\n" + RAMP[::-1].astype("<f4").tobytes(),
            RAMP,
            marks=pytest.mark.skipif(
                ".pfm" not in image_files.suffixes(), reason="this Pillow reads no PFM"
            ),
        ),
        (lambda: pgm(65535), RAMP),
        (lambda: pgm(1023), RAMP),
        (lambda: saved(Image.fromarray(DEEP), "JPEG2000"), RAMP),
        (
            lambda: tiff(PACKED.reshape(12, -1, 4)[..., 1:].reshape(12, -1), bits=12, width=24),
            RAMP[:, :24],
        ),
    ],
)
def test_grey_of_more_than_8_bits_keeps_its_levels(content, expected):
    read = levels(content())
    assert (read == read[..., :1]).all()
    assert np.abs(read[..., 0] - 255 * expected).max() <= 0.63  # 10 bits know no more


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    "values",
    [DEEP.astype(np.int16), DEEP.astype(np.int32), DEEP.astype(np.uint32), RAMP * 255, RAMP - 0.5],
)
def test_numbers_without_a_known_white_are_refused(values, order):
    values = values.astype(np.float32) if values.dtype == np.float64 else values
    with pytest.raises(BrokenImageError, match=r"the image a\.file: .*known (white|format)"):
        levels(tiff(values, order))
    with pytest.raises(BrokenImageError, match="floating point from nan"):
        levels(tiff(np.full((4, 4), np.nan, np.float32), order))


def test_fid_refuses_what_would_be_read_as_white(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(pgm(65535))
    with pytest.raises(DataError, match=r"a\.png is grey of more than 8 bits"):
        picture_sets.compare(tmp_path, tmp_path)


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_colours_and_alpha_of_16_bits(colour, channels):
    values = np.broadcast_to(DEEP[..., None], (*DEEP.shape, channels)).copy()
    if channels in (2, 4):
        values[..., -1] = 65535
        values[0, :, -1] = 0
    read = levels(png(values, colour))
    expected = RAMP.copy()
    expected[0] = 1 if channels in (2, 4) else expected[0]
    assert np.abs(read - 255 * expected[..., None]).max() <= 1


def test_a_transparent_level_is_white():
    for deep in (False, True):
        values = np.full((4, 4, 1), 0x1234, np.uint16)
        values[0] = 0x1235 if deep else 0x9999
        read = levels(png(values, 0, (b"tRNS", struct.pack(">H", 0x1234))))
        assert (read[1:] == 255).all()
        assert (read[0] == round(int(values[0, 0, 0]) / 257)).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_are_read(mode):
    kind = {"PA": "TIFF", "CMYK": "TIFF", "YCbCr": "JPEG"}.get(mode, "PNG")
    image = Image.new("RGB", (5, 4), "white").convert("P" if mode == "PA" else mode).convert(mode)
    assert levels(saved(image, kind)).min() >= 250


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_read(kind):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (levels(content) == (254, 0, 0)).all() or (levels(content) == (255, 0, 0)).all()


# -- metadata, broken files -----------------------------------------------------------------------


def exif(*entries: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """EXIF of (tag, type, count, value) as they are."""
    head, extra = b"", b""
    for tag, kind, count, value in sorted(entries):
        place = value.ljust(4, b"\0")
        if len(value) > 4:
            place = struct.pack(order + "I", 14 + 12 * len(entries) + len(extra))
            extra += value
        head += struct.pack(order + "HHI", tag, kind, count) + place
    start = b"II*\0" if order == "<" else b"MM\0*"
    start += struct.pack(order + "IH", 8, len(entries))
    return b"Exif\0\0" + start + head + bytes(4) + extra


TURNED = (0x0112, 3, 1, b"\x06\0")
ODD = {
    "a fraction of -1/0": (0x011A, 10, 1, struct.pack("<ii", -1, 0)),
    "a resolution as text": (0x011A, 2, 3, b"72\0"),
    "text as a fraction": (0x0131, 5, 1, struct.pack("<II", 3, 2)),
    "a width as a fraction": (0x0100, 5, 1, struct.pack("<II", 4000, 1)),
    "no such type": (0x0132, 99, 1, b"abcd"),
    "a sub-IFD nowhere": (0x8769, 4, 1, b"\xff\xff\xff\x7f"),
    "a count of 4 thousand million": (0x0131, 2, 0xFFFFFFFF, b"abcd"),
    "a sub-IFD as text": (0x8825, 2, 9, b"somewhere"),
    "offsets of strips": (0x0111, 4, 2, struct.pack("<II", 1 << 31, 1 << 31)),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_odd_metadata_cost_no_pixel(odd, kind):
    image = Image.new("RGB", (96, 64), (200, 100, 50))
    read = levels(saved(image, kind, exif=exif(TURNED, odd)))
    assert read.shape == (96, 64, 3)  # turned all the same
    assert np.abs(read - (200, 100, 50)).max() < 6


@pytest.mark.parametrize(
    "orientation",
    [
        (0x0112, 3, 1, b"\x63\0"),
        (0x0112, 2, 4, b"six\0"),
        (0x0112, 5, 1, struct.pack("<II", 6, 0)),
        (0x0112, 12, 1, struct.pack("<d", float("nan"))),
    ],
)
def test_an_orientation_that_cannot_be_read_leaves_the_picture(orientation):
    image = Image.new("RGB", (96, 64))
    assert levels(saved(image, "JPEG", exif=exif(orientation))).shape == (64, 96, 3)


def test_all_orientations_turn_as_pillow_does():
    image = Image.fromarray((np.arange(60).reshape(4, 5, 3) * 4).astype(np.uint8))
    for value in range(1, 9):
        tag = (0x0112, 3, 1, bytes([value, 0]))
        content = saved(image, "PNG", exif=exif(tag))
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        assert np.array_equal(levels(content), np.asarray(expected))
        upright = saved(image, "TIFF", tiffinfo={274: value})
        assert np.array_equal(levels(upright), np.asarray(expected))


def test_odd_blocks_of_metadata_cost_no_pixel():
    image = Image.new("RGB", (96, 64), (200, 100, 50))
    blocks = {
        "exif": [b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"nothing"],
        "icc_profile": [b"no profile", b""],
        "xmp": [b"<x tiff:Orientation='6", b"\xff\xfe<", b'tiff:Orientation="9"'],
    }
    for name, contents in blocks.items():
        for content in contents:
            for kind in ("JPEG", "WEBP"):
                assert levels(saved(image, kind, **{name: content})).shape == (64, 96, 3)


@pytest.mark.parametrize(
    "block",
    [
        ("PNG", {"icc_profile": bytes(3 << 20)}),
        ("PNG", {"text": 3 << 20}),
        ("JPEG", {"segment": b"ICC_PROFILE\0"}),
        ("JPEG", {"segment": b"ICC_PROFILE\0\1"}),
    ],
)
def test_blocks_that_pillow_refuses_cost_no_pixel(tmp_path, block):
    kind, options = block
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, :48] = (200, 100, 50)
    image, made = Image.fromarray(pixels), {"exif": exif(TURNED)}
    if size := options.get("text"):
        made["pnginfo"] = PngInfo()
        made["pnginfo"].add_itxt("XML:com.adobe.xmp", "x" * size, zip=True)
    if profile := options.get("icc_profile"):
        made["icc_profile"] = profile
    content = saved(image, kind, **made)
    if segment := options.get("segment"):
        content = (
            content[:2] + b"\xff\xe2" + struct.pack(">H", len(segment) + 2) + segment + content[2:]
        )
    with pytest.raises(Exception):  # noqa: B017, PT011 - of Pillow, of several types
        Image.open(io.BytesIO(content)).load()
    read = levels(content)
    assert read.shape == (96, 64, 3)  # turned
    assert np.abs(read[:40] - (200, 100, 50)).max() < 9
    assert read[60:].max() < 9
    (tmp_path / "a.png").write_bytes(content)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), read)
    with pytest.raises(BrokenImageError):
        levels(content[: len(content) - 200])


@pytest.mark.parametrize("name", ["empty.png", "text.jpg", "cut.png", "eps.png", "far.png"])
def test_broken_files_are_named(tmp_path, name):
    content = {
        "empty.png": b"",
        "text.jpg": b"no image",
        "cut.png": png(np.random.default_rng(0).integers(0, 65536, (40, 40, 1)), 0)[:900],
        "eps.png": saved(Image.new("RGB", (4, 4)), "EPS"),  # would run another program
    }
    if name in content:
        (tmp_path / name).write_bytes(content[name])
    with pytest.raises(BrokenImageError, match=rf"cannot read the image .*{name}: ") as error:
        open_image(tmp_path / name)
    assert "0x" not in str(error.value)
    if name in content:
        with pytest.raises(BrokenImageError, match=rf"cannot read the image .*{name}: "):
            open_image(tmp_path / name, content[name])


def test_what_is_no_file_is_not_waited_on(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "folder.png", "device.png"):
        with pytest.raises(BrokenImageError, match=name):
            open_image(tmp_path / name)


def test_a_bomb_is_named(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BrokenImageError, match=r"a\.file: .*decompression bomb"):
        levels(saved(Image.new("L", (50, 50)), "PNG"))


def test_a_suffix_of_another_format_is_read(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.jpg", "PNG")
    assert (np.asarray(open_image(tmp_path / "a.jpg")) == (255, 0, 0)).all()


# -- folders --------------------------------------------------------------------------------------


def test_linked_folders_are_followed_once(tmp_path, capsys):
    root, other = tmp_path / "in", tmp_path / "elsewhere"
    for place in (root / "cats", other / "more"):
        place.mkdir(parents=True)
        Image.new("L", (4, 4)).save(place / "a.png")
    (root / "aliases").symlink_to(root / "cats")  # sorted first, but no name of its own
    (root / "dogs").symlink_to(other)
    (other / "back").symlink_to(root)
    (other / "self").symlink_to(other / "self")
    (root / "up").symlink_to(tmp_path)
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = image_files.list_images(root)
    assert [p.relative_to(root).as_posix() for p in found] == ["cats/a.png", "dogs/more/a.png"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "2 images; left out: 2 further links to a folder" in said
    assert "1 links to a folder around it" in said
    assert "1 links to nothing, pipes or devices" in said


def test_every_suffix_of_pillow_is_found_and_the_rest_is_counted(tmp_path, capsys):
    kinds = {"gif": "GIF", "jfif": "JPEG", "jpe": "JPEG", "tga": "TGA", "pgm": "PPM", "PNG": "PNG"}
    for suffix, kind in kinds.items():
        Image.new("L", (4, 4)).save(tmp_path / f"x.{suffix}", kind)
    for name in ("a.zip", "b.zip", "c.heic", ".d.png", "._x.png", "README", "x.txt", "x.json"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".thumbnails").mkdir()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "metadata.jsonl").write_bytes(b"")
    Image.new("L", (4, 4)).save(tmp_path / ".thumbnails" / "t.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    found = [p.name for p in image_files.list_images(tmp_path)]
    assert found == sorted(f"x.{suffix}" for suffix in kinds)
    said = capsys.readouterr().err
    for words in (
        "6 images",
        "3 hidden",
        "2 .zip files",
        "1 .heic files",
        "1 other files",
        "1 metadata.jsonl",
        "pipes",
    ):
        assert words in said
    assert "links to nothing, pipes or devices" in said
    assert said.count("\n") == 1
    assert {".webp", ".bmp", ".tiff", ".jp2", ".apng"} <= image_files.suffixes()
    assert not {".eps", ".h5", ".mpg", ".pdf"} & image_files.suffixes()


def test_a_folder_that_cannot_be_read_is_counted(tmp_path, capsys, monkeypatch):
    (tmp_path / "closed").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    scan = os.scandir

    def refuse(place):
        if Path(place).name in ("closed", "whole"):
            raise PermissionError(13, "Permission denied", place)
        return scan(place)

    monkeypatch.setattr(image_files.os, "scandir", refuse)
    assert len(image_files.list_images(tmp_path)) == 1
    assert "1 folders that cannot be read, Permission denied" in capsys.readouterr().err
    (tmp_path / "whole").mkdir()
    with pytest.raises(DataError, match=r"cannot read .*whole: Permission denied"):
        image_files.list_images(tmp_path / "whole")


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    for name in ("0.tar", "1.tar", ".x.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"no image below .*2 \.tar files .*1 hidden"):
        image_files.list_images(tmp_path)


def test_names_may_be_any_bytes(tmp_path, capsys):
    for name in (b"caf\xe9.png", b"line\nend.png", b"\xff\xfe.txt.gz"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(saved(Image.new("L", (4, 4)), "PNG"))
    found = image_files.list_images(tmp_path)
    assert [open_image(path).size for path in found] == [(4, 4)] * 2
    assert capsys.readouterr().err.count("\n") == 1
    found[0].write_bytes(b"")
    with pytest.raises(BrokenImageError, match=r"caf\\xe9\.png"):
        open_image(found[0])
