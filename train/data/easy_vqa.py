"""Questions about pictures that come in a package: easy-vqa, fetched by one command.

DIR/train.json, DIR/test.json    questions and answers in LLaVA's form
DIR/train/, DIR/test/            their pictures, 64 px, with captions in metadata.jsonl
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from tokenflow_ext.models.understanding.chat import IMAGE

from .outputs import check_new_folder, json_text, write_folder
from .text_files import METADATA, DataError, require_file

PACKAGE, VERSION = "easy-vqa", "1.0"
SHA256 = "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"
LICENCE = "pictures and questions: easy-VQA, (c) 2019 Victor Zhou, MIT\n"
SPLITS = ("train", "test")
SHAPES = ("circle", "rectangle", "triangle")
#: Of what sort a question is.
KINDS = ("yes/no", "shape", "colour")


def kind_of(answer: str) -> str:
    """Of what sort a question with this answer is."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "colour"


def unpack(wheel: Path, folder: Path) -> dict[str, int]:
    """Write the package's data as the folder ``folder``: it appears whole or not at all.

    Returns:
        The number of questions of each split.

    Raises:
        DataError: no such package.
        OutputError: the folder holds something, or cannot be written.
    """
    check_new_folder(folder)
    content: dict[str, bytes] = {"LICENCE.txt": LICENCE.encode()}
    counts = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for split in SPLITS:
                place = f"easy_vqa/data/{split}"
                questions = json.loads(archive.read(f"{place}/questions.json"))
                numbers = sorted({number for _, _, number in questions})
                for number in numbers:
                    picture = archive.read(f"{place}/images/{number}.png")
                    content[f"{split}/{number}.png"] = picture
                captions = _captions(questions)
                entries = [_entry(split, captions, *question) for question in questions]
                content[f"{split}.json"] = json_text(entries, indent=0)
                lines = [{"file_name": f"{n}.png", "text": said} for n, said in captions.items()]
                content[f"{split}/{METADATA}"] = b"".join(json_text(x) + b"\n" for x in lines)
                counts[split] = len(entries)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel} is not {PACKAGE}: {error}") from error
    write_folder(folder, content)
    return counts


def _entry(
    split: str, captions: dict[int, str], question: str, answer: str, number: int
) -> dict[str, Any]:
    return {
        "image": f"{split}/{number}.png",
        **({"caption": captions[number]} if number in captions else {}),
        "kind": kind_of(answer),
        "conversations": [
            {"from": "human", "value": f"{IMAGE}\n{question}"},
            {"from": "gpt", "value": answer},
        ],
    }


def _captions(questions: list[tuple[str, str, int]]) -> dict[int, str]:
    """What each picture shows, by the answers: "a teal triangle"."""
    known: dict[int, dict[str, str]] = defaultdict(dict)
    for _, answer, number in questions:
        known[number][kind_of(answer)] = answer
    return {
        number: f"a {said['colour']} {said['shape']}"
        for number, said in sorted(known.items())
        if "colour" in said and "shape" in said
    }


def fetch(folder: str | Path) -> Path:
    """Fetch the package with pip and unpack it into ``folder`` (left alone if already there).

    Raises:
        DataError: no connection, or a package that is not the one known here.
        OutputError: the folder holds something else, or cannot be written.
    """
    target = Path(folder)
    if all((target / f"{split}.json").is_file() for split in SPLITS):
        print(f"{target} already holds the questions\n{LICENCE}", end="")
        return target
    check_new_folder(target)
    wanted = f"{PACKAGE}=={VERSION}"
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
        done = subprocess.run([*command, "--dest", scratch, wanted], capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise DataError(
                f"pip download {wanted} failed: {(done.stderr or done.stdout).strip()}; run it on "
                f"another machine, and give the file to `tokenflow fetch-easy-vqa {target} "
                "--wheel FILE`"
            )
        return from_wheel(wheels[0], target)


def from_wheel(wheel: Path, folder: Path) -> Path:
    """Unpack the package's file into ``folder`` if it is the one known here; prints the licence.

    Raises:
        DataError: another file.
        OutputError: the folder holds something, or cannot be written.
    """
    check_new_folder(folder)
    require_file(wheel)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise DataError(f"{wheel} is not {PACKAGE} {VERSION}: its SHA-256 is {digest}")
    counts = unpack(wheel, folder)
    said = ", ".join(f"{count} {split}" for split, count in counts.items())
    print(f"{said} questions in {folder}\n{LICENCE}", end="")
    return folder
