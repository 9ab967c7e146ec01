"""What every training run does, whatever it trains: steps, schedule, logs, resuming."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from tokenflow_ext.errors import NotFiniteError as NotFiniteError
from tokenflow_ext.models import CheckpointError
from tokenflow_ext.models.serialization.files import brief, shown
from tokenflow_ext.models.serialization.pretrained import not_finite, read_weights
from tokenflow_ext.train import data
from tokenflow_ext.train.config import OptimConfig, to_yaml

from . import checkpoint, parallel, runs
from .distributed import Launcher, Processes, processes
from .logs import RunLog, table
from .messages import ending_in_one_line

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def learning_rate(step: int, config: OptimConfig) -> float:
    """The factor of the learning rate at an optimizer step: linear warm-up, then the schedule."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


class BaseTrainer:
    """A run: model, optimizer, data position. Made on every process alike.

    A subclass makes ``model``, ``optimizer`` and ``scheduler``, ``average`` (of the weights; None
    keeps none), and fills in what is left open below.

    Args:
        config: has ``seed``, ``threads``, ``run`` (a folder), ``optim`` and ``output``.
    """

    #: Values of a step beside the progress bar.
    shown: tuple[str, ...] = ()
    #: What the log calls an evaluation, and what its lines say it is of.
    evaluated_on = ("held_out", "held out")
    #: The values of an evaluation for the summary: (name, format).
    names: dict[str, tuple[str, str]] = {}  # noqa: RUF012

    def __init__(self, config: Any, group: Processes) -> None:
        self.config, self.group = config, group
        if group.device.type == "cpu" and config.threads:
            torch.set_num_threads(config.threads)
        self.run = Path(config.run)
        self.step = 0
        self.position = 0
        self.seconds = 0.0
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.partition = data.BatchPartition(
            config.optim.batch, config.optim.accumulate, group.rank, group.world
        )
        self.dtype = PRECISIONS[config.optim.precision]
        self.scaler = self._scaler()
        self._batches: Iterator[Any] = iter(())
        self._pool: ThreadPoolExecutor | None = None
        self._pending: Future | None = None
        # Whether a loss was not finite since the last look: on the device, which is not waited for.
        self._watched: list[str] = []
        self._bad: Tensor | None = None

    # -- what a subclass fills in -----------------------------------------------------------------

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    average: parallel.Average | None

    def prepare(self) -> None:
        """Wrap the model for its processes and start reading; before the first step."""
        raise NotImplementedError

    def _next_batch(self) -> Any:
        """The next micro-batch, with whatever depends on neither weights nor random draws."""
        raise NotImplementedError

    def train_step(self) -> dict[str, Tensor]:
        """One optimizer step over every micro-batch; returns the losses of this process."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Values of the weights as they are, alike on every process (every process calls this)."""
        raise NotImplementedError

    def pictures(self) -> tuple[Tensor, Tensor] | None:
        """Two rows of images [B, 3, S, S] to show, None where the model makes none (every process
        calls this)."""
        raise NotImplementedError

    def _save_model(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write the model with these weights, ready for use (the first process alone)."""
        raise NotImplementedError

    def _check(self, path: Path) -> None:
        """Refuse the (whole) checkpoint at ``path`` by a CheckpointError."""

    def _further_state(self) -> dict[str, Any]:
        """What a checkpoint holds of a subclass's own (every process calls this)."""
        return {}

    def _restore_further(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`_further_state`; ``state`` is the whole checkpoint."""

    def headline(self) -> str:
        """One line on what is trained, on what."""
        raise NotImplementedError

    def _listing(self) -> Iterator[str]:
        """All data by name, the held-out ones too; alike on every process and when resumed."""
        raise NotImplementedError

    @cached_property
    def data_facts(self) -> str:
        """The data in a few words, alike where the data are."""
        sha = hashlib.sha256()
        for entry in self._listing():
            sha.update(entry.encode("utf-8", "surrogatepass") + b"\0")
        return f"{self.dataset.describe()}, digest {sha.hexdigest()[:16]}"

    def _extra_values(self) -> dict[str, float]:
        """Further values of a step, alike on every process."""
        return {}

    # -- parts of a step --------------------------------------------------------------------------

    def _seed(self, stream: int) -> None:
        seed = np.random.SeedSequence([self.config.seed, stream]).generate_state(2)
        torch.manual_seed(int(seed[0]))
        np.random.seed(int(seed[1]))  # noqa: NPY002 - for code that draws from it
        random.seed(int(seed[1]))

    def _optimizer(
        self, parameters: Iterable[nn.Parameter] | list[dict], lr: float, start: int = 0
    ) -> tuple[Any, Any]:
        """Adam, and the schedule of what trains from optimizer step ``start`` on.

        Args:
            parameters: or groups of them with learning rates of their own, which the schedule
                scales as it does ``lr``.
        """
        optim = self.config.optim
        optimizer = torch.optim.Adam(
            parameters, lr=lr, betas=tuple(optim.betas), weight_decay=optim.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate(start + step, optim)
        )
        return optimizer, scheduler

    def _scaler(self) -> torch.amp.GradScaler:
        half = self.config.optim.precision == "fp16"
        return torch.amp.GradScaler(self.group.device.type, enabled=half)

    def _autocast(self) -> Any:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.group.device.type, self.dtype)

    def _start_reading(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        if self.group.device.type == "cpu":
            self._pool = ThreadPoolExecutor(1)
            self._pending = self._pool.submit(self._next_batch)

    def stop_reading(self) -> None:
        """End the thread that reads ahead, where there is one."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _take_batch(self) -> Any:
        """The next micro-batch; on a CPU a thread has made it ready and starts on the one after.

        Neither images nor teacher depend on what is learned or drawn, so nothing else changes.
        """
        with record_function("data wait"):
            if self._pool is None:
                return self._next_batch()
            ready = self._pending.result()
            self._pending = self._pool.submit(self._next_batch)
            return ready

    def _update(self, parameters: Iterable[nn.Parameter], optimizer: Any, scaler: Any) -> Tensor:
        with record_function("optimizer"):
            scaler.unscale_(optimizer)
            limit = self.config.optim.max_grad_norm
            norm = parallel.clip_gradients(parameters, limit if limit > 0 else math.inf)
            scaler.step(optimizer)
            scaler.update()
        return norm

    @contextmanager
    def _evaluating(self) -> Iterator[Any]:
        """The model in evaluation, without gradients."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield self.model
        finally:
            self.model.train(training)
            parallel.reshard(self.model)

    @contextmanager
    def _ready(self) -> Iterator[Any]:
        """The model in evaluation, with the averaged weights where there are any."""
        if self.average is not None:
            self.average.swap()
        try:
            with self._evaluating() as model:
                yield model
        finally:
            if self.average is not None:
                self.average.swap()

    # -- checkpoints ------------------------------------------------------------------------------

    def _random_states(self) -> dict[str, Any]:
        kind, keys, *rest = np.random.get_state()  # noqa: NPY002
        states = {
            "torch": torch.get_rng_state(),
            "numpy": [kind, keys.tolist(), *rest],
            "python": random.getstate(),
        }
        if self.group.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.group.device)
        return states

    def _restore_random(self, states: list[dict[str, Any]]) -> None:
        """Take up the generators of as many processes as there are now; others start anew."""
        if len(states) == self.group.world:
            mine = states[self.group.rank]
            torch.set_rng_state(mine["torch"])
            kind, keys, *rest = mine["numpy"]
            np.random.set_state(  # noqa: NPY002
                (kind, np.array(keys, dtype=np.uint32), *rest)
            )
            version, numbers, gauss = mine["python"]
            random.setstate((version, tuple(numbers), gauss))
            if self.group.device.type == "cuda" and "cuda" in mine:
                torch.cuda.set_rng_state(mine["cuda"], self.group.device)

    def save(self) -> Path | None:
        """Write a checkpoint, the same for every way of splitting the work (every process calls
        this; the first one writes)."""
        first = self.group.first
        self._check_losses()
        state = {
            "step": self.step,
            "position": self.position,
            "seconds": self.seconds,
            "first": self.first,
            "config": to_yaml(self.config),
            "data": self.data_facts,
            "optimizer": parallel.optimizer_state(self.optimizer),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": self.group.gather(self._random_states()),
            **self._further_state(),
        }
        if self.average is not None:
            state["model"] = parallel.model_state(self.model, first)
        with self._ready():
            weights = parallel.model_state(self.model, first)
        with self.group.together():
            if not first:
                return None
            if bad := _bad_numbers(state, weights):
                raise self._lost(f"{bad[0]} (and {len(bad) - 1} more)")
            folder, keep = self.run / "checkpoints", self.config.output.keep
            write = partial(self._save_model, weights)
            return checkpoint.save(folder, self.step, state, write, keep)

    def _lost(self, what: str) -> NotFiniteError:
        """The error of a run in which ``what`` is not finite."""
        good = checkpoint.available(self.run / "checkpoints")
        left = f"the last good checkpoint is {good[-1]}" if good else "there is no good checkpoint"
        return NotFiniteError(
            f"step {self.step}: {what} is not finite, and no checkpoint of it is written; {left}. "
            "Lower optim.lr or optim.max_grad_norm, or use optim.precision=fp32"
        )

    def _watch(self, values: dict[str, Tensor]) -> None:
        """Note which of a step's losses are not finite."""
        # Under loss scaling steps whose gradients overflow are left out.
        names = sorted(set(values) - ({"grad_norm"} if self.scaler.is_enabled() else set()))
        if names != self._watched:
            self._check_losses()
            self._watched, self._bad = names, None
        bad = ~torch.stack([values[name].detach().float() for name in names]).isfinite()
        self._bad = bad if self._bad is None else self._bad | bad

    def _check_losses(self) -> None:
        """End the run where a loss was not finite on any process (every process calls this)."""
        if self._bad is None:
            return
        bad = self.group.sum_(self._bad.float()).tolist()
        self._bad = None
        names = [name for name, count in zip(self._watched, bad, strict=True) if count]
        if names:  # on every process
            with self.group.together():
                if self.group.first:
                    raise self._lost(", ".join(names))

    @contextmanager
    def _naming_the_cause(self) -> Iterator[None]:
        """Computing with numbers that are not finite may fail anywhere, with any message."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            bad = parallel.not_finite(self.model)
            if not bad:
                raise
            raise self._lost(f"{bad[0]} (and {len(bad) - 1} more)") from error

    def restore(self, path: Path) -> None:
        """Continue from the checkpoint at ``path``, with the options of this run's configuration.

        Raises:
            CheckpointError: not whole, not finite, or of another model.
        """
        state = checkpoint.load(path)
        self._check(path)
        weights, _ = read_weights(path)
        if bad := _bad_numbers(state, {}):
            raise CheckpointError(
                f"{path} holds numbers that are not finite, first in {bad[0]}: take it away to "
                "continue from the one before it"
            )
        try:
            parallel.load_model_state(self.model, weights)
            if self.average is not None:
                self.average.swap()
                parallel.load_model_state(self.model, state["model"])
            parallel.load_optimizer_state(self.optimizer, state["optimizer"])
            parallel.load_scheduler_state(self.scheduler, state["scheduler"])
            if state["scaler"]:  # of a run without loss scaling it is empty
                self.scaler.load_state_dict(state["scaler"])
            self._restore_further(state)
            self.step, self.position = _count(state["step"]), _count(state["position"])
            self.seconds, self.first = float(state["seconds"]), dict(state["first"])
            self._restore_random(state["random"])
        except (ArithmeticError, AttributeError, LookupError, *_MISFITS) as error:
            what = f"no {error}" if isinstance(error, KeyError) else brief(error)
            raise CheckpointError(
                f"{path} does not fit this run's configuration: {what}"
            ) from error
        if self.group.first and (was := state.get("data", now := self.data_facts)) != now:
            print(f"the data have changed: {was} -> {now}", flush=True)

    # -- the run ----------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the last step; returns the summary."""
        output, steps = self.config.output, self.config.optim.steps
        log = None
        if self.group.first:
            self.run.mkdir(parents=True, exist_ok=True)
            log = RunLog(
                self.run,
                self.step,
                steps,
                tensorboard=output.tensorboard,
                progress=output.progress,
            )
        try:
            with self._naming_the_cause():
                self._fit(log)
        finally:
            self.stop_reading()
            if log is not None:
                log.close()
        self.group.wait()
        return self._summary()

    def _fit(self, log: RunLog | None) -> None:
        output, steps = self.config.output, self.config.optim.steps
        launcher = Launcher()
        self.prepare()
        started, done_before = time.perf_counter(), self.step
        before = self.seconds
        if self.step == 0:
            self._report(log)
        while self.step < steps:
            launcher.check()
            values = self.train_step()
            self._watch(values)
            self.seconds = before + time.perf_counter() - started
            last = self.step == steps
            if log is not None:
                log.advance()
            if last or self.step % output.log_every == 0:
                speed = (self.step - done_before) / (self.seconds - before)
                self._log_step(log, values, speed)
            if last or self.step % output.eval_every == 0:
                self._report(log)
            if last or self.step % output.picture_every == 0:
                name = "final" if last else f"step_{self.step:08d}"
                images = self.pictures()
                if log is not None and images is not None:
                    log.picture(self.step, self.run / "pictures" / f"{name}.png", *images)
            self.seconds = before + time.perf_counter() - started
            if last or self.step % output.checkpoint_every == 0:
                self.save()
        if not self.last:  # the run was already complete
            self.last = self.evaluate()

    def _log_step(self, log: RunLog | None, values: dict[str, Tensor], speed: float) -> None:
        self._check_losses()
        names = sorted(values)
        mean = self.group.mean_(torch.stack([values[n].float() for n in names]))
        numbers = dict(zip(names, mean.tolist(), strict=True))
        extra = self._extra_values()
        numbers |= extra
        factor = self.scheduler.lr_lambdas[0](self.scheduler.last_epoch)
        numbers["lr"] = self.config.optim.lr * factor
        memory = self.group.peak_memory()
        if log is None:
            return
        shown = {n: numbers[n] for n in self.shown}
        images = speed * self.config.optim.batch
        log.show(shown | extra | {"img/s": images, "GiB": memory})
        costs = {"images_per_second": images, "peak_memory_gib": memory}
        log.values(self.step, numbers | costs, "train")

    def _report(self, log: RunLog | None) -> None:
        self.last = self.evaluate()
        if self.step == 0:
            self.first = dict(self.last)
        if log is not None:
            kind, words = self.evaluated_on
            log.values(self.step, self.last, kind)
            text = ", ".join(f"{k} {v:.4g}" for k, v in self.last.items())
            log.say(f"step {self.step}, {words}: {text}")

    def _summary(self) -> dict[str, Any]:
        summary = {
            "steps": self.step,
            "images": self.position,
            "seconds": round(self.seconds, 1),
            **self._summary_facts(),
            "first": self.first,
            "last": self.last,
        }
        if self.group.first:
            checkpoint.write_text(self.run / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def _summary_facts(self) -> dict[str, Any]:
        return {}

    def summary_text(self, summary: dict[str, Any], head: str = "") -> str:
        """The end of a run for people: what was reached, the time, the paths."""
        rows = [(head, "first", "last")]
        for key, (name, form) in self.names.items():
            if key in summary["last"]:
                first, last = (summary[when].get(key) for when in ("first", "last"))
                rows.append((name, "-" if first is None else form.format(first), form.format(last)))
        newest = checkpoint.available(self.run / "checkpoints")
        minutes, seconds = divmod(round(summary["seconds"]), 60)
        done = f"{summary['steps']} steps, {summary['images']} images"
        picture = self.run / "pictures" / "final.png"
        paths = [
            ("picture", picture if picture.exists() else "-"),
            ("checkpoint", newest[-1] if newest else "-"),
            ("logs", f"{self.run / 'log.jsonl'}, tensorboard --logdir {self.run}"),
        ]
        return "\n".join(
            [
                "",
                table(rows),
                "",
                f"{done} in {minutes} min {seconds} s",
                *(f"{name:10s} {path}" for name, path in paths),
            ]
        )


#: Errors of a state that is another model's, or has been tampered with.
_MISFITS = (RuntimeError, TypeError, ValueError)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a count must be a whole number, got {shown(value)}")
    return value


def _bad_numbers(state: dict[str, Any], weights: dict[str, Tensor]) -> list[str]:
    """What in a checkpoint is not finite; the figures before the first step do not matter."""
    return not_finite({k: v for k, v in state.items() if k != "first"} | {"weights": weights})


def train(
    config: Any,
    group: Processes,
    make: Callable[[Any, Processes], BaseTrainer],
    resume: bool = False,
    notice: str = "",
) -> dict[str, Any]:
    """Run the training that ``config`` describes; returns its summary.

    Args:
        make: builds the trainer.
        notice: printed after the configuration.

    Raises:
        CheckpointError: a run is already in the folder and ``resume`` is false, another process
            trains in it, or its newest checkpoint is not whole or does not fit.
        ConfigError: a resumed run cannot change what the configuration changes.
        DataError: nothing to train on, or processes with different data.
        NotFiniteError: weights or losses are no longer finite.
    """
    run, text = Path(config.run), to_yaml(config)
    with ExitStack() as held:
        newest, lines = None, []
        with group.together():
            if group.first:
                held.enter_context(runs.lock(run))
                newest, lines = runs.begin(config, resume)
                print(text, *lines, *filter(None, [notice]), sep="\n", flush=True)
        newest = group.gather(newest)[0]
        with group.together():
            trainer = make(config, group)
            facts = trainer.data_facts
        group.check_same("data", facts)
        with group.together():
            if newest is not None:
                trainer.restore(newest)
        with group.together():  # what is refused has changed nothing in the folder
            if group.first:
                runs.settle(run, text)
                if newest is not None:
                    print(f"continuing from {newest}", flush=True)
                count = f"{group.world} process(es) on {group.device.type}"
                print(f"{trainer.headline()}, {count}", flush=True)
        summary = trainer.fit()
        if group.first:
            print(trainer.summary_text(summary), flush=True)
        return summary


def read_arguments(
    load: Callable[[Any, list[str]], Any], program: str, description: str, argv: list[str] | None
) -> tuple[Any, bool]:
    """The configuration that the command line asks for, and whether to resume.

    A resumed run takes the configuration saved in its folder, unless a file is given.

    Args:
        load: makes the configuration of a file (or None) and overrides.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
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
    config = load(known.config, overrides)
    saved = Path(config.run) / runs.CONFIG_FILE
    if known.resume and known.config is None and saved.exists():
        config = load(saved, overrides)
    return config, known.resume


def run_command(
    read: Callable[[], tuple[Any, bool]], train: Callable[[Any, Processes, bool], Any]
) -> None:
    """The command; see :func:`messages.ending_in_one_line`."""
    with ending_in_one_line():
        config, resume = read()
        with processes(config.device) as group:
            train(config, group, resume)
