"""tools/sass: which instructions come of which statements, and how often they are run."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sass.disassembly import Code, Instruction
from sass.errors import SassError
from sass.source import Listing, Part, Place, Sources

SOURCE = """\
// A kernel: { ( in a comment.
__global__ void demo(int n,
                     const char* text = "}") {
  int sum = 0;
  for (int i = 0; i < n; ++i) {
    sum += at(i);  // } here
    if (sum < 0) rare();
  }
  for (int i = 0; i < n; ++i)
    sum = add(sum,
              [&] { return i; }());
  const auto last = [&] {
    return sum;
  };
}
int after;
"""


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    (tmp_path / "demo.cu").write_text(SOURCE)
    (tmp_path / "tile.cuh").write_text("int at(int i) {\n  return i;\n}\n")
    return Sources((tmp_path,))


def lines(sources: Sources, *places: Place) -> list[tuple[int, int]]:
    return [(found.start, found.stop - 1) for _, found in sources.lines(places)]


class TestPlaces:
    @pytest.mark.parametrize(
        ("place", "expected"),
        [
            (Place("demo.cu", "demo(int n"), (2, 15)),
            (Place("demo.cu", "int sum"), (4, 4)),
            (Place("demo.cu", "for (int i", 1), (5, 8)),
            (Place("demo.cu", "for (int i", 2), (9, 11)),
            (Place("demo.cu", "const auto last"), (12, 14)),
            (Place("tile.cuh", "int at"), (1, 3)),
        ],
    )
    def test_statements(self, sources: Sources, place: Place, expected: tuple[int, int]) -> None:
        assert lines(sources, place) == [expected]

    def test_within_the_place_before(self, sources: Sources) -> None:
        loop = Place("demo.cu", "for (int i", 1)
        assert lines(sources, loop, Place("demo.cu", "sum += ")) == [(5, 8), (6, 6)]
        # What is nowhere within it is looked for in the whole file: a function that was inlined.
        assert lines(sources, loop, Place("demo.cu", "int after")) == [(5, 8), (16, 16)]

    @pytest.mark.parametrize(
        ("place", "said"),
        [
            (Place("none.cu", "x"), "none.cu is in 0"),
            (Place("demo.cu", "while"), "0 lines with 'while'"),
            (Place("demo.cu", "for (int i"), "2 lines with"),
            (Place("demo.cu", "for (int i", 3), "2 lines with"),
        ],
    )
    def test_missing(self, sources: Sources, place: Place, said: str) -> None:
        with pytest.raises(SassError, match=said):
            sources.lines([place])

    def test_without_an_end(self, tmp_path: Path) -> None:
        (tmp_path / "open.cu").write_text("void f() {\n  g();\n")
        with pytest.raises(SassError, match=r"open.cu:1: no statement ends"):
            Sources((tmp_path,)).lines([Place("open.cu", "void f")])

    @given(st.integers(0, 2**32 - 1))
    def test_nested_blocks(self, seed: int) -> None:
        """Blocks within blocks of random shape end where they were closed."""
        import tempfile

        draw, text, ends = random.Random(seed), [], {}

        def block(depth: int) -> None:
            begin = len(text)
            text.append("  " * depth + f"while (f(m{begin}, g())) {{  // }}")
            for _ in range(draw.randrange(3)):
                if depth < 4 and draw.random() < 0.5:
                    block(depth + 1)
                else:
                    text.append("  " * depth + draw.choice(["f();", 'g("{");', "h([](int) {});"]))
            text.append("  " * depth + "}")
            ends[begin] = len(text)

        for _ in range(draw.randrange(1, 4)):
            block(0)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "a.cu").write_text("\n".join(text) + "\n")
            found = Sources((Path(folder),))
            for begin, end in ends.items():
                ((_, span),) = found.lines([Place("a.cu", f"f(m{begin},")])
                assert (span.start, span.stop - 1) == (begin + 1, end)


def code(*listed: tuple[str, int | tuple[tuple[str, int], ...]]) -> Code:
    """Instructions and labels in order; an instruction with its line, or with its frames."""
    made = Code()
    for text, where in listed:
        if text.endswith(":"):
            made.labels[text[:-1]] = len(made.instructions)
            continue
        opcode, _, operands = text.partition(" ")
        frames = (("demo.cu", where),) if isinstance(where, int) else where
        guard = "P0" if opcode == "BRA" else ""
        made.instructions.append(
            Instruction(16 * len(made.instructions), opcode, operands, guard, frames=frames)
        )
    return made


KERNEL = Place("demo.cu", "demo(int n")
FIRST = Place("demo.cu", "for (int i", 1)
RARE = Place("demo.cu", "if (sum < 0)")
# Twice in one iteration, and once more for what is left; its beginning before that.
UNROLLED = code(
    ("MOV", 4),
    ("ISETP", 5),
    (".L_0:", 0),
    ("LDG", (("tile.cuh", 2), ("demo.cu", 6))),
    ("LDG", (("tile.cuh", 2), ("demo.cu", 6))),
    ("FADD", 6),
    ("FADD", 6),
    ("MUFU", 7),
    ("IADD3", 5),
    ("BRA `(.L_0)", 5),
    (".L_1:", 0),
    ("LDG", (("tile.cuh", 2), ("demo.cu", 6))),
    ("FADD", 6),
    ("BRA `(.L_1)", 5),
    ("STG", 13),
    ("EXIT", 16),
    ("DADD", ()),
)


class TestWeights:
    def weights(self, sources: Sources, *parts: Part, once: tuple[Place, ...] = ()) -> list[float]:
        return Listing(UNROLLED, sources).weights(parts, once)

    def test_everything_once_but_for_slow_paths(self, sources: Sources) -> None:
        assert self.weights(sources) == [1.0] * 14 + [0.0]

    def test_once_within_a_place(self, sources: Sources) -> None:
        found = self.weights(sources, once=(KERNEL,))
        assert found == [1.0] * 13 + [0.0, 0.0]

    def test_iterations_over_copies(self, sources: Sources) -> None:
        found = self.weights(sources, Part((KERNEL, FIRST), 30, "LDG"))
        assert found[:2] == [1, 1]  # before the loop
        assert found[2:12] == [10] * 10  # 30 iterations, three copies
        assert found[12:] == [1, 1, 0]

    def test_marker_by_kind_and_more_than_one(self, sources: Sources) -> None:
        found = self.weights(sources, Part((KERNEL, FIRST), 30, "float32", each=3))
        assert found[2:12] == [30] * 10

    def test_without_a_marker(self, sources: Sources) -> None:
        found = self.weights(sources, Part((KERNEL, FIRST), 7))
        assert found[1:12] == [7] * 11

    def test_inner_parts_are_none_of_the_outer(self, sources: Sources) -> None:
        parts = [Part((KERNEL, FIRST), 30, "LDG"), Part((KERNEL, FIRST, RARE), 0)]
        for order in (parts, parts[::-1]):
            found = self.weights(sources, *order)
            assert found[6] == 0
            assert found[2:6] == [10] * 4

    def test_inlined_code_is_where_it_was_inlined_from_and_to(self, sources: Sources) -> None:
        found = self.weights(sources, Part((KERNEL, Place("tile.cuh", "int at")), 5))
        assert [n for n, weight in enumerate(found) if weight == 5] == [2, 3, 9]

    @pytest.mark.parametrize(
        ("part", "said"),
        [
            (Part((KERNEL, Place("demo.cu", "for (int i", 2)), 3), "no instruction comes of"),
            (Part((KERNEL, FIRST), 3, "DFMA"), "0 times DFMA"),
            (Part((KERNEL, FIRST), 3, "MUFU", each=2), "0.5 times MUFU"),
        ],
    )
    def test_what_is_not_there(self, sources: Sources, part: Part, said: str) -> None:
        with pytest.raises(SassError, match=said):
            self.weights(sources, part)
