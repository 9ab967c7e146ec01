"""One transformer both ways, or two: `torchrun --nproc-per-node 2 -m benchmarks.unified`.

Trains the demonstration of `make train-unified`, which must have been run, three times for as many
steps: with both tasks, with answering alone, with drawing alone. A step of both has the batches of
both, so each way has learned from as many samples as the model that does it alone. What is finished
in the folder is kept, what was broken off is continued.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import comparison, machine
from benchmarks.comparison import RESULT
from benchmarks.tables import Table
from benchmarks.understanding import QUIET, spread
from tokenflow_ext.errors import TokenFlowError
from tokenflow_ext.train import unified
from tokenflow_ext.train.config import UnifiedConfig, load_unified_config
from tokenflow_ext.train.data import easy_vqa
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import Processes, processes
from tokenflow_ext.train.tasks.image_generator import ImageGenerator

CONFIG = machine.ROOT / "train" / "configs" / "easy_vqa_unified.yaml"
ROWS = {
    "both": "one model, both tasks",
    "answering": "a model that answers",
    "drawing": "a model that draws",
}
STEPS = "one"  # of each scale's sampling
GROUPS = {"captions of training": "drawn as asked", "captions held out": "held out: drawn as asked"}


def configuration(row: str, seed: int, out: Path, overrides: Sequence[str]) -> UnifiedConfig:
    """The run of a row with a seed."""
    ways = [] if row == "both" else [f"ways=[{row}]"]
    config = load_unified_config(CONFIG, list(overrides))
    steps = config.optim.steps
    often = comparison.once_at_the_end(steps)
    return load_unified_config(
        CONFIG, [f"run={out / f'{row}_{seed}'}", f"seed={seed}", *often, *QUIET, *ways, *overrides]
    )


def run_row(
    row: str, config: UnifiedConfig, real: Path, each: int, group: Processes
) -> dict[str, Any]:
    """Train and evaluate a row, or read what an earlier call found."""
    from tokenflow_ext.train.evaluation import drawings, understanding

    result = Path(config.run) / RESULT
    if not result.is_file():
        summary = unified.train(config, group, resume=True)
        found: dict[str, Any] = {
            "steps": summary["steps"],
            "seconds": summary["seconds"],
            "pictures": summary["images"],
        }
        if "answering" in config.ways:
            answers = understanding.evaluate(
                config.run, str(config.data.held_out), group, train=config.data.path, batch=128
            ).report
            for name in ("right", "floor"):
                found[name] = {kind: value["right"] for kind, value in answers[name].items()}
        if "drawing" in config.ways and group.first:
            generator = ImageGenerator.load(
                config.run, steps=STEPS, guidance=config.sample.guidance, batch=32
            )
            report, _ = drawings.evaluate(
                config.run,
                generator,
                str(real / "train"),
                str(real / "test"),
                unseen=config.drawing.unseen,
                each=each,
                questions=None if "answering" in config.ways else {},
            )
            found |= {"drawings": report["drawings"], "judge": report["judge"]}
        if group.first:
            checkpoint.write_text(result, json.dumps(found, indent=2) + "\n")
        group.wait()
    return {"row": row, "seed": config.seed, **json.loads(result.read_text())}


def as_table(results: Sequence[dict[str, Any]]) -> Table:
    """Shares in percent, mean and deviation over the seeds."""
    rows = []
    for row, label in ROWS.items():
        own = [found for found in results if found["row"] == row]
        if not own:
            continue
        cells = {"": label}
        for kind in ("all", *easy_vqa.KINDS):
            values = [x["right"][kind] for x in own if kind in x.get("right", ())]
            cells[f"answers: {kind}"] = spread(values) if values else "-"
        for group, name in GROUPS.items():
            values = [x["drawings"][group]["as asked for"]["all"] for x in own if "drawings" in x]
            cells[name] = spread(values) if values else "-"
        rows.append(cells)
    return Table("One model and two", rows, "")


def as_markdown(results: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The table, and what made it."""
    seeds = sorted({found["seed"] for found in results})
    floor = next((found["floor"] for found in results if "floor" in found), {})
    judge = next((found["judge"] for found in results if "judge" in found), None)
    lines = [*as_table(results).lines(), ""]
    lines.append(
        f"- shares in percent, {len(seeds)} seed(s), {results[0]['steps']} steps each"
        + "".join(f"; {override}" for override in facts["overrides"])
    )
    if floor:
        without = ", ".join(f"{kind} {100 * value:.1f}" for kind, value in floor.items())
        lines.append(f"- answers: easy-VQA's test questions; without looking: {without}")
    if judge:
        lines.append(
            f"- drawings: {facts['each']} of each caption, sampled in {STEPS} step a scale. The "
            f"judge is right about colour and shape of {100 * judge['real']['all']:.1f} % of "
            f"{judge['pictures']} real test pictures, and of "
            f"{100 * judge['reconstructed']['all']:.1f} % of the same pictures from their tokens"
        )
    seconds = ", ".join(
        f"{ROWS[row]} {sum(values) / len(values):.0f} s"
        for row in ROWS
        if (values := [found["seconds"] for found in results if found["row"] == row])
    )
    lines += [
        f"- training: {seconds}; {facts['device']['cpu']}, {facts['processes']} process(es) of "
        f"{facts['cores']} cores, load average before {facts['load before'][0]:.1f}, after "
        f"{facts['load after'][0]:.1f}",
        *comparison.ending(facts),
    ]
    return "\n".join(lines) + "\n"


def run(
    rows: Sequence[str],
    seeds: int,
    out: Path,
    real: Path,
    each: int,
    overrides: Sequence[str],
    command: str,
    group: Processes,
) -> list[dict[str, Any]]:
    """Every row with every seed; writes table.md and results.json after each."""
    # Before anything trains: an error in one of them is seen now.
    configs = [[configuration(row, seed, out, overrides) for row in rows] for seed in range(seeds)]
    shared = comparison.training_facts()
    results: list[dict[str, Any]] = []
    for part in configs:
        for row, config in zip(rows, part, strict=True):
            results.append(run_row(row, config, real, each, group))
            facts = comparison.now(
                shared, overrides, processes=group.world, command=command, each=each
            )
            if group.first:
                comparison.write(out, as_markdown(results, facts), facts, results)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    given = sys.argv[1:] if argv is None else list(argv)
    parser = comparison.row_parser("benchmarks.unified", __doc__, ROWS)
    parser.add_argument("--seeds", type=int, default=1, help="[%(default)s]")
    parser.add_argument("--each", type=int, default=20, help="drawings of a caption [%(default)s]")
    parser.add_argument(
        "--real",
        type=Path,
        default=Path("runs/easy-vqa"),
        metavar="DIR",
        help="easy-VQA, of whose pictures the judge learns [%(default)s]",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/unified-compared"),
        metavar="DIR",
        help="[%(default)s]",
    )
    known, overrides = parser.parse_known_args(given)
    if not known.rows or known.seeds < 1 or known.each < 1:
        parser.error("nothing to do: it takes a row, a seed and a drawing or more of each")
    command = shlex.join(["python", "-m", "benchmarks.unified", *given])
    try:
        with processes("cpu") as group:
            run(known.rows, known.seeds, known.out, known.real, known.each, overrides, command,
                group)  # fmt: skip
            if group.first:
                print((known.out / "table.md").read_text())
                print(f"{known.out / 'table.md'}, results.json")
    except TokenFlowError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
