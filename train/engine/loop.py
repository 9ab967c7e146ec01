"""What every training run does, whatever it trains: steps, evaluations, checkpoints, resuming.

What is trained is a :class:`.task.Task`; see there for how the two meet.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from tokenflow_ext._deprecated import renamed
from tokenflow_ext.errors import CheckpointError, NotFiniteError
from tokenflow_ext.models.serialization.files import brief, shown
from tokenflow_ext.train.config import to_yaml

from . import checkpoint, parallel, runs
from .distributed import Launcher, Processes
from .finite import LossWatch, bad_numbers
from .logs import RunLog, summary_text
from .prefetch import Prefetcher
from .random_state import generator_states, restore_generators, seed_generators
from .task import Task

Config = TypeVar("Config", bound=runs.Config)
#: Makes a task: the configuration, the processes, and whether a checkpoint will be loaded into it.
MakeTask = Callable[[Config, Processes, bool], Task]

#: Errors of a state that is another model's, or has been tampered with.
_MISFITS = (RuntimeError, TypeError, ValueError)


class Trainer:
    """A run of a task. Made on every process alike.

    Args:
        config: of the run.
        group: this process among those of the run.
        make: the task's class.
        resuming: whether :meth:`restore` is called next.

    Attributes:
        step: optimizer steps done.
        position: samples read.
        seconds: spent in training.
        first, last: values of the first evaluation and of the last.
        batches: this process's micro-batches, from :meth:`prepare` on.
    """

    def __init__(
        self, config: Config, group: Processes, make: MakeTask[Config], resuming: bool = False
    ) -> None:
        self.config: runs.Config = config
        self.group = group
        if group.device.type == "cpu" and config.threads:
            torch.set_num_threads(config.threads)
        self.run = Path(config.run)
        self.step = 0
        self.position = 0
        self.seconds = 0.0
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.task = make(config, group, resuming)
        self.batches: Prefetcher | None = None
        self._watch = LossWatch(group)
        seed_generators(config.seed, 1 + group.rank)  # each process draws its own numbers

    @property
    def model(self) -> nn.Module:
        """What is evaluated and saved."""
        return self.task.model

    @cached_property
    def data_facts(self) -> str:
        """The data in a few words, alike where the data are."""
        sha = hashlib.sha256()
        for entry in self.task.listing():
            sha.update(entry.encode("utf-8", "surrogatepass") + b"\0")
        return f"{self.task.dataset.describe()}, digest {sha.hexdigest()[:16]}"

    # -- steps ------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """What comes before the first step: a new run's own start, the models' distribution over
        the processes, and the first batch."""
        if self.step == 0:
            self.task.start()
        for model in self.task.optimized.values():
            model.distribute()
        batches = self.task.batches(self.position)
        self.batches = Prefetcher(batches, ahead=self.group.device.type == "cpu")

    def stop_reading(self) -> None:
        """End the thread that reads ahead, where there is one."""
        if self.batches is not None:
            self.batches.close()

    def train_step(self) -> dict[str, Tensor]:
        """One optimizer step over every micro-batch; returns the losses of this process."""
        assert self.batches is not None, "prepare() comes first"
        optim, task = self.config.optim, self.task
        active = [model for model in task.optimized.values() if self.step >= model.start]
        for model in active:
            model.zero_grad()
        values: dict[str, Tensor] = {}
        for micro in range(optim.accumulate):
            batch = next(self.batches)
            with ExitStack() as passes:
                for model in active:
                    passes.enter_context(model.exchange(last=micro == optim.accumulate - 1))
                losses = task.micro_step(batch, self.step)
            for name, value in losses.items():
                share = value.detach().float() / optim.accumulate
                values[name] = values[name] + share if name in values else share
        norms = [model.update() for model in active]
        values["grad_norm"] = norms[0]
        self.step += 1
        self.position += optim.batch
        if task.ema is not None:
            with record_function("average"):
                task.ema.update(self.step)
        task.after_step(self.step, self.position)
        return values

    # -- evaluation -------------------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model in evaluation, without gradients, with the averaged weights where there are
        any."""
        ema = self.task.ema
        with nullcontext() if ema is None else ema.applied(), parallel.evaluating(self.model):
            yield self.model

    def evaluate(self) -> dict[str, float]:
        """The task's values of the averaged weights (every process calls this)."""
        with self.averaged():
            return self.task.evaluate()

    def pictures(self) -> tuple[Tensor, Tensor] | None:
        """The task's pictures by the averaged weights (every process calls this)."""
        with self.averaged():
            return self.task.pictures()

    # -- checkpoints ------------------------------------------------------------------------------

    def save(self) -> Path | None:
        """Write a checkpoint, the same for every way of splitting the work (every process calls
        this; the first one writes)."""
        first, task = self.group.first, self.task
        self._check_losses()
        (_, main), *others = task.optimized.items()
        state = {
            "step": self.step,
            "position": self.position,
            "seconds": self.seconds,
            "first": self.first,
            "config": to_yaml(self.config),
            "data": self.data_facts,
            **main.state(),
            "random": self.group.gather(generator_states(self.group)),
        }
        for name, other in others:
            weights = parallel.model_state(other.module, first)
            state[name] = {"model": weights, **other.state()}
        weights = parallel.model_state(self.model, first)
        if task.ema is not None:
            state["model"] = weights
            weights = task.ema.averaged_state(self.model, weights, first)
        written = None
        with self.group.together():
            if first:
                if bad := bad_numbers(state, weights):
                    raise self._lost(f"{bad[0]} (and {len(bad) - 1} more)")
                folder, keep = self.run / "checkpoints", self.config.output.keep
                write = partial(task.save, weights)
                written = checkpoint.save(folder, self.step, state, write, keep)
        return written

    def restore(self, path: Path) -> None:
        """Continue from the checkpoint at ``path``, with the options of this run's configuration.

        Raises:
            CheckpointError: not whole, not finite, or of another model.
        """
        task = self.task
        state = checkpoint.load(path)
        task.check(path)
        weights = task.weights(path)
        if bad := bad_numbers(state, {}):
            raise CheckpointError(
                f"{path} holds numbers that are not finite, first in {bad[0]}: take it away to "
                "continue from the one before it"
            )
        (_, main), *others = task.optimized.items()
        try:
            parallel.load_model_state(self.model, weights)
            if task.ema is not None:
                task.ema.swap()
                parallel.load_model_state(self.model, state["model"])
            main.load_state(state)
            for name, other in others:
                if name in state:  # a run that begins with it now has none
                    parallel.load_model_state(other.module, state[name]["model"])
                    other.load_state(state[name])
            self.step, self.position = _count(state["step"]), _count(state["position"])
            self.seconds, self.first = float(state["seconds"]), dict(state["first"])
            restore_generators(state["random"], self.group)
        except (ArithmeticError, AttributeError, LookupError, *_MISFITS) as error:
            what = f"no {error}" if isinstance(error, KeyError) else brief(error)
            raise CheckpointError(
                f"{path} does not fit this run's configuration: {what}"
            ) from error
        task.restore(path)
        if self.group.first and (was := state.get("data", now := self.data_facts)) != now:
            print(f"the data have changed: {was} -> {now}", flush=True)

    # -- numbers that are not finite --------------------------------------------------------------

    def _note(self, values: dict[str, Tensor]) -> None:
        """Note which of a step's values are not finite."""
        (main, *_) = self.task.optimized.values()
        # Under loss scaling steps whose gradients overflow are left out.
        names = set(values) - ({"grad_norm"} if main.scaler.is_enabled() else set())
        if self._watch.differs(names):
            self._check_losses()
        self._watch.add(values, names)

    def _check_losses(self) -> None:
        """End the run where a loss was not finite on any process (every process calls this)."""
        names = self._watch.take()
        if names:  # on every process
            with self.group.together():
                if self.group.first:
                    raise self._lost(", ".join(names))

    def _lost(self, what: str) -> NotFiniteError:
        """The error of a run in which ``what`` is not finite."""
        good = checkpoint.available(self.run / "checkpoints")
        left = f"the last good checkpoint is {good[-1]}" if good else "there is no good checkpoint"
        return NotFiniteError(
            f"step {self.step}: {what} is not finite, and no checkpoint of it is written; {left}. "
            "Lower optim.lr or optim.max_grad_norm, or use optim.precision=fp32"
        )

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

    # -- the run ----------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the last step; returns the summary."""
        output, steps = self.config.output, self.config.optim.steps
        log, launcher = self._open_log(), Launcher()
        try:
            with self._naming_the_cause():
                self.prepare()
                started, done_before, before = time.perf_counter(), self.step, self.seconds
                if self.step == 0:
                    self._report(log)
                while self.step < steps:
                    launcher.check()
                    values = self.train_step()
                    self._note(values)
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
                        self._draw(log, "final" if last else f"step_{self.step:08d}")
                    self.seconds = before + time.perf_counter() - started
                    if last or self.step % output.checkpoint_every == 0:
                        self.save()
                if not self.last:  # the run was already complete
                    self.last = self.evaluate()
        finally:
            self.stop_reading()
            if log is not None:
                log.close()
        self.group.wait()
        return self._summary()

    def _open_log(self) -> RunLog | None:
        if not self.group.first:
            return None
        output, steps = self.config.output, self.config.optim.steps
        self.run.mkdir(parents=True, exist_ok=True)
        return RunLog(
            self.run, self.step, steps, tensorboard=output.tensorboard, progress=output.progress
        )

    def _draw(self, log: RunLog | None, name: str) -> None:
        images = self.pictures()
        if log is not None and images is not None:
            log.picture(self.step, self.run / "pictures" / f"{name}.png", *images)

    def _log_step(self, log: RunLog | None, values: dict[str, Tensor], speed: float) -> None:
        self._check_losses()
        names = sorted(values)
        mean = self.group.mean_(torch.stack([values[n].float() for n in names]))
        numbers = dict(zip(names, mean.tolist(), strict=True))
        extra = self.task.step_values()
        numbers |= extra
        (main, *_) = self.task.optimized.values()
        factor = main.scheduler.lr_lambdas[0](main.scheduler.last_epoch)
        numbers["lr"] = self.config.optim.lr * factor
        memory = self.group.peak_memory()
        if log is None:
            return
        beside = {n: numbers[n] for n in self.task.progress}
        images = speed * self.config.optim.batch
        log.show(beside | extra | {"img/s": images, "GiB": memory})
        costs = {"images_per_second": images, "peak_memory_gib": memory}
        log.values(self.step, numbers | costs, "train")

    def _report(self, log: RunLog | None) -> None:
        self.last = self.evaluate()
        if self.step == 0:
            self.first = dict(self.last)
        if log is not None:
            kind, words = self.task.evaluation
            log.values(self.step, self.last, kind)
            text = ", ".join(f"{k} {v:.4g}" for k, v in self.last.items())
            log.say(f"step {self.step}, {words}: {text}")

    def _summary(self) -> dict[str, Any]:
        summary = {
            "steps": self.step,
            "images": self.position,
            "seconds": round(self.seconds, 1),
            **self.task.summary(),
            "first": self.first,
            "last": self.last,
        }
        if self.group.first:
            checkpoint.write_text(self.run / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a count must be a whole number, got {shown(value)}")
    return value


def train(
    config: Config,
    group: Processes,
    make: MakeTask[Config],
    resume: bool = False,
    notice: str = "",
) -> dict[str, Any]:
    """Run the training that ``config`` describes; returns its summary.

    Args:
        make: the task's class.
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
        newest: Path | None = None
        lines: list[str] = []
        with group.together():
            if group.first:
                held.enter_context(runs.lock(run))
                newest, lines = runs.begin(config, resume)
                print(text, *lines, *filter(None, [notice]), sep="\n", flush=True)
        newest = group.gather(newest)[0]
        with group.together():
            trainer = Trainer(config, group, make, resuming=newest is not None)
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
                print(f"{trainer.task.headline()}, {count}", flush=True)
        summary = trainer.fit()
        if group.first:
            task = trainer.task
            print(summary_text(run, summary, task.metrics, task.summary_head()), flush=True)
        return summary


__getattr__ = renamed(
    __name__,
    {
        "BaseTrainer": "Trainer",
        "PRECISIONS": "tokenflow_ext.train.engine.optimization:PRECISIONS",
        "learning_rate": "tokenflow_ext.train.engine.optimization:learning_rate",
        "read_arguments": "tokenflow_ext.train.engine.command:read_arguments",
        "run_command": "tokenflow_ext.train.engine.command:run_command",
    },
)
