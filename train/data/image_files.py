"""Picture files: which there are, reading them as RGB, and the square that a tokenizer takes."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import cast

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from tokenflow_ext.errors import BrokenImageError as BrokenImageError
from tokenflow_ext.models.metrics import to_uint8

from .places import is_folder, is_remote, place, read_bytes, relative, remote_files
from .text_files import METADATA, DataError, Tally, check_file, reason

# What turns a picture upright, by its orientation tag.
_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# TIFF's tags BitsPerSample, PhotometricInterpretation, SampleFormat.
_BITS, _PHOTOMETRIC, _FORMAT = 258, 262, 339

# A longer picture is cut to its middle first: enlarging a line of pixels would fill the memory.
_LONGEST = 16

#: What :func:`open_image` and :func:`to_square` do, with the size to be filled in.
PREPROCESSING = (
    "EXIF orientation applied, more than 8 bits scaled to 8, transparency over white, RGB; of a "
    f"picture over {_LONGEST} times as long as wide the middle {_LONGEST} : 1; while the shorter "
    "side is twice {size} px or more, both sides are halved (rounded down) with Pillow's box "
    "filter; then the shorter side becomes {size} px and the longer one in proportion (rounded) "
    "with Pillow's bicubic filter, a = -0.5, antialiased (its support grows with the reduction); "
    "then the middle {size} x {size} px, the corner rounded down."
)


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats that are read: all of Pillow's but those it only knows the head of, and EPS, for
    which it would run another program on the file."""
    Image.preinit()  # the common formats are tried first, those without a mark of their own last
    Image.init()
    return tuple(x for x in Image.OPEN if x not in ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"))


@functools.cache
def suffixes() -> frozenset[str]:
    """Suffixes of the formats that are read, in lower case, with their dot."""
    known = set(formats())
    return frozenset(s for s, name in Image.registered_extensions().items() if name in known)


# -- which there are ------------------------------------------------------------------------------


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Every image file below ``folder``, sorted by its path; a line says what else is there.

    Raises:
        DataError: no such folder, or no image in it.
    """
    found, left = find_images(folder)
    if not found:
        raise DataError(f"no image below {folder}" + (f"; left out: {left}" if left.total else ""))
    left.say(f"{len(found)} images; left out")
    return found


def find_images(folder: str | os.PathLike[str], shards: bool = False) -> tuple[list[Path], Tally]:
    """Every image file below ``folder``, sorted by its path, and what was left out.

    Links are followed. A folder that is met twice counts once, under its own name if it has one
    here; a link to a folder around this one is left out. Hidden files and folders are left out.
    Texts and JSON files are no images, but are not counted: captions lie in such.

    Args:
        shards: whether the ``.tar`` files right in the folder are not counted either.

    Raises:
        DataError: no such folder, or one that cannot be read.
    """
    root = place(folder)
    if not is_folder(root):
        raise DataError(f"no folder at {root}")
    if is_remote(root):
        return _find_remote(root, shards)
    around, seen, found, left = set(root.resolve().parents), set(), [], Tally(root)
    folders = [root]
    links: list[Path] = []
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        try:
            if here.resolve() in around:
                left.add("links to a folder around it", here)
                continue
            state = here.stat()
            if (state.st_dev, state.st_ino) in seen:
                left.add("further links to a folder", here)
                continue
            seen.add((state.st_dev, state.st_ino))
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except (OSError, RuntimeError) as error:
            if here == root:
                raise DataError(f"cannot read {root}: {reason(error)}") from error
            left.add(f"folders that cannot be read, {reason(error)}", here)
            continue
        for entry in entries:
            path, suffix = here / entry.name, Path(entry.name).suffix.lower()
            try:
                folder_here, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                folder_here = is_file = False
            if entry.name.startswith("."):
                left.add("hidden", path)
            elif folder_here:
                (links if entry.is_symlink() else folders).append(path)
            elif entry.name == METADATA and here != root:
                left.add(f"{METADATA} that are not in the folder itself", path)
            elif suffix in suffixes():
                if is_file:
                    found.append(path)
                else:
                    left.add("links to nothing, pipes or devices", path)
            elif suffix not in (".txt", ".json", ".jsonl") and not (
                shards and here == root and is_file and entry.name.endswith(".tar")
            ):
                left.add(f"{suffix or 'other'} files", path)
    return sorted(found), left


def _find_remote(root: Path, shards: bool) -> tuple[list[Path], Tally]:
    """:func:`find_images` of a URL, where there are no links."""
    found, left = [], Tally(root)
    for path in remote_files(root):
        name = PurePosixPath(relative(path, root))
        suffix = name.suffix.lower()
        if any(part.startswith(".") for part in name.parts):
            left.add("hidden", path)
        elif name.name == METADATA:
            if name.parts[1:]:
                left.add(f"{METADATA} that are not in the folder itself", path)
        elif suffix in suffixes():
            found.append(path)
        elif suffix not in (".txt", ".json", ".jsonl") and not (
            shards and not name.parts[1:] and suffix == ".tar"
        ):
            left.add(f"{suffix or 'other'} files", path)
    return found, left


# -- reading --------------------------------------------------------------------------------------


def open_image(path: str | os.PathLike[str], content: bytes | None = None) -> Image.Image:
    """The image file as RGB: its orientation applied, transparent parts over white, of several
    frames the first, deep pixels scaled to 8 bits (see :func:`_eight_bits`). Colour profiles are
    not applied.

    Args:
        content: the file's bytes where they are known already; ``path`` then only names them.

    Raises:
        BrokenImageError: naming the file, where it is no image that can be read.
        DataError: a URL that cannot be read.
    """
    name = str(path)
    if content is None and is_remote(path):
        content = read_bytes(cast(Path, path))
    try:
        if content is None:
            check_file(path)
        if not (os.stat(path).st_size if content is None else content):
            raise ValueError("it is empty")
        try:
            return _decode(path if content is None else io.BytesIO(content))
        except Exception:
            bare = _without_metadata(Path(path).read_bytes() if content is None else content)
            if bare is None:
                raise
            return _decode(io.BytesIO(bare))
    except UnidentifiedImageError as error:
        raise _broken(name, "of no known format") from error
    except Exception as error:  # whatever a decoder meets in bytes that anybody can write
        raise _broken(name, reason(error)) from error


def _broken(name: str, why: str) -> BrokenImageError:
    error = BrokenImageError(f"cannot read the image {name}: {why}")
    error.why = why
    return error


def _decode(source: str | os.PathLike[str] | io.BytesIO) -> Image.Image:
    """What :func:`open_image` gives, or any error."""
    with Image.open(source, "r", formats()) as file:
        file.load()
        image: Image.Image = file
        if file.mode.startswith(("I", "F")):
            image = _eight_bits(file)
        if (turn := _TURNS.get(_orientation(file))) is not None:
            image = image.transpose(turn)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def _without_metadata(content: bytes) -> bytes | None:
    """A PNG or JPEG without colour profile, texts and XMP, which Pillow refuses a picture for where
    they are broken or large; None where there is nothing to leave out. EXIF stays."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        at, parts = 8, [content[:8]]
        while at + 12 <= len(content):
            end = at + 12 + int.from_bytes(content[at : at + 4], "big")
            kind = content[at + 4 : at + 8]
            # Chunks without which there is no picture begin with a capital.
            if kind[:1].isupper() or kind in (b"tRNS", b"eXIf"):
                parts.append(content[at:end])
            at = end
    elif content.startswith(b"\xff\xd8"):
        at, parts = 2, [content[:2]]
        while content[at : at + 1] == b"\xff" and content[at + 1 : at + 2] != b"\xda":  # the scan
            end = at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
            marker, exif = content[at + 1], content.startswith(b"Exif\0", at + 4)
            if marker not in (0xE1, 0xE2, 0xED, 0xFE) or exif:
                parts.append(content[at:end])
            at = end
        parts.append(content[at:])
    else:
        return None
    bare = b"".join(parts)
    return bare if len(bare) < len(content) else None


def check_depth(path: Path) -> None:
    """That a picture looks the same to libraries which convert it without a thought of its depth.

    Raises:
        DataError: it is grey of more than 8 bits, which they make white. (What cannot be opened is
            theirs to refuse.)
    """
    try:
        check_file(path)
        with Image.open(path, "r", formats()) as file:
            deep = file.mode.startswith(("I", "F"))
    except Exception:  # as in open_image
        return
    if deep:
        raise DataError(
            f"{path} is grey of more than 8 bits, and would be read as white: save it with 8"
        )


def _orientation(file: Image.Image) -> object:
    """The orientation tag; 1, upright, where it cannot be read. Other tags are not looked at: they
    may hold anything, and no pixel depends on them."""
    try:
        return file.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's errors about metadata are of many types
        return 1


def _eight_bits(file: Image.Image) -> Image.Image:
    """A grey picture of more than 8 bits as L, or LA where a level is transparent.

    Whole numbers of b bits become v / (2^b - 1), those of PGM v / maxval, and floating point within
    [0, 1] is taken as it is, all times 255, rounded. (Of 16-bit colours Pillow itself keeps the
    upper 8 bits, less than a level apart.)

    Raises:
        ValueError: numbers of which nobody knows what is white: signed, of 32 bits, floating point
            outside [0, 1].
    """
    values, tags = np.asarray(file), getattr(file, "tag_v2", {})
    if file.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f"floating point from {values.min():g} to {values.max():g}: only values within "
                "[0, 1] have a known white"
            )
        most = 1.0
    else:
        if file.format == "TIFF":
            bits, signed = np.ravel(tags.get(_BITS, 1))[0], np.ravel(tags.get(_FORMAT, 1))[0] != 1
        elif file.format in ("JPEG2000", "PNG", "PPM"):  # Pillow gives all of 16 bits
            bits, signed = 16, False
        else:
            raise ValueError(f"grey of more than 8 bits in {file.format} has no known white")
        if signed or bits > 16:
            raise ValueError(
                f"{'signed ' * bool(signed)}whole numbers of {bits} bits have no known white: "
                "save it with 8 or 16 bits, unsigned"
            )
        most = float(2 ** int(bits) - 1)
    scaled = values / most
    if tags.get(_PHOTOMETRIC) == 0:  # white is 0
        scaled = 1 - scaled
    image = Image.fromarray((scaled * 255).round().astype(np.uint8))
    clear = file.info.get("transparency")
    if isinstance(clear, int):
        image.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return image


# -- the square of a tokenizer --------------------------------------------------------------------


def cut_long(image: Image.Image) -> Image.Image:
    """Of an image over 16 times as long as wide the middle 16 : 1; otherwise the image."""
    longest = _LONGEST * min(image.size)
    width, height = min(image.width, longest), min(image.height, longest)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_square(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an RGB image at ``size`` pixels: see ``PREPROCESSING``.

    The released code's evaluation does the same. Every command that takes whole pictures does it,
    so that their figures compare; training crops otherwise, see data.py.
    """
    image = cut_long(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    sides = (round(image.width * scale), round(image.height * scale))
    image = image.resize(sides, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_square(path: Path, size: int) -> torch.Tensor:
    """The middle square of an image file: [3, size, size] in [-1, 1].

    Raises:
        BrokenImageError: naming the file.
    """
    return to_tensor(to_square(open_image(path), size))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image to float32 [3, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3] (127.5 x + 128, clamped, truncated)."""
    return to_uint8(images).cpu().permute(0, 2, 3, 1).contiguous().numpy()


def tile(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Images [H, W, 3] in rows, without gaps; missing ones at the end are white."""
    height, width, _ = images[0].shape
    rows = -(-len(images) // columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + height, left : left + width] = image
    return sheet
