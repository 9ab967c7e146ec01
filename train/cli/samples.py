"""Pictures of classes in one npz file, drawn in parts by any number of processes.

    FILE.npz              when all parts are there: arr_0 uint8 [N, H, W, 3], arr_1 int64 [N]
    FILE.npz.parts/       until then
        about.json        what the pictures depend on: a run goes on with its own parts alone
        00000.npy         pictures of one part

Picture i is of class ``classes[i // each]`` and has the seed ``seed + i``, so that the file does
not depend on how the work was split.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenflow_ext.models.serialization.files import OutputError, flush, write_file
from tokenflow_ext.train.data import DataError
from tokenflow_ext.train.data.outputs import check_folder, json_text
from tokenflow_ext.train.data.text_files import read_json, say
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.tasks.image_generator import ClassImageGenerator

_ABOUT = "about.json"
#: Pictures of a part, a multiple of every sensible batch: what is lost when a process is killed.
PART = 256


def check_target(file: Path, overwrite: bool) -> None:
    """That the file can be written.

    Raises:
        OutputError: it is there already, or its folder cannot be written to.
    """
    if file.suffix != ".npz":
        raise OutputError(f"--npz names a file that ends in .npz, got {file}")
    check_folder(file.parent)
    if os.path.lexists(file) and not (overwrite and file.is_file()):
        raise OutputError(f"{file} is there already: name another, or replace it with --overwrite")


def write(
    generator: ClassImageGenerator,
    classes: Sequence[str],
    file: Path,
    group: Processes,
    *,
    each: int,
    seed: int,
) -> Path:
    """Draw ``each`` pictures of every class, and write them into one npz file.

    Parts that an earlier call left are kept. Every process calls it; the first joins the parts.

    Raises:
        OutputError: parts of other pictures are in the way.
    """
    numbers = generator.labels(classes)
    about = {
        "classes": numbers,
        "each": each,
        "seed": seed,
        "part": PART,
        "batch": generator.batch,
        "drawn with": generator.facts,
    }
    folder, total = file.with_name(f"{file.name}.parts"), each * len(classes)
    with group.together():
        if group.first:
            _claim(folder, about)
    group.wait()
    parts = [folder / f"{number:05d}.npy" for number in range(-(-total // PART))]
    missing = [part for part in parts if not part.is_file()]
    if group.first and len(missing) < len(parts):
        say(f"{len(parts) - len(missing)} of {len(parts)} parts are there already")
    group.wait()  # before one of them is written
    for part in missing[group.rank :: group.world]:
        first = int(part.stem) * PART
        which = range(first, min(total, first + PART))
        names = [classes[i // each] for i in which]
        images = generator.draw(names, [seed + i for i in which])
        pixels = np.stack([image.permute(1, 2, 0).numpy() for image in images])
        content = io.BytesIO()
        np.save(content, pixels, allow_pickle=False)
        write_file(part, content.getvalue(), overwrite=True)
    group.wait()
    with group.together():
        if group.first:
            labels = np.repeat(np.array(numbers, dtype=np.int64), each)
            _join(parts, labels, file)
            shutil.rmtree(folder)
    return file


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Make the folder of parts, or see that it holds parts of these pictures."""
    path = folder / _ABOUT
    if folder.is_dir() and any(folder.iterdir()):
        found = read_json(path) if path.is_file() else None
        if not isinstance(found, dict):
            raise OutputError(f"{folder} holds other things: remove it, or name another file")
        differs = [key for key, value in json.loads(json.dumps(about)).items()
                   if found.get(key) != value]  # fmt: skip
        if differs:
            raise OutputError(
                f"{folder} holds parts of other pictures ({differs[0]} is another): remove it, or "
                "name another file"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_file(path, json_text(about, indent=2), overwrite=True)


def _join(parts: Sequence[Path], labels: np.ndarray, file: Path) -> None:
    """One npz file of all parts, which are read one at a time."""
    arrays = [np.load(part, mmap_mode="r", allow_pickle=False) for part in parts]
    shapes = {array.shape[1:] for array in arrays}
    count = sum(len(array) for array in arrays)
    if len(shapes) != 1 or count != len(labels):
        raise DataError(f"the parts in {parts[0].parent} do not fit together: remove it")
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shapes.pop())}
    scratch = file.with_name(f".{file.name}.part")
    try:
        with zipfile.ZipFile(scratch, "w", zipfile.ZIP_STORED) as archive:
            # Fixed dates: the same pictures are the same bytes.
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for array in arrays:
                    member.write(np.ascontiguousarray(array).tobytes())
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                np.lib.format.write_array(member, labels, allow_pickle=False)
        flush(scratch)
        scratch.replace(file)
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror}") from error
    finally:
        scratch.unlink(missing_ok=True)
