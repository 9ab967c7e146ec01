"""VAR against its released algorithm: `python -m benchmarks.var`.

Four comparisons in one run, at the released sizes with random weights: generation, the tokenizer's
quantizer, a training step, and the attention of one of its layers. The other side is re-derived in
benchmarks/var_released.py. Every comparison checks that both give the same before it is timed.
Writes table.md and results.json.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import comparison, var_released
from benchmarks.memory import peak
from benchmarks.tables import Table
from benchmarks.timing import Calls, measure
from tokenflow_ext.models import (
    VAR,
    PixelConfig,
    QuantizerConfig,
    SemanticConfig,
    TokenFlowTokenizer,
    TokenizerConfig,
    TowerConfig,
    VarConfig,
)
from tokenflow_ext.models.var.transformer import attend_by_scale
from tokenflow_ext.sampler import SamplingConfig
from tokenflow_ext.var import VarQuantizer


def build(depth: int, device: str) -> VAR:
    """VAR of the paper's shape over its tokenizer's codes; the decoder takes no part."""
    torch.manual_seed(0)
    pixel = PixelConfig(
        channels=8, multipliers=(1,), res_blocks=1, z_channels=32, groups=4, code_dim=32
    )
    quantizer = QuantizerConfig(4096, VarConfig().scales, l2_norm=False, kind="var")
    semantic = SemanticConfig(tower=TowerConfig("none"))
    config = TokenizerConfig(16, pixel, semantic, quantizer, teacher=TowerConfig("none"))
    tokenizer = TokenFlowTokenizer(config)
    with torch.no_grad():
        tokenizer.quantizer.codebooks[0].normal_()
    model = VAR(VarConfig(depth=depth, class_drop=0.0, drop_path=0.0), tokenizer)
    with torch.no_grad():
        for block in model.blocks:  # gates of a trained model's size, so that blocks say something
            block.ada_lin[1].weight.normal_(std=0.02)
        model.head.weight.mul_(50)
    return model.to(device)


def generation(model: VAR, batch: int, rounds: int) -> dict[str, Any]:
    """Classes to tokens, guidance 1.5, top-k 900, top-p 0.96."""
    model.eval()
    device = model.device
    labels = torch.arange(batch, device=device)
    graphs = device.type == "cuda"
    likeliest = SamplingConfig(top_k=(1,), top_p=(0.0,), guidance=1.5)
    ours = model.generate_tokens(labels, sampling=likeliest, seed=0, cuda_graphs=graphs)
    theirs = var_released.generate_tokens(model, labels, 1.5, var_released.greedy)
    differ = int((ours != theirs).sum())
    draw = var_released.sample(900, 0.96, torch.Generator(device).manual_seed(0))
    calls: Calls = {
        "released": lambda: var_released.generate_tokens(model, labels, 1.5, draw),
        "ours": lambda: model.generate_tokens(labels, seed=0, cuda_graphs=graphs),
    }
    return {
        "what": f"generation, batch {batch}",
        "agreement": f"{differ} of {ours.numel()} greedy tokens differ",
        **measure(calls, rounds),
    }


def quantizer(device: str, rounds: int, backward: bool) -> dict[str, Any]:
    """The quantizer of ch160v4096z32 on features of 8 images."""
    torch.manual_seed(0)
    module = VarQuantizer(4096, 32, VarConfig().scales, phi_ratio=0.5, phi_shared=4).to(device)
    with torch.no_grad():
        module.codebooks[0].normal_()
    module.train(backward)
    features = torch.randn(8, 32, 16, 16, device=device, requires_grad=backward)

    def ours() -> Any:
        out = module(features)
        if backward:
            (out.quantized.sum() + out.vq_loss + out.commitment_loss).backward()
        return out

    def theirs() -> Any:
        out = var_released.quantize(module, features)
        if backward:
            (out[0].sum() + out[2]).backward()
        return out

    with torch.set_grad_enabled(backward):
        differ = int((ours().indices != theirs()[1]).sum())
        found = measure({"released": theirs, "ours": ours}, rounds)
        memory = {"ours": peak(ours, device), "theirs": peak(theirs, device)}
    return {
        "what": f"quantizer, batch 8, forward{' and backward' * backward}",
        "agreement": f"{differ} of {8 * module.num_tokens} tokens differ",
        **found,
        "memory": memory,
    }


def _masked(fused: bool) -> str:
    """How the other side attends, in a row's name."""
    return "against a mask " + ("in fused attention" if fused else "with the scores written out")


def attention(model: VAR, batch: int, rounds: int, fused: bool) -> dict[str, Any]:
    """A layer's attention of a step of training, forward and backward, without its linear layers.

    Args:
        fused: see `training`.
    """
    own, device = model.blocks[0].attn, model.device
    mask = var_released.causal_mask(model)
    ends = list(itertools.accumulate(side * side for side in model.config.scales))
    generator = torch.Generator().manual_seed(0)
    channels = model.config.channels // own.heads
    shape = (batch, own.heads, ends[-1], channels)
    query, key, value, grad = (torch.randn(shape, generator=generator).to(device) for _ in range(4))
    given = (4 * F.normalize(query, dim=-1), F.normalize(key, dim=-1), value)
    for tensor in given:
        tensor.requires_grad_()

    def ours() -> Any:
        out = attend_by_scale(*given, ends, own.softmax_scale)
        return out, *torch.autograd.grad(out, given, grad)

    def theirs() -> Any:
        out = var_released.attend(*given, mask, fused)
        return out, *torch.autograd.grad(out, given, grad)

    differences = [(a - b).abs().max().item() for a, b in zip(ours(), theirs(), strict=True)]
    found = measure({"released": theirs, "ours": ours}, rounds)
    memory = {"ours": peak(ours, device.type), "theirs": peak(theirs, device.type)}
    return {
        "what": f"attention of a layer, batch {batch}, forward and backward, {_masked(fused)}",
        "agreement": f"outputs and gradients differ by {max(differences):.1e} at most",
        **found,
        "memory": memory,
    }


def training(model: VAR, batch: int, rounds: int, fused: bool) -> dict[str, Any]:
    """A step of training, forward and backward.

    Args:
        fused: whether the other side gives its mask to torch's fused attention.
    """
    model.train()
    device = model.device
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(batch, device=device)
    tokens = torch.randint(4096, (batch, 680), generator=generator).to(device)

    def step(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            model.zero_grad(set_to_none=True)
            value = loss()
            value.backward()
            return value

        return run

    ours = step(lambda: model(labels, tokens).loss)
    theirs = step(lambda: var_released.training_loss(model, labels, tokens, fused))
    difference = abs(ours().item() - theirs().item())
    found = measure({"released": theirs, "ours": ours}, rounds)
    memory = {}
    for name, call in (("ours", ours), ("theirs", theirs)):
        model.zero_grad(set_to_none=True)
        gc.collect()
        memory[name] = peak(call, device.type)
    return {
        "what": f"training step, batch {batch}, {_masked(fused)}",
        "agreement": f"losses differ by {difference:.1e}",
        **found,
        "memory": memory,
    }


def as_markdown(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The table, and what made it."""
    cells = [
        {
            "": row["what"],
            "released form": f"{row['theirs']:.3f} s",
            "ours": f"{row['ours']:.3f} s",
            "released / ours": f"{row['ratio']:.2f}",
            "peak memory, ours / released": comparison.memory(row, digits=0),
            "agreement": row["agreement"],
            "rounds": str(row["rounds"]),
        }
        for row in rows
    ]
    lines = Table("", cells, "").lines()
    lines += [
        "",
        f"- VAR d{facts['depth']}, random weights, float32; the released form is re-derived in "
        "benchmarks/var_released.py",
        f"- {comparison.place(facts)}",
        *comparison.ending(facts),
    ]
    return "\n".join(lines) + "\n"


PARTS = ("attention", "generation", "quantizer", "training")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    given = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.var",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="[all]")
    parser.add_argument("--depth", type=int, default=16, help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="[cpu]")
    parser.add_argument("--out", type=Path, default=Path("runs/var-benchmark"), metavar="DIR")
    known = parser.parse_args(given)
    if known.rounds < 1 or known.depth < 1:
        parser.error("--rounds and --depth must be 1 or more")
    shared, device = comparison.training_facts(), known.device
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        facts = comparison.now(
            shared,
            [],
            depth=known.depth,
            **comparison.where(shared, device),
            command=shlex.join(["python", "-m", "benchmarks.var", *given]),
        )
        comparison.write(known.out, as_markdown(rows, facts), facts, rows)

    if "quantizer" in known.parts:
        for backward in (False, True):
            add(quantizer(device, max(known.rounds, 10), backward))
    if {"attention", "generation", "training"} & set(known.parts):
        model = build(known.depth, device)
        if "attention" in known.parts:
            for fused in (True, False):
                add(attention(model, 2, max(known.rounds, 10), fused))
        if "training" in known.parts:
            for fused in (True, False):
                add(training(model, 2, known.rounds, fused))
        model.zero_grad(set_to_none=True)
        if "generation" in known.parts:
            for batch in (1, 8):
                add(generation(model, batch, known.rounds))
    print((known.out / "table.md").read_text())


if __name__ == "__main__":
    main()
