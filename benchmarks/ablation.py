"""Ablations of the tokenizer: `python -m benchmarks.ablation [key=value ...]`.

Trains each row for the same few steps on the photographs that ship inside scikit-image and
scikit-learn, measures it with `tokenflow evaluate` on crops of held-out bands, and writes one table
as Markdown, JSON and CSV. A row that is finished in the folder is kept, a broken-off one continued.
docs/guides/ablation.md says what the rows are and what such a table can show.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks import comparison, machine
from benchmarks.comparison import RESULT
from benchmarks.tables import Table
from tokenflow_ext import Quantizer
from tokenflow_ext.models import CheckpointError, ConfigError, TokenFlowTokenizer, WeightsError
from tokenflow_ext.train import data, tokenizer
from tokenflow_ext.train.config import TrainConfig, load_config
from tokenflow_ext.train.data.image_files import to_pixels
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.engine.runs import CONFIG_FILE
from tokenflow_ext.train.evaluation import evaluate

CONFIGS = machine.ROOT / "train" / "configs" / "ablation"

#: What every row has in common, besides steps and seed. k-means is short: with 131,072 codes the
#: demonstration's 20 assignments would take longer than the training.
FIXED = (
    "optim.batch=8",
    "codebook.kmeans_batches=8",
    "codebook.kmeans_iterations=3",
    "output.tensorboard=no",
    "output.progress=no",
    "output.keep=1",
)


@dataclass(frozen=True)
class Row:
    """A row of the table: `file` in train/configs/ablation over the preset `tiny`."""

    name: str
    label: str
    group: str
    file: str | None = None
    overrides: tuple[str, ...] = ()


BASELINES, TABLE_5, SIZES = "Tokenizers", "Design (rows of Table 5)", "Codebook sizes"
FAMILY = "Other codes at equal bits"
ROWS = {
    row.name: row
    for row in (
        Row("vqgan", "VQGAN", BASELINES, "vqgan.yaml"),
        Row("rqvae", "RQ-VAE", BASELINES, "rqvae.yaml"),
        Row("var", "VAR", BASELINES, "var.yaml"),
        Row("vqkd", "VQKD", BASELINES, "vqkd.yaml"),
        Row("tokenflow", "TokenFlow", BASELINES),
        Row("semantic_codebook", "one semantic codebook", TABLE_5, "semantic_codebook.yaml"),
        Row("shared_mapping", "+ shared mapping", TABLE_5, "shared_mapping.yaml"),
        Row("msvq", "+ MSVQ", TABLE_5, "msvq.yaml"),
        Row("teacher_start", "+ teacher's weights at the start", TABLE_5, "teacher_start.yaml"),
        Row("one_index", "TokenFlow: one index, eight scales", FAMILY),
        Row("groups", "eight groups (UniTok)", FAMILY, "../family/tiny_groups.yaml"),
        Row("depth", "two branches, depth 4 (DualToken)", FAMILY, "../family/tiny_depth.yaml"),
        Row("signs", "32 signs (BSQ)", FAMILY, "../family/tiny_signs.yaml"),
    )
}
CODEBOOK_SIZES = (4096, 16384, 131072)  # the row `tokenflow` has 1,024


def size_row(size: int) -> Row:
    """TokenFlow with another codebook."""
    override = f"model.quantizer.codebook_size={size}"
    return Row(f"codes_{size}", f"{size:,} codes", SIZES, overrides=(override,))


def configuration(
    row: Row, out: Path, steps: int, overrides: Sequence[str], seed: int = 0
) -> TrainConfig:
    """The run of a row and seed. What the command line sets holds for every row."""
    every = [f"output.{kind}_every={steps}" for kind in ("eval", "picture")]
    common = [f"seed={seed}", *FIXED, f"optim.steps={steps}", *every, "output.checkpoint_every=100"]
    path = None if row.file is None else (CONFIGS / row.file).resolve()
    folder = out / (row.name if seed == 0 else f"{row.name}-seed{seed}")
    return load_config(path, [*common, *row.overrides, *overrides, f"run={folder}"])


def write_held_out(config: TrainConfig, folder: Path) -> None:
    """The held-out crops of a run as 8-bit PNG files, named by their number."""
    _, held_out = data.split(config.data)
    crops = data.held_out_crops(held_out, config.model.image_size, config.data.held_out_crops)
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(to_pixels(crops)):
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")


def run_row(row: Row, config: TrainConfig, held_out: Path, group: Processes) -> dict[str, Any]:
    """Train and evaluate a row, or read what an earlier call found.

    Raises:
        ConfigError: the folder holds a run of other settings.
        CheckpointError, DataError, WeightsError: see `tokenflow train` and `tokenflow evaluate`.
    """
    run = Path(config.run)
    saved = run / CONFIG_FILE
    if saved.is_file() and load_config(saved) != config:
        raise ConfigError(f"{run} holds a run of other settings: choose another --out")
    result = run / RESULT
    if not result.is_file():
        summary = tokenizer.train(config, group, resume=True)
        out = str(run / "evaluation")  # an evaluation there is of a call that was broken off
        measured = evaluate.run(str(run), str(held_out), out, group, overwrite=True)
        facts = _facts(run, summary, measured)
        checkpoint.write_text(result, json.dumps(facts, indent=2) + "\n")
    found = json.loads(result.read_text(encoding="utf-8"))
    return {"name": row.name, "label": row.label, "group": row.group, "seed": config.seed, **found}


def _facts(run: Path, summary: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    model = TokenFlowTokenizer.from_pretrained(checkpoint.find(run))
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    trained = [line["usage"] for line in lines if line["kind"] == "train"]
    return {
        **measured["figures"],
        "usage_in_training": trained[-1],
        "codebook_size": model.quantizer.num_codes,
        "tokens": model.quantizer.num_tokens,
        "bits": _bits(model),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "codebook_parameters": sum(p.numel() for p in model.quantizer.codebooks),
        "steps": summary["steps"],
        "images": summary["images"],
        "seconds": summary["seconds"],
        "data_sha256": measured["data"]["sha256"],
    }


def _bits(model: TokenFlowTokenizer) -> float:
    """Information of an image's tokens."""
    quantizer = model.quantizer
    if isinstance(quantizer, Quantizer):
        return quantizer.bits_per_image
    return quantizer.num_tokens * math.log2(quantizer.codebook_size)


#: Columns: (key of a result, heading, format).
COLUMNS = (
    ("psnr", "PSNR, dB", "{:.2f}"),
    ("ssim", "SSIM", "{:.3f}"),
    ("rfid", "rFID", "{:.2f}"),
    ("fd_efflite0", "FD-EffLite0", "{:.3f}"),
    ("cosine", "cosine", "{:.3f}"),
    ("codebook_size", "codes", "{:,.0f}"),
    ("usage", "used, held out", "{:.1%}"),
    ("usage_in_training", "used, training", "{:.1%}"),
    ("perplexity", "perplexity", "{:.0f}"),
    ("tokens", "places", "{:.0f}"),
    ("bits", "bits", "{:,.0f}"),
    ("trained_parameters", "trained, M", "{:.2f}"),
    ("codebook_parameters", "of it codes, M", "{:.2f}"),
    ("seconds", "s", "{:.0f}"),
)
_MILLIONS = ("trained_parameters", "codebook_parameters")


def as_tables(results: Sequence[dict[str, Any]]) -> list[Table]:
    """A table for each group of rows; a column that no row has a value for is left out. Of several
    seeds it has the mean, and the deviation where there is one."""
    columns = [c for c in COLUMNS if any(result.get(c[0]) is not None for result in results)]
    tables = []
    for group in dict.fromkeys(result["group"] for result in results):
        rows = []
        of_group = [result for result in results if result["group"] == group]
        for label in dict.fromkeys(result["label"] for result in of_group):
            seeds = [result for result in of_group if result["label"] == label]
            cells = {"": label}
            for key, heading, form in columns:
                cells[heading] = _cell([result.get(key) for result in seeds], key, form)
            rows.append(cells)
        tables.append(Table(group, rows, ""))
    return tables


def _cell(found: Sequence[float | None], key: str, form: str) -> str:
    values = [value / 1e6 if key in _MILLIONS else value for value in found if value is not None]
    if not values:
        return "-"
    mean = form.format(statistics.mean(values))
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean} ± {form.format(deviation)}" if deviation else mean


def as_csv(results: Sequence[dict[str, Any]]) -> str:
    """Every value at full precision, a line a row; nothing where there is none."""
    names = ["group", "name", "label", "seed", *(key for key, _, _ in COLUMNS), "steps", "images"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    return text.getvalue()


def as_markdown(results: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The tables, and what made them."""
    lines = []
    for table in as_tables(results):
        lines += [f"## {table.title}", "", *table.lines(), ""]
    first = results[0]
    lines += [
        f"- {first['steps']} steps, {first['images']:,} crops each, "
        f"{len({result['seed'] for result in results})} seed(s); {' '.join(FIXED)}"
        + "".join(f" {override}" for override in facts["overrides"]),
        f"- {facts['device']['cpu']}, {facts['threads']} thread(s) of {facts['cores']} cores; "
        f"load average before {facts['load before'][0]:.1f}, after {facts['load after'][0]:.1f}",
        *comparison.ending(facts),
    ]
    return "\n".join(lines) + "\n"


def run(
    rows: Sequence[Row],
    out: Path,
    steps: int,
    overrides: Sequence[str],
    command: str,
    seeds: int = 1,
) -> list[dict[str, Any]]:
    """Every row, one after the other; writes table.md, results.json and results.csv.

    After each row, so that a broken-off run leaves those that are done.
    """
    group = Processes(0, 1, torch.device("cpu"))
    # Before the first of them trains: an error in the last is seen now.
    configs = [
        (row, configuration(row, out, steps, overrides, seed))
        for seed in range(seeds)
        for row in rows
    ]
    shared = comparison.training_facts()
    held_out = out / "held_out"
    if not held_out.exists():
        write_held_out(configs[0][1], held_out)
    results = []
    for row, config in configs:
        results.append(run_row(row, config, held_out, group))
        facts = comparison.now(shared, overrides, threads=torch.get_num_threads(), command=command)
        checkpoint.write_text(out / "results.csv", as_csv(results))
        comparison.write(out, as_markdown(results, facts), facts, results, fixed=FIXED)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    given = sys.argv[1:] if argv is None else list(argv)
    parser = comparison.row_parser("benchmarks.ablation", __doc__, ROWS)
    parser.add_argument(
        "--codebook-sizes",
        nargs="*",
        type=int,
        default=CODEBOOK_SIZES,
        metavar="K",
        help="further rows, TokenFlow with other codebooks [%(default)s]",
    )
    parser.add_argument("--steps", type=int, default=250, help="optimizer steps [%(default)s]")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each row [%(default)s]")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/ablation"), metavar="DIR", help="[%(default)s]"
    )
    known, overrides = parser.parse_known_args(given)
    rows = [ROWS[name] for name in known.rows] + [size_row(k) for k in known.codebook_sizes]
    if not rows:
        parser.error("no row: name some with --rows or --codebook-sizes")
    if known.seeds < 1:
        parser.error("--seeds must be 1 or more")
    command = shlex.join(["python", "-m", "benchmarks.ablation", *given])
    try:
        run(rows, known.out, known.steps, overrides, command, known.seeds)
    except (CheckpointError, ConfigError, WeightsError, data.DataError) as error:
        sys.exit(f"error: {error}")
    print((known.out / "table.md").read_text())
    print(f"{known.out / 'table.md'}, results.json, results.csv")


if __name__ == "__main__":
    main()
