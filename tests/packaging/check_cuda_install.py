"""Shows that the package installs beside a torch with CUDA; needs nvcc, and no GPU.

In a scratch environment with a CUDA torch (about 5.4 GB), this

1. runs ``pip install .`` with no flag, and shows that the CUDA kernels were compiled and linked;
2. imports the package and shows that every operator has a CPU and a CUDA kernel registered;
3. checks a small quantization against the reference in float64, on the CPU and on every GPU;
4. does 2 and 3 again with another library file, one that was built against another torch.

    python tests/packaging/check_cuda_install.py --library tokenflow_ext/libtokenflow_ops.so

pytest does not collect it: it downloads gigabytes. docs/guides/installation.md says more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Run by the scratch environment's interpreter; its last line is one of JSON.
PROBE = r"""
import json, torch, tokenflow_ext
from tokenflow_ext import MultiScaleQuantizer, reference

names = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("tokenflow_ext::"))
has = torch._C._dispatch_has_kernel_for_dispatch_key


def compare(device):
    torch.manual_seed(0)
    q = MultiScaleQuantizer(512, dims=(32, 8), scales=(1, 2, 4, 8), weights=(1.0, 0.5)).to(device)
    h = torch.randn(4, 40, 9, 10).to(device)
    with torch.no_grad():
        indices, decoded = q.encode(h), q.decode(q.encode(h), size=(9, 10))
        codebook = torch.cat(list(q.codebooks), dim=1).double()
        rows = reference.multiscale_rows(h.double(), codebook, indices, q.dims, q.scales)
        all_distances = reference.distances(rows.flatten(0, 1), codebook, q.dims, q.weights)
        chosen = all_distances.gather(1, indices.flatten()[:, None])[:, 0]
        excess = (chosen - all_distances.amin(1)).max().item()
        expected = reference.multiscale_decode(indices, codebook, q.dims, q.scales, (9, 10))
        error = ((decoded - expected).abs().max() / expected.abs().max()).item()
    assert indices.unique().numel() > 50, indices
    assert excess < 1e-5, f"chosen codes are {excess} further than the nearest"
    assert error < 1e-5, f"decoded features differ by {error}"
    return {"tokens": indices.numel(), "excess_distance": excess, "decode_error": error}


print(json.dumps({
    "gpus": torch.cuda.device_count(),
    "build_info": tokenflow_ext.build_info(),
    "kernels": {n: [key for key in ("CPU", "CUDA") if has(n, key)] for n in names},
    "cpu": compare("cpu"),
    "cuda": [compare(f"cuda:{i}") for i in range(torch.cuda.device_count())]
    if tokenflow_ext.build_info()["cuda"] and has(names[0], "CUDA") else [],
}))
"""


def run(command: list[str], **options: Any) -> None:
    """Runs a command with its output shown, and its time."""
    print(f"\n$ {' '.join(command)}", flush=True)
    start = time.monotonic()
    subprocess.run(command, check=True, **options)
    print(f"({time.monotonic() - start:.0f} s)", flush=True)


def probe(python: Path, folder: Path, package_path: Path | None = None) -> dict[str, Any]:
    """Runs PROBE away from the clone, so that it imports what was installed (or `package_path`)."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if package_path is not None:
        environment["PYTHONPATH"] = str(package_path)
    result = subprocess.run(
        [str(python), "-c", PROBE], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    if result.returncode != 0:
        raise SystemExit(f"FAILED: the installed package does not work (exit {result.returncode})")
    return json.loads(result.stdout.splitlines()[-1])


def require(condition: bool, what: str) -> None:
    print(f"{'ok    ' if condition else 'FAILED'} {what}", flush=True)
    if not condition:
        raise SystemExit(1)


def device_code_bytes(library: str) -> int:
    """Size of the CUDA machine code in a library."""
    output = subprocess.run(
        ["readelf", "-SW", library], check=True, capture_output=True, text=True
    ).stdout
    match = re.search(r"\.nv_fatbin\s+PROGBITS\s+\w+\s+\w+\s+(\w+)", output)
    return int(match[1], 16) if match else 0


def report(found: dict[str, Any], cuda: bool) -> None:
    """Prints and checks what a probe found; `cuda` says whether CUDA kernels must be there."""
    for key, value in found["build_info"].items():
        print(f"       {key}: {value}")
    kernels = found["kernels"]
    require(bool(kernels), f"{len(kernels)} operators are registered")
    for name, keys in kernels.items():
        wanted = ["CPU", "CUDA"] if cuda else ["CPU"]
        require(set(wanted) <= set(keys), f"{name}: {' and '.join(keys)}")
    require(True, f"on the CPU it agrees with the reference in float64: {found['cpu']}")
    for number, result in enumerate(found["cuda"]):
        require(True, f"on GPU {number} it agrees with the reference in float64: {result}")
    if cuda and not found["gpus"]:
        print("       no GPU here: the CUDA kernels are registered, and were not run")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--torch", default="torch", help="requirement of a CUDA torch [%(default)s: the newest]"
    )
    parser.add_argument(
        "--library", type=Path, help="libtokenflow_ops.so built against another torch"
    )
    parser.add_argument("--directory", type=Path, help="where to work; kept afterwards")
    arguments = parser.parse_args()
    library = None if arguments.library is None else arguments.library.resolve(strict=True)

    folder = arguments.directory or Path(tempfile.mkdtemp(prefix="tokenflow-cuda-"))
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    try:
        python = folder / "env" / "bin" / "python"
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        if not python.exists():
            run([sys.executable, "-m", "venv", str(folder / "env")])
        run([*pip, "install", "-q", arguments.torch])
        # -v shows what was decided and the compiler's lines; it is no flag of the build.
        run([*pip, "install", "-v", "."], cwd=ROOT)

        print("\n==> the package as installed")
        found = probe(python, folder)
        size = device_code_bytes(found["build_info"]["library"])
        require(
            size > 0, f"CUDA kernels were compiled and linked ({size >> 10} KiB of device code)"
        )
        report(found, cuda=True)

        if library is not None:
            print(f"\n==> the library of another build, {library}")
            where = "import tokenflow_ext, os; print(os.path.dirname(tokenflow_ext.__file__))"
            installed = subprocess.run(
                [str(python), "-c", where], cwd=folder, check=True, capture_output=True, text=True
            ).stdout.strip()
            overlay = folder / "overlay"
            shutil.rmtree(overlay, ignore_errors=True)
            shutil.copytree(installed, overlay / "tokenflow_ext")
            shutil.copy(library, overlay / "tokenflow_ext" / "libtokenflow_ops.so")
            # The facts belong to the library's own build, where its module lies beside it.
            for module in library.parent.glob("_build_info.*.so"):
                shutil.copy(module, overlay / "tokenflow_ext")
            found = probe(python, folder, overlay)
            info = found["build_info"]
            require(Path(info["library"]).parent.parent == overlay, "it is the one that was loaded")
            require(
                info["torch"] != info["torch_running"],
                f"built against torch {info['torch']}, runs under {info['torch_running']}",
            )
            report(found, cuda=info["cuda"] is not None)
    finally:
        if arguments.directory is None:
            shutil.rmtree(folder)
    print("\nall checks passed")


if __name__ == "__main__":
    main()
