"""The pictures of the text-to-image demonstration: named emoji renders, fetched by one command."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from .outputs import check_new_folder, json_text, write_folder
from .text_files import METADATA, DataError, json_lines, require_file

PACKAGE, VERSION = "@lobehub/fluent-emoji-3d", "1.1.0"
SHA256 = "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
LICENCES = f"""\
pictures: Fluent Emoji, 3D, (c) Microsoft Corporation, MIT; npm {PACKAGE} {VERSION} by LobeHub, MIT
names: the Python package emoji, BSD-3-Clause, after the Unicode Common Locale Data Repository
"""
_SELECTOR = 0xFE0F  # "draw the character before as a picture": in some file names, not in others
_SKIN_TONES = range(0x1F3FB, 0x1F400)


def _names() -> dict[tuple[int, ...], str]:
    """English names by code points without the variation selector."""
    try:
        from emoji import EMOJI_DATA
    except ImportError as error:
        raise DataError(
            "the emojis' names come from the package emoji: pip install emoji"
        ) from error
    names = {}
    for text, entry in EMOJI_DATA.items():
        points = tuple(point for point in map(ord, text) if point != _SELECTOR)
        names[points] = entry["en"].strip(":").replace("_", " ")
    return names


def unpack(tarball: Path, folder: Path, skin_tones: bool = False) -> int:
    """Write the named pictures of the package, with ``metadata.jsonl``, as the folder ``folder``:
    it appears whole or not at all.

    Args:
        skin_tones: whether to take the variants of one emoji by skin tone as well.

    Returns:
        The number of pictures.

    Raises:
        DataError: no archive, or no named picture in it.
        OutputError: the folder holds something, or cannot be written.
    """
    check_new_folder(folder)
    names, found = _names(), {}
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if not member.isfile() or path.suffix != ".webp":
                    continue
                try:
                    points = [int(part, 16) for part in path.stem.split("-")]
                except ValueError:
                    continue
                if not skin_tones and any(point in _SKIN_TONES for point in points):
                    continue
                name = names.get(tuple(point for point in points if point != _SELECTOR))
                if name is not None:
                    # The path in the archive is not used: only its code points, written anew.
                    file = "-".join(f"{point:04x}" for point in points) + ".webp"
                    picture = archive.extractfile(member)
                    if picture is not None:  # a file, as every picture is
                        found[file] = (name, picture.read())
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"cannot read {tarball}: {error}") from error
    if not found:
        raise DataError(f"no named picture in {tarball}")
    files = sorted(found)
    lines = [{"file_name": file, "text": found[file][0]} for file in files]
    content = {file: found[file][1] for file in files}
    content["LICENCES.txt"] = LICENCES.encode()
    content[METADATA] = b"".join(json_text(line) + b"\n" for line in lines)
    write_folder(folder, content)
    return len(files)


def _has_tone(points: list[str]) -> bool:
    return any(f"{tone:04x}" in points for tone in _SKIN_TONES)


def _listed(file: Path) -> list[str]:
    expected = '{"file_name": ...}'
    return [str(entry.get("file_name", "")) for _, entry in json_lines(file, expected)]


def fetch(folder: str | Path, skin_tones: bool = False) -> Path:
    """Fetch the package with npm and unpack it into ``folder`` (left alone if already there).

    Raises:
        DataError: no npm, no connection, a package that is not the one known here, or a folder
            with other pictures.
        OutputError: the folder holds something else, or cannot be written.
    """
    target = Path(folder)
    if (target / METADATA).is_file():
        tones = any(_has_tone(Path(file).stem.split("-")) for file in _listed(target / METADATA))
        if tones != skin_tones:
            raise DataError(
                f"{target} already holds pictures, {'with' if tones else 'without'} variants by "
                "skin tone: name another folder"
            )
        print(f"{target} already holds pictures\n{LICENCES}", end="")
        return target
    check_new_folder(target)
    _names()  # what is missing is better said before 16 MB are fetched
    npm = shutil.which("npm")
    wanted = f"{PACKAGE}@{VERSION}"
    if npm is None:
        raise DataError(
            f"npm is not installed: install Node.js, or run `npm pack {wanted}` on another machine "
            f"and unpack the file here with `tokenflow fetch-emoji {target} --tarball FILE`"
        )
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [npm, "pack", wanted, "--silent"], cwd=scratch, capture_output=True, text=True
        )
        tarballs = list(Path(scratch).glob("*.tgz"))
        if done.returncode or len(tarballs) != 1:
            raise DataError(f"npm pack {wanted} failed: {(done.stderr or done.stdout).strip()}")
        return from_tarball(tarballs[0], target, skin_tones)


def from_tarball(tarball: Path, folder: Path, skin_tones: bool = False) -> Path:
    """Unpack the package's file into ``folder`` if it is the one known here; prints the licences.

    Raises:
        DataError: another file.
        OutputError: the folder holds something, or cannot be written.
    """
    check_new_folder(folder)
    require_file(tarball)
    try:
        digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {tarball}: {error}") from error
    if digest != SHA256:
        raise DataError(f"{tarball} is not {PACKAGE} {VERSION}: its SHA-256 is {digest}")
    count = unpack(tarball, folder, skin_tones)
    print(f"{count} pictures with their names in {folder}\n{LICENCES}", end="")
    return folder
