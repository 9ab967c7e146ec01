"""The family's quantizers against their originals: `python -m benchmarks.family`.

Each row is one quantizer at a published size with random codes, forward, and forward with backward
in training. The other side is the original's own form (benchmarks/family_originals.py), or the
class of vector-quantize-pytorch where it has one. Every comparison checks that both choose the same
codes before it is timed. Writes table.md and results.json.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import vector_quantize_pytorch
from torch import Tensor

from benchmarks import comparison, family_originals
from benchmarks.memory import peak
from benchmarks.tables import Table
from benchmarks.timing import measure, seconds
from tokenflow_ext import Entropy, Quantizer, compat
from tokenflow_ext.codes import Table as Codes

Both = tuple[Callable[[], Any], Callable[[], Any]]


def _features(batch: int, channels: int, side: int, device: str, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(batch, channels, side, side, generator=generator).to(device)


def _quantizer(name: str, device: str, **changes: Any) -> Quantizer:
    torch.manual_seed(0)
    quantizer = Quantizer.preset(name, **changes)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.normal_(std=0.5)
    return quantizer.to(device)


def _calls(
    ours: Callable[[Tensor], Any], theirs: Callable[[Tensor], Any], h: Tensor, backward: bool
) -> Both:
    """Calls of both, with the gradients of quantized features and losses."""

    def call(function: Callable[[Tensor], Any]) -> Callable[[], Any]:
        def run() -> Any:
            x = h.detach().requires_grad_(backward)
            out = function(x)
            if backward:
                loss = out[2]
                total = sum(loss.values()) if isinstance(loss, dict) else loss
                (out[0].sum() + total.sum()).backward()
            return out

        return run

    return call(ours), call(theirs)


def _of_preset(
    quantizer: Quantizer, original: Callable[..., Any], h: Tensor, backward: bool, *more: Any
) -> Both:
    other = copy.deepcopy(quantizer)  # running means move each side's codes
    for module in (quantizer, other):
        module.train(backward)
    return _calls(quantizer, lambda x: original(other, x, *more), h, backward)


def unitok(device: str, backward: bool) -> Both:
    """8 codebooks of 4,096 x 8, 256 tokens, batch 8."""
    quantizer = _quantizer("unitok", device)
    return _of_preset(quantizer, family_originals.unitok, _features(8, 64, 16, device), backward)


def dualtoken(device: str, backward: bool) -> Both:
    """Two branches of 16,384 x 32, depth 8, 729 tokens, batch 2."""
    quantizer = _quantizer("dualtoken-384", device)
    averages = [
        (torch.zeros(16_384, device=device), torch.zeros(16_384, 32, device=device))
        for _ in range(2)
    ]
    h = _features(2, 64, 27, device)
    return _of_preset(quantizer, family_originals.dualtoken, h, backward, averages)


def ibq(device: str, backward: bool) -> Both:
    """65,536 x 256, 256 tokens, batch 2, with the entropy."""
    quantizer = _quantizer("ibq", device, groups=Codes(65_536, 256))
    h = _features(2, 256, 16, device, 0.05)
    return _of_preset(quantizer, family_originals.ibq, h, backward)


def infinity(device: str, backward: bool) -> Both:
    """32 signs at unit length, 13 scales to 64 x 64, batch 8, with the entropy a bit."""
    entropy = Entropy(0.1, temperature=0.01, factorized=True)
    quantizer = _quantizer("infinity-32", device, entropy=entropy)
    return _of_preset(quantizer, family_originals.infinity, _features(8, 32, 64, device), backward)


def _of_library(name: str, device: str, backward: bool, h: Tensor, **options: Any) -> Both:
    torch.manual_seed(0)
    ours = getattr(compat, name)(**options).to(device).train(backward)
    theirs = getattr(vector_quantize_pytorch, name)(**options).to(device).train(backward)

    def with_loss(module: torch.nn.Module) -> Callable[[Tensor], Any]:
        def run(x: Tensor) -> tuple[Tensor, ...]:
            out = tuple(module(x))
            return out if len(out) == 3 else (*out, out[0].new_zeros(()))

        return run

    return _calls(with_loss(ours), with_loss(theirs), h, backward)


def fsq(device: str, backward: bool) -> Both:
    """Levels 8, 8, 8, 6, 5, 256 tokens, batch 32."""
    h = torch.randn(32, 256, 5, generator=torch.Generator().manual_seed(0)).to(device)
    return _of_library("FSQ", device, backward, h, levels=[8, 8, 8, 6, 5])


def lfq(device: str, backward: bool) -> Both:
    """12 signs, 256 tokens, batch 32, with entropies and commitment."""
    h = torch.randn(32, 256, 12, generator=torch.Generator().manual_seed(0)).to(device)
    return _of_library(
        "LFQ", device, backward, h, codebook_size=4096, dim=12, commitment_loss_weight=0.25
    )


ROWS: dict[str, tuple[str, str, Callable[[str, bool], Both]]] = {
    "unitok": ("UniTok, 8 x 4,096 x 8, 256 tokens, batch 8", "own form", unitok),
    "dualtoken": (
        "DualToken-384, depth 8, two branches, 729 tokens, batch 2",
        "own form",
        dualtoken,
    ),
    "ibq": ("IBQ, 65,536 x 256, 256 tokens, batch 2", "own form", ibq),
    "infinity": ("Infinity, 32 signs, 13 scales, batch 8, with entropy", "own form", infinity),
    "fsq": ("FSQ, 8 8 8 6 5, 256 tokens, batch 32", "vector-quantize-pytorch", fsq),
    "lfq": ("LFQ, 12 signs, 256 tokens, batch 32", "vector-quantize-pytorch", lfq),
}


def compare(name: str, device: str, rounds: int, backward: bool) -> dict[str, Any]:
    """One row of the table."""
    what, other, make = ROWS[name]
    ours, theirs = make(device, backward)
    with torch.set_grad_enabled(backward):
        mine, others = ours()[1], theirs()[1]
        differ = int((mine != others).sum())
        if differ > 0.02 * mine.numel():
            raise RuntimeError(f"{what}: {differ} of {mine.numel()} indices differ")
        quick = seconds(theirs) < 0.01  # noise is of the same length for all
        found = measure({"original": theirs, "ours": ours}, 20 * rounds if quick else rounds)
        memory = {"ours": peak(ours, device), "theirs": peak(theirs, device)}
    return {
        "row": name,
        "what": what + (", forward and backward" if backward else ", forward"),
        "other": other,
        "agreement": f"{differ} of {mine.numel()} indices differ",
        **found,
        "memory": memory,
    }


def as_markdown(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The table, and what made it."""
    cells = [
        {
            "": row["what"],
            "original": f"{1e3 * row['theirs']:.1f} ms",
            "ours": f"{1e3 * row['ours']:.1f} ms",
            "original / ours": f"{row['ratio']:.2f}",
            "peak memory, ours / original": comparison.memory(row, digits=1),
            "agreement": row["agreement"],
            "rounds": str(row["rounds"]),
        }
        for row in rows
    ]
    lines = Table("", cells, "").lines()
    lines += [
        "",
        "- the original's own form is re-derived in benchmarks/family_originals.py; FSQ and LFQ "
        f"stand beside vector-quantize-pytorch {facts['vector-quantize-pytorch']}",
        f"- random codes and features, float32; {comparison.place(facts)}",
        *comparison.ending(facts),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    given = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.family",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=tuple(ROWS), help="[all]")
    parser.add_argument(
        "--rounds", type=int, default=5, help="20 times as many below 10 ms [%(default)s]"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="[cpu]")
    parser.add_argument("--out", type=Path, default=Path("runs/family"), metavar="DIR")
    known = parser.parse_args(given)
    if known.rounds < 1:
        parser.error("--rounds must be 1 or more")
    shared, device = comparison.training_facts(), known.device
    rows: list[dict[str, Any]] = []
    for name in known.rows:
        for backward in (False, True):
            rows.append(compare(name, device, known.rounds, backward))
            facts = comparison.now(
                shared,
                [],
                **comparison.where(shared, device),
                command=shlex.join(["python", "-m", "benchmarks.family", *given]),
                **{"vector-quantize-pytorch": version("vector-quantize-pytorch")},
            )
            comparison.write(known.out, as_markdown(rows, facts), facts, rows)
    print((known.out / "table.md").read_text())


if __name__ == "__main__":
    main()
