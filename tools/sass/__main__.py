"""What the compiler made of the CUDA kernels, read from their machine code."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from . import documents
from .errors import SassError
from .kernels import Kernel
from .objects import ROOT, built_objects, read_objects
from .report import tables

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
    parser.add_argument("--write", action="store_true", help="renew the documents")
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail where a kernel spills, has a stack frame or touches local memory, where its "
        "fences, loads or asynchronous copies are not as they must be, or where a document is out "
        "of date",
    )
    options = parser.parse_args(arguments)
    try:
        kernels, compiler = read_objects(options.objects or built_objects(options.build))
        if options.json:
            record = {"compiler": compiler, "kernels": [kernel.as_json() for kernel in kernels]}
            options.json.write_text(json.dumps(record, indent=1) + "\n")
        if options.write:
            documents.write(kernels, compiler)
        if options.check:
            # Objects that were named need not be those of this source.
            return _check(kernels, compiler, with_documents=not options.objects)
    except (SassError, OSError) as error:
        print(f"sass: {error}", file=sys.stderr)
        return 2
    if options.markdown:
        print(f"Compiled by {compiler}.", *(t.markdown() for t in tables(kernels)), sep="\n\n")
    elif not options.write:
        print(f"compiled by {compiler}")
        print("", *(table.text() + "\n" for table in tables(kernels)), sep="\n")
    return 0


def _check(kernels: Sequence[Kernel], compiler: str, with_documents: bool) -> int:
    problems = [(kernel, text) for kernel in kernels if (text := kernel.problem())]
    for kernel, text in problems:
        print(f"sass: {kernel.architecture} {kernel.name}: {text}", file=sys.stderr)
    old, other = documents.out_of_date(kernels, compiler) if with_documents else ([], [])
    for name in old:
        print(f"sass: {name} is out of date: `make sass ARGS=--write` renews it", file=sys.stderr)
    if problems or old:
        return 1
    counts = Counter(kernel.architecture for kernel in kernels)
    found = ", ".join(f"{number} kernels for {name}" for name, number in counts.items())
    print(f"{found}: no stack frame, spill or local memory access; fences and copies in order")
    for name in other:
        print(f"{name} is of other machine code, and was not compared")
    return 0


if __name__ == "__main__":
    sys.exit(main())
