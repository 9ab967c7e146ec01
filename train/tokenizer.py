"""Train a tokenizer: ``torchrun train/tokenizer.py [--config FILE] [--resume] [key=value ...]``.

With no argument: the preset "tiny" on the photographs that ship inside scikit-image and
scikit-learn, distilled from EfficientNet-Lite0, in under ten minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tokenflow_ext.models import CheckpointError, ConfigError, WeightsError
from tokenflow_ext.train import checkpoint, data
from tokenflow_ext.train.config import TrainConfig, load_config, to_yaml
from tokenflow_ext.train.distributed import Processes, processes
from tokenflow_ext.train.trainer import Trainer, summary_text

CONFIG_FILE = "config.yaml"


def read_arguments(argv: list[str] | None = None) -> tuple[TrainConfig, bool]:
    """The configuration that the command line asks for, and whether to resume.

    A resumed run takes the configuration saved in its folder, unless a file is given.
    """
    parser = argparse.ArgumentParser(
        prog="tokenizer.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any key of the configuration (printed at the start of a run) can be set: "
        "optim.lr=1e-4 or --optim.lr 1e-4.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML configuration")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in its folder (run=FOLDER)"
    )
    known, overrides = parser.parse_known_args(argv)
    config = load_config(known.config, overrides)
    saved = Path(config.run) / CONFIG_FILE
    if known.resume and known.config is None and saved.is_file():
        config = load_config(saved, overrides)
    return config, known.resume


def train(config: TrainConfig, group: Processes, resume: bool = False) -> dict[str, Any]:
    """Run the training that ``config`` describes; returns its summary.

    Raises:
        CheckpointError: a run is already in the folder and ``resume`` is false, or its newest
            checkpoint is not whole or does not fit.
    """
    run = Path(config.run)
    existing = checkpoint.available(run / "checkpoints")
    begun = existing or (run / CONFIG_FILE).exists()
    if begun and not resume:
        raise CheckpointError(
            f"{run} already holds a run: continue it with --resume, or choose another folder "
            "with run=FOLDER"
        )
    group.wait()  # the first process writes into the folder only when all have looked
    text = to_yaml(config)
    if group.first:
        print(text, flush=True)
        if config.data.path is None:
            print(f"photographs:\n{data.photograph_licences()}", flush=True)
        run.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(run / CONFIG_FILE, text)
    trainer = Trainer(config, group)
    if existing:
        trainer.restore(existing[-1])
        if group.first:
            print(f"continuing from {existing[-1]}", flush=True)
    if group.first:
        count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        print(
            f"{count / 1e6:.2f} M trained parameters, {len(trainer.dataset.pictures)} images, "
            f"{len(trainer.held_out)} held-out crops, {group.world} process(es) on "
            f"{group.device.type}",
            flush=True,
        )
    summary = trainer.fit()
    if group.first:
        print(summary_text(summary, run), flush=True)
    return summary


def main(argv: list[str] | None = None) -> None:
    """The command: errors of configuration, data, weights and checkpoints end with one line."""
    try:
        config, resume = read_arguments(argv)
        with processes(config.device) as group:
            train(config, group, resume)
    except (ConfigError, CheckpointError, WeightsError, data.DataError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
