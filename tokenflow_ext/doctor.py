"""Says in words whether an installation fits together: ``python -m tokenflow_ext.doctor``.

Each part is tried in a Python of its own, so that one that fails cannot hide another. The exit code
is 1 where the package cannot work, and 0 where something only limits what it can do.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

GOOD, LIMITED, BROKEN = "ok", "limited", "broken"


class Finding(NamedTuple):
    """One thing that was looked at: how it is (GOOD, LIMITED or BROKEN), and a line about it."""

    state: str
    text: str


def _numbers(version: str) -> tuple[int, ...]:
    """("2.13.0+cpu") -> (2, 13): zeros at the end say nothing."""
    release = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in release[0].split(".")] if release else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ask(code: str) -> tuple[Any, str]:
    """Runs a program in a Python of its own.

    Returns:
        (what it printed last, read as JSON, and ""), or (None, the last line of its error).
    """
    with tempfile.TemporaryDirectory() as folder:  # the working folder is searched for modules
        result = subprocess.run(
            [sys.executable, "-c", f"import json\n{code}"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines()
        return None, lines[-1] if lines else f"exit code {result.returncode}"
    return json.loads(result.stdout.splitlines()[-1]), ""


def check_torch(torch: dict[str, Any] | None, error: str) -> Finding:
    """Whether torch can be imported; its version is the library's to judge."""
    if torch is None:
        return Finding(BROKEN, f"torch cannot be imported: {error}")
    build = f"CUDA {torch['cuda']}" if torch["cuda"] else "without CUDA"
    return Finding(GOOD, f"torch {torch['version']}, {build}")


def check_library(build: dict[str, Any] | None, error: str) -> Finding:
    """Whether the compiled operators load and compute.

    Args:
        build: what `build_info` says. Where this Python has no facts, its message as "missing".
        error: what stands in the way, where `build` is None.
    """
    if build is None:
        return Finding(BROKEN, f"the compiled operators do not work: {error}")
    if "missing" in build:
        return Finding(LIMITED, build["missing"])
    cuda = f"CUDA {build['cuda']} kernels" if build["cuda"] else "no CUDA kernels"
    version = build["version"]
    text = f"tokenflow_ext {version}, operators built with torch {build['torch']}: CPU and {cuda}"
    return Finding(GOOD, text)


def check_cuda(torch: dict[str, Any], build: dict[str, Any]) -> list[Finding]:
    """What stands between the kernels and a GPU."""
    if torch["cuda"] is None or "missing" in build:
        return []
    if build["cuda"] is None:
        return [Finding(LIMITED, f"CUDA tensors are not supported: {build['cuda_reason']}")]
    found = []
    if _numbers(build["cuda"])[:1] != _numbers(torch["cuda"])[:1]:
        found.append(
            Finding(
                LIMITED,
                f"the kernels were compiled by nvcc {build['cuda']} and torch has CUDA "
                f"{torch['cuda']}: the driver has to support both",
            )
        )
    if not torch["devices"]:
        found.append(Finding(LIMITED, "torch sees no CUDA device: everything runs on the CPU"))
    return found


def check_torchvision(
    torch: str, version: str, requires: list[str], operators: bool | None, error: str
) -> Finding:
    """Whether torchvision fits torch.

    Args:
        torch, version: the versions of torch and of torchvision.
        requires: what torchvision says it needs.
        operators: whether its compiled operators load; None where it cannot even be imported.
    """
    if operators:
        return Finding(GOOD, f"torchvision {version}")
    pins = [re.match(r"torch ?\(?==([\w.]+)", line) for line in requires]
    made_for = next((pin[1] for pin in pins if pin), None)
    if made_for is not None and _numbers(made_for) != _numbers(torch):
        why = f"it was built for torch {made_for}, and this is {torch}: install a pair of one date"
    else:
        why = f"it was built for another build of torch than {torch}"
    if operators is None:
        return Finding(
            LIMITED,
            f"torchvision {version} cannot be imported ({error}): {why}. tokenflow_ext.models gets "
            "along without its operators; timm, lpips and open_clip alone do not",
        )
    return Finding(
        LIMITED,
        f"torchvision {version}'s compiled operators (nms and others) do not load: {why}. Nothing "
        "here calls them, and a stand-in lets timm, lpips and open_clip be imported",
    )


def check_extras(requires: list[str]) -> Iterator[Finding]:
    """Whether each optional part has its packages, by the package's own metadata."""
    extras: dict[str, list[str]] = {}
    for line in requires:
        name, _, marker = line.partition(";")
        match = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        if match and not name.startswith("tokenflow"):
            extras.setdefault(match[1], []).append(name.strip())
    for extra, names in extras.items():
        wrong = []
        for line in names:
            name = re.split(r"[^\w.-]", line)[0]
            version, least = _installed(name), re.search(r">=([\w.]+)", line)
            if version is None:
                wrong.append(f"no {name}")
            elif least and _numbers(version) < _numbers(least[1]):
                wrong.append(f"{name} {version}, older than {least[1]}")
        if not wrong:
            yield Finding(GOOD, f"extra {extra}: complete")
            continue
        yield Finding(
            LIMITED, f"extra {extra}: {', '.join(wrong)}: pip install 'tokenflow_ext[{extra}]'"
        )


def examine() -> Iterator[Finding]:
    """Everything, one after the other."""
    torch, error = _ask(
        "import torch\nprint(json.dumps(dict(version=torch.__version__, cuda=torch.version.cuda, "
        "devices=torch.cuda.is_available())))"
    )
    yield check_torch(torch, error)
    if torch is None:
        return
    build, error = _ask(
        "import torch, tokenflow_ext as t\n"
        "assert t.nearest_code(torch.eye(3), torch.eye(3)).tolist() == [0, 1, 2]\n"
        "try:\n"
        "    facts = t.build_info()\n"
        "except t.errors.BuildFactsMissingError as error:\n"
        "    facts = {'missing': str(error)}\n"
        "print(json.dumps(facts))"
    )
    yield check_library(build, error)
    if build is None:
        return
    yield from check_cuda(torch, build)
    version = _installed("torchvision")
    if version is not None:
        operators, error = _ask(
            "import torch, torchvision\n"
            "try:\n"
            "    torchvision.ops.nms(torch.ones(1, 4), torch.ones(1), 0.5)\n"
            "    print('true')\n"
            "except (NotImplementedError, RuntimeError):\n"
            "    print('false')"
        )
        requires = importlib.metadata.requires("torchvision") or []
        yield check_torchvision(torch["version"], version, requires, operators, error)
    yield from check_extras(importlib.metadata.requires("tokenflow_ext") or [])


def main() -> int:
    """Prints what was found; 1 where the package cannot work."""
    broken = False
    for state, text in examine():
        print(f"{state:>8}  {text}", flush=True)
        broken |= state == BROKEN
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
