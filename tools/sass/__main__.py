"""What the compiler made of the CUDA kernels, read from their machine code."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .errors import SassError
from .objects import ROOT, built_objects, read_objects
from .report import replace_block, tables

BUILD = ROOT / "build" / "cmake" / "cuda"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables or the outcome of the check; 1 where the check fails, 2 on an error."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.sass", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "objects", nargs="*", type=Path, help="objects, libraries or cubins (default: those built)"
    )
    parser.add_argument(
        "--build",
        type=Path,
        default=BUILD,
        metavar="FOLDER",
        help="what `make cuda-compile` filled",
    )
    parser.add_argument("--markdown", action="store_true", help="print tables for the documents")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="put the tables between the markers of FILE"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail where a kernel spills, has a stack frame or touches local memory, or where its "
        "fences, loads or asynchronous copies are not as they must be",
    )
    options = parser.parse_args(arguments)
    try:
        kernels, compiler = read_objects(options.objects or built_objects(options.build))
        markdown = "\n\n".join(
            [f"Compiled by {compiler}.", *(t.markdown() for t in tables(kernels))]
        )
        if options.json:
            record = {"compiler": compiler, "kernels": [kernel.as_json() for kernel in kernels]}
            options.json.write_text(json.dumps(record, indent=1) + "\n")
        if options.write:
            options.write.write_text(replace_block(options.write.read_text(), markdown))
    except (SassError, OSError) as error:
        print(f"sass: {error}", file=sys.stderr)
        return 2
    if options.check:
        problems = [(kernel, text) for kernel in kernels if (text := kernel.problem())]
        for kernel, text in problems:
            print(f"sass: {kernel.architecture} {kernel.name}: {text}", file=sys.stderr)
        if problems:
            return 1
        counts = Counter(kernel.architecture for kernel in kernels)
        found = ", ".join(f"{number} kernels for {name}" for name, number in counts.items())
        print(f"{found}: no stack frame, spill or local memory access; fences and copies in order")
    elif options.markdown:
        print(markdown)
    elif not options.write:
        print(f"compiled by {compiler}")
        print("", *(table.text() + "\n" for table in tables(kernels)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
