"""How many codes: `torchrun --nproc-per-node 2 -m benchmarks.codebook_size`.

Figure 6 of arXiv 2412.03069 in small. For each size of the codebook it trains the tokenizer of
easy-VQA's pictures, then VAR over its tokens, for the same steps, and measures reconstructions and
drawings: codes in use, PSNR, Frechet distances, and how many drawings show their class. Writes
table.md, results.json and codebook_size.png after each row. What is finished in the folder is kept,
what was broken off is continued.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import comparison, machine
from benchmarks.comparison import RESULT
from benchmarks.tables import Table
from tokenflow_ext.errors import TokenFlowError
from tokenflow_ext.train import tokenizer, var
from tokenflow_ext.train.cli.commands.tokenize import tokenize
from tokenflow_ext.train.config import TrainConfig, VarTrainConfig, load_config, load_var_config
from tokenflow_ext.train.data import easy_vqa
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import Processes, processes
from tokenflow_ext.train.evaluation import drawings, evaluate, picture_sets
from tokenflow_ext.train.tasks.image_generator import ClassImageGenerator

CONFIGS = machine.ROOT / "train" / "configs"
SIZES = (512, 1024, 2048, 4096, 8192, 16384)
QUIET = ("output.tensorboard=no", "output.progress=no", "output.keep=1")


def configurations(
    size: int, out: Path, steps: int, tokenizer_steps: int, overrides: Sequence[str]
) -> tuple[TrainConfig, VarTrainConfig]:
    """The two runs of a row; what the command line sets is VAR's."""
    data = out / "easy-vqa"
    first = load_config(
        CONFIGS / "easy_vqa_tokenizer.yaml",
        [
            f"run={out / f'tokenizer_{size}'}",
            f"data.path={data / 'train'}",
            f"optim.steps={tokenizer_steps}",
            f"model.quantizer.codebook_size={size}",
            *comparison.once_at_the_end(tokenizer_steps),
            *QUIET,
        ],
    )
    second = load_var_config(
        CONFIGS / "easy_vqa_var.yaml",
        [
            f"run={out / f'var_{size}'}",
            f"tokenizer={first.run}",
            f"data.path={out / f'tokens_{size}'}",
            f"data.held_out={out / f'tokens_test_{size}'}",
            f"optim.steps={steps}",
            *comparison.once_at_the_end(steps),
            *QUIET,
            *overrides,
        ],
    )
    return first, second


def _npz(pictures: Any, file: Path) -> Path:
    np.savez(file, pictures)
    return file


def run_row(
    size: int, configs: tuple[TrainConfig, VarTrainConfig], each: int, out: Path, group: Processes
) -> dict[str, Any]:
    """Train and measure a row, or read what an earlier call found."""
    first, second = configs
    data, run = out / "easy-vqa", Path(second.run)
    if not (run / RESULT).is_file():
        if not (Path(first.run) / "summary.json").is_file():
            tokenizer.train(first, group, resume=True)
        with group.together():
            if group.first:
                tokenize(str(data / "train"), first.run, second.data.path)
                tokenize(str(data / "test"), first.run, str(second.data.held_out))
        group.wait()
        measured = evaluate.run(
            first.run, str(data / "test"), f"{first.run}/evaluation", group, overwrite=True
        )
        summary = var.train(second, group, resume=True)
        with group.together():
            if group.first:
                assert measured is not None  # the first process has it
                facts = _measured(size, measured, summary, second, each, data, run)
                checkpoint.write_text(run / RESULT, json.dumps(facts, indent=2) + "\n")
        group.wait()
    return json.loads((run / RESULT).read_text())


def _measured(
    size: int,
    measured: dict[str, Any],
    summary: dict[str, Any],
    config: VarTrainConfig,
    each: int,
    data: Path,
    run: Path,
) -> dict[str, Any]:
    generator = ClassImageGenerator.load(config.run, batch=64)
    report, drawn = drawings.evaluate(
        config.run, generator, str(data / "train"), str(data / "test"), each=each
    )
    real, _ = drawings.read_pairs(data / "test", generator.model.tokenizer.config.image_size)
    levels = ((real + 1) * 127.5).round().byte()
    files = [
        _npz(images.permute(0, 2, 3, 1).numpy(), run / f"{name}.npz")
        for name, images in (("drawn", drawn.images), ("real", levels))
    ]
    distance, definition = picture_sets.compare(*files)
    figures = measured["figures"]
    (distance_name,) = distance
    return {
        "codes": size,
        "usage": figures["usage"],
        "perplexity": figures["perplexity"],
        "psnr": figures["psnr"],
        "reconstruction distance": figures["rfid" if distance_name == "fid" else distance_name],
        "drawing distance": distance[distance_name],
        "distance": definition,
        "class": report["drawings"]["captions of training"]["as asked for"]["all"],
        "ceiling": report["judge"]["reconstructed"]["all"],
        "diversity": report["diversity"],
        "drawings": len(drawn.prompts),
        "steps": summary["steps"],
        "seconds": summary["seconds"],
    }


def as_markdown(results: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The table, and what made it."""
    rows = [
        {
            "codes": f"{row['codes']:,}",
            "in use": f"{row['usage']:.1%}",
            "perplexity": f"{row['perplexity']:.0f}",
            "PSNR, dB": f"{row['psnr']:.2f}",
            "distance of reconstructions": f"{row['reconstruction distance']:.3f}",
            "distance of drawings": f"{row['drawing distance']:.3f}",
            "drawings of their class": f"{row['class']:.1%}",
            "reconstructions of their class": f"{row['ceiling']:.1%}",
        }
        for row in results
    ]
    first = results[0]
    lines = [
        *Table("", rows, "").lines(),
        "",
        f"- easy-VQA's 24 classes; {facts['tokenizer_steps']} steps of the tokenizer, "
        f"{first['steps']} of VAR, one seed, {first['drawings']} drawings"
        + "".join(f"; {override}" for override in facts["overrides"]),
        f"- distances of and to the test pictures: {first['distance']}",
        "- the class is judged by a classifier trained on the real pictures; reconstructions of "
        "test pictures are its ceiling",
        f"- {facts['device']['cpu']}, {facts['processes']} process(es) of {facts['cores']} cores; "
        f"load average before {facts['load before'][0]:.1f}, after {facts['load after'][0]:.1f}",
        *comparison.ending(facts),
    ]
    return "\n".join(lines) + "\n"


def plot(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Four figures by the number of codes."""
    from benchmarks.plots import OURS, plt  # needs matplotlib

    panels = (
        ("usage", "codes in use", 100, "%"),
        ("psnr", "PSNR of reconstructions", 1, "dB"),
        ("drawing distance", "Frechet distance of drawings", 1, ""),
        ("class", "drawings of their class", 100, "%"),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 2.6), layout="constrained")
    sizes = [row["codes"] for row in results]
    for axis, (key, title, factor, unit) in zip(axes, panels, strict=True):
        axis.plot(sizes, [factor * row[key] for row in results], marker="o", color=OURS)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45)
        axis.set_title(title + (f", {unit}" if unit else ""))
        axis.set_xlabel("codes")
    figure.savefig(file)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    given = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.codebook_size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="key=value sets a key of VAR's training configuration in every row.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=SIZES, metavar="K", help="[%(default)s]"
    )
    parser.add_argument("--steps", type=int, default=1000, help="of VAR [%(default)s]")
    parser.add_argument(
        "--tokenizer-steps", type=int, default=700, help="of a tokenizer [%(default)s]"
    )
    parser.add_argument("--each", type=int, default=20, help="drawings a class [%(default)s]")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/codebook-size"),
        metavar="DIR",
        help="[%(default)s]",
    )
    known, overrides = parser.parse_known_args(given)
    if min(known.sizes) < 1 or known.each < 1:
        parser.error("--sizes and --each must be 1 or more")
    out, command = known.out, shlex.join(["python", "-m", "benchmarks.codebook_size", *given])
    try:
        # Before anything trains: an error in one of them is seen now.
        configs = [
            configurations(size, out, known.steps, known.tokenizer_steps, overrides)
            for size in known.sizes
        ]
        with processes("cpu") as group:
            shared = comparison.training_facts()
            with group.together():
                if group.first:
                    easy_vqa.fetch(out / "easy-vqa")
            group.wait()
            results: list[dict[str, Any]] = []
            for size, pair in zip(known.sizes, configs, strict=True):
                results.append(run_row(size, pair, known.each, out, group))
                facts = comparison.now(
                    shared,
                    overrides,
                    processes=group.world,
                    command=command,
                    tokenizer_steps=known.tokenizer_steps,
                )
                if group.first:
                    comparison.write(out, as_markdown(results, facts), facts, results)
                    plot(results, out / "codebook_size.png")
            if group.first:
                print((out / "table.md").read_text())
                print(f"{out / 'table.md'}, results.json, codebook_size.png")
    except TokenFlowError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
