"""Statements of the CUDA sources, and how often the machine code that came of them is run.

The compiler unrolls loops and writes some of them twice. What counts is an iteration of the source:
the instructions of a loop's lines over the copies of its body among them, which a marker tells, an
instruction that the body has a known number of times. Copies are taken as equally long.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from .control_flow import find_loops
from .disassembly import Code
from .errors import SassError


class Place(NamedTuple):
    """A statement of the sources, from the one line of `file` that holds `text` to its end.

    Where the place before it in a path holds such lines, it is among those.
    """

    file: str
    text: str
    nth: int = 0  # of several such lines, from 1; 0 for the only one


@dataclass(frozen=True)
class Part:
    """A statement, within others, and how often a warp runs it.

    A part that lies in another is no part of that one. `times` is of the warp, not of the statement
    around it; 0 leaves the part out.
    """

    path: tuple[Place, ...]
    times: float
    marker: str = ""  # a mnemonic or kind; without, the compiler has not copied the body
    each: int = 1  # of them an iteration


@lru_cache
def _lines(path: Path) -> tuple[str, ...]:
    """Without comments, strings and characters."""
    text = path.read_text()
    return tuple(re.sub(r"//.*|\"[^\"]*\"|'[^']'", "", line) for line in text.splitlines())


def _end(lines: Sequence[str], first: int) -> int | None:
    """The line where the statement that begins on line `first` (from 0) ends."""
    round_open = curly_open = 0
    for number in range(first, len(lines)):
        for character in lines[number]:
            round_open += (character in "([") - (character in ")]")
            curly_open += (character == "{") - (character == "}")
            if character == "}" and curly_open == 0 and round_open == 0:
                return number
            if character == ";" and curly_open == 0 and round_open == 0:
                return number
    return None


@dataclass(frozen=True)
class Sources:
    """The folders where sources are."""

    folders: tuple[Path, ...]

    def lines(self, path: Sequence[Place]) -> list[tuple[str, range]]:
        """Each place's file and lines (from 1), to the end of the statement that begins there.

        Raises:
            SassError: a file or a text is not there, or is there more than once.
        """
        found: list[tuple[str, range]] = []
        for file, text, nth in path:
            paths = [folder / file for folder in self.folders if (folder / file).is_file()]
            if len(paths) != 1:
                raise SassError(f"{file} is in {len(paths)} of the sources' folders")
            numbers = [
                n for n, line in enumerate(paths[0].read_text().splitlines()) if text in line
            ]
            around = [lines for name, lines in found if name == file]
            if around and (inside := [n for n in numbers if n + 1 in around[-1]]):
                numbers = inside
            if not numbers or (nth == 0 and len(numbers) > 1) or nth > len(numbers):
                raise SassError(f"{file} has {len(numbers)} lines with {text!r}")
            first = numbers[max(nth - 1, 0)]
            end = _end(_lines(paths[0]), first)
            if end is None:
                raise SassError(f"{file}:{first + 1}: no statement ends after {text!r}")
            found.append((file, range(first + 1, end + 2)))
        return found


class Listing:
    """A kernel's machine code beside its sources."""

    def __init__(self, code: Code, sources: Sources) -> None:
        self._code, self._sources = code, sources
        depths = {i.address: loop.depth for loop in find_loops(code) for i in loop.instructions}
        self._depths = [depths.get(i.address, 0) for i in code.instructions]
        self._found: dict[tuple[Place, ...], list[int]] = {}

    def _instructions(self, path: tuple[Place, ...]) -> list[int]:
        """Numbers of those that come of a place, by any of the lines they were inlined from."""
        if path not in self._found:
            places = self._sources.lines(path)
            self._found[path] = [
                number
                for number, i in enumerate(self._code.instructions)
                if i.frames
                and all(
                    any(file == name and line in lines for name, line in i.frames)
                    for file, lines in places
                )
            ]
        return self._found[path]

    def _copies(self, part: Part) -> tuple[list[int], float]:
        """The instructions of a part's body, and how many copies of it they are."""
        own = self._instructions(part.path)
        if not own:
            raise SassError(f"no instruction comes of {part.path[-1]}")
        if not part.marker:
            return own, 1.0
        # What comes before the compiled loops is run once for all iterations.
        outside = min(self._depths[number] for number in own)
        own = [number for number in own if self._depths[number] > outside] or own
        kinds = [(i.mnemonic, i.kind) for i in (self._code.instructions[number] for number in own)]
        copies = sum(part.marker in kind for kind in kinds) / part.each
        if copies < 1:
            raise SassError(f"{copies:g} times {part.marker} come of {part.path[-1]}")
        return own, copies

    def weights(self, parts: Sequence[Part], once: tuple[Place, ...] = ()) -> list[float]:
        """How often a warp runs each instruction.

        Args:
            parts: what is run more or less often than once.
            once: what is run once but for the parts, and all else never; the whole kernel where not
                given. Functions of the compiler's own (slow paths of divisions) are never run.

        Raises:
            SassError: a part has no instruction, or fewer than one copy of its marker.
        """
        found = [0.0] * len(self._code.instructions)
        for number in self._instructions(once):
            found[number] = 1.0
        for part in sorted(parts, key=lambda part: len(part.path)):  # inner ones later
            own, copies = self._copies(part)
            for number in own:
                found[number] = part.times / copies
        return found
