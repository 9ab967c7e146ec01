"""What a language model reads, compared: `torchrun --nproc-per-node 2 -m benchmarks.understanding`.

Trains the understanding demonstration with each kind of features (table 8 of arXiv 2412.03069) and
over each kind of tokenizer (table 1), for the same few steps and with several seeds, and writes one
table of exact matches as Markdown and JSON. What is finished in the folder is kept, what was broken
off is continued. docs/guides/understanding.md says what such a table can show.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import comparison, machine
from benchmarks.comparison import RESULT
from benchmarks.tables import Table
from tokenflow_ext.errors import TokenFlowError
from tokenflow_ext.train import tokenizer, understanding
from tokenflow_ext.train.cli.commands.tokenize import tokenize
from tokenflow_ext.train.config import (
    UnderstandingConfig,
    load_config,
    load_understanding_config,
)
from tokenflow_ext.train.data import easy_vqa
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import Processes, processes

CONFIGS = machine.ROOT / "train" / "configs"
INPUTS, KINDS = "Inputs (table 8)", "Tokenizers (table 1)"


@dataclass(frozen=True)
class Row:
    """A row: the tokenizer (one of ``TOKENIZERS``) and the features that are read of it."""

    name: str
    label: str
    group: str
    tokenizer: str
    features: str


ROWS = {
    row.name: row
    for row in (
        Row("full", "full", INPUTS, "joint", "full"),
        Row("residual", "residual", INPUTS, "joint", "residual"),
        Row("semantic", "last, semantic channels", INPUTS, "joint", "semantic"),
        Row("last", "last", INPUTS, "joint", "last"),
        Row("semantic_alone", "semantic codebook alone", KINDS, "semantic", "last"),
        Row("pixel_alone", "pixel codebook alone", KINDS, "pixel", "last"),
        Row("joint", "both (the row last)", KINDS, "joint", "last"),
        Row("continuous", "both, before quantization", KINDS, "joint", "continuous"),
    )
}
#: What is changed of the demonstration's tokenizer.
TOKENIZERS: dict[str, tuple[str, ...]] = {
    "joint": (),
    "semantic": ("model.pixel.enabled=no",),
    "pixel": ("model.semantic.tower.kind=none", "model.teacher.kind=none"),
}
QUIET = ("output.tensorboard=no", "output.progress=no", "output.keep=1")


def train_tokenizer(name: str, out: Path, steps: int, group: Processes) -> None:
    """Train one of the tokenizers and write the pictures' tokens, where that has not been done."""
    run, data = out / f"tokenizer_{name}", out / "easy-vqa"
    often = comparison.once_at_the_end(steps)
    config = load_config(
        CONFIGS / "easy_vqa_tokenizer.yaml",
        [f"run={run}", f"data.path={data / 'train'}", f"optim.steps={steps}", *often, *QUIET,
         *TOKENIZERS[name]],
    )  # fmt: skip
    if not (run / "summary.json").is_file():
        tokenizer.train(config, group, resume=True)
    with group.together():
        if group.first:
            tokenize(str(data), str(run), str(_tokens(name, out)))


def _tokens(tokenizer_name: str, out: Path) -> Path:
    return out / f"tokens_{tokenizer_name}"


def configuration(
    row: Row, seed: int, out: Path, steps: int, overrides: Sequence[str]
) -> UnderstandingConfig:
    """The run of a row with a seed. Two rows of one kind are one run."""
    often = comparison.once_at_the_end(steps)
    data = out / "easy-vqa"
    window = ["model.window=1"] if row.features in ("full", "residual") else []
    # Before quantization there are no tokens: pictures are read.
    tokens = "null" if row.features == "continuous" else str(_tokens(row.tokenizer, out))
    return load_understanding_config(
        CONFIGS / "easy_vqa.yaml",
        [
            f"run={out / f'{row.tokenizer}_{row.features}_{seed}'}",
            f"seed={seed}",
            f"tokenizer={out / f'tokenizer_{row.tokenizer}'}",
            f"optim.steps={steps}",
            *often,
            *QUIET,
            f"data.path={data / 'train.json'}",
            f"data.held_out={data / 'test.json'}",
            f"data.tokens={tokens}",
            f"data.held_out_tokens={tokens}",
            "data.cache=4096",
            f"model.features={row.features}",
            *window,
            *overrides,
        ],
    )


def run_row(
    row: Row, config: UnderstandingConfig, questions: int, group: Processes
) -> dict[str, Any]:
    """Train and evaluate a row, or read what an earlier call found."""
    from tokenflow_ext.train.evaluation import understanding as evaluation

    result = Path(config.run) / RESULT
    if not result.is_file():
        summary = understanding.train(config, group, resume=True)
        asked, known = str(config.data.held_out), config.data.path
        found = evaluation.evaluate(
            config.run, asked, group, train=known, limit=questions, batch=128
        )
        facts = {
            "right": {kind: value["right"] for kind, value in found.report["right"].items()},
            "floor": {kind: value["right"] for kind, value in found.report["floor"].items()},
            "questions": found.report["data"]["questions"],
            "steps": summary["steps"],
            "seconds": summary["seconds"],
        }
        if group.first:
            checkpoint.write_text(result, json.dumps(facts, indent=2) + "\n")
        group.wait()
    return {"row": row.name, "seed": config.seed, **json.loads(result.read_text())}


def spread(values: Sequence[float]) -> str:
    """Mean and deviation of shares, in percent."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def as_tables(results: Sequence[dict[str, Any]]) -> list[Table]:
    """Exact matches in percent, mean and deviation over the seeds, a table a group of rows."""
    kinds = ("all", *easy_vqa.KINDS)
    tables = []
    for group in (INPUTS, KINDS):
        rows = []
        for row in (row for row in ROWS.values() if row.group == group):
            own = [found for found in results if found["row"] == row.name]
            if own:
                cells = {kind: spread([x["right"][kind] for x in own]) for kind in kinds}
                rows.append({"": row.label, **cells})
        if rows:
            floor = results[0]["floor"]
            rows.append({"": "without looking", **{k: f"{100 * floor[k]:.1f}" for k in kinds}})
            tables.append(Table(group, rows, ""))
    return tables


def as_markdown(results: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The tables, and what made them."""
    lines = []
    for table in as_tables(results):
        lines += [f"## {table.title}", "", *table.lines(), ""]
    seeds = sorted({found["seed"] for found in results})
    lines += [
        f"- exact matches in percent on {results[0]['questions']} of easy-VQA's test questions, "
        f"evenly chosen, {len(seeds)} seed(s); "
        f"{results[0]['steps']} steps each, the tokenizers {facts['tokenizer_steps']}"
        + "".join(f"; {override}" for override in facts["overrides"]),
        "- rows on several grids have no neighbourhoods (model.window=1), the others 3 x 3",
        f"- {facts['device']['cpu']}, {facts['processes']} process(es) of {facts['cores']} cores, "
        f"{sum(found['seconds'] for found in results) / len(results):.0f} s a row; load average "
        f"before {facts['load before'][0]:.1f}, after {facts['load after'][0]:.1f}",
        *comparison.ending(facts),
    ]
    return "\n".join(lines) + "\n"


def run(
    rows: Sequence[Row], seeds: int, out: Path, steps: int, tokenizer_steps: int, questions: int,
    overrides: Sequence[str], command: str, group: Processes,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every row with every seed; writes table.md and results.json after each."""
    # Before anything trains: an error in one of them is seen now.
    configs = [
        [configuration(row, seed, out, steps, overrides) for row in rows] for seed in range(seeds)
    ]
    shared = comparison.training_facts()
    with group.together():
        if group.first:
            easy_vqa.fetch(out / "easy-vqa")
    for name in dict.fromkeys(row.tokenizer for row in rows):
        train_tokenizer(name, out, tokenizer_steps, group)
    results: list[dict[str, Any]] = []
    for part in configs:
        for row, config in zip(rows, part, strict=True):
            results.append(run_row(row, config, questions, group))
            facts = comparison.now(
                shared,
                overrides,
                processes=group.world,
                command=command,
                tokenizer_steps=tokenizer_steps,
            )
            if group.first:
                comparison.write(out, as_markdown(results, facts), facts, results)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    given = sys.argv[1:] if argv is None else list(argv)
    parser = comparison.row_parser("benchmarks.understanding", __doc__, ROWS)
    parser.add_argument("--seeds", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=1000, help="of a row [%(default)s]")
    parser.add_argument(
        "--tokenizer-steps", type=int, default=700, help="of a tokenizer [%(default)s]"
    )
    parser.add_argument(
        "--questions", type=int, default=3000, help="of the test that are asked [%(default)s]"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/understanding-compared"),
        metavar="DIR",
        help="[%(default)s]",
    )
    known, overrides = parser.parse_known_args(given)
    rows = [ROWS[name] for name in known.rows]
    if not rows or known.seeds < 1 or known.questions < 1:
        parser.error("nothing to do: it takes a row, a seed and a question or more of each")
    command = shlex.join(["python", "-m", "benchmarks.understanding", *given])
    try:
        with processes("cpu") as group:
            run(rows, known.seeds, known.out, known.steps, known.tokenizer_steps, known.questions,
                overrides, command, group)  # fmt: skip
            if group.first:
                print((known.out / "table.md").read_text())
                print(f"{known.out / 'table.md'}, results.json")
    except TokenFlowError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
