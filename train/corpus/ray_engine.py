"""Units of a corpus on a Ray cluster: Ray Data deals them out to actors, and starts those that were
lost anew on other machines."""

from __future__ import annotations

import os
import pickle
import time
from dataclasses import replace
from typing import Any, cast

from tqdm import tqdm

from tokenflow_ext.errors import ConfigError, MissingPackageError, TokenFlowError
from tokenflow_ext.train.data.places import is_url
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import find_device

from .encoding import Encoder
from .sources import Corpus, Unit
from .tokenize import Done, Job, finished_units, tokenize_units


class _Worker:
    """An actor: loads the tokenizer once, and makes a shard a call."""

    def __init__(self, job: Job, device: str) -> None:
        model, _ = checkpoint.load_tokenizer(job.checkpoint, job.resolution)
        self.job, self.encoder = job, Encoder(model, find_device(device), job.dtype)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit = pickle.loads(row["unit"])
        done: Done | TokenFlowError
        try:
            done = tokenize_units(self.job, [unit], self.encoder, show=False, tell=False)
        except TokenFlowError as error:  # Ray would hand on no more than its text
            done = error
        return {"done": pickle.dumps(done)}


def run_units(job: Job, corpus: Corpus, device: str, workers: int | None) -> Done:
    """Tokenize the units of a corpus that are not finished.

    ``ray.init`` joins the cluster that RAY_ADDRESS names, or starts one on this machine.

    Args:
        device: "cpu", "cuda", or "auto": CUDA where the cluster has GPUs.
        workers: actors; None is one a GPU, or one a core where there is none to use.

    Raises:
        MissingPackageError: Ray is not installed.
        ConfigError: CUDA is asked for, and the cluster has no GPU.
        DataError: see :func:`.tokenize.tokenize_units`.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingPackageError(
            "--engine ray needs Ray Data: pip install 'tokenflow_ext[ray]'"
        ) from error

    done, todo = finished_units(job, corpus.units)
    job = replace(job, checkpoint=_anywhere(job.checkpoint), out=_anywhere(job.out))
    if not todo:
        return done
    start = time.perf_counter()
    started = not ray.is_initialized()
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    try:
        resources = ray.cluster_resources()
        gpus = 0 if device == "cpu" else int(resources.get("GPU", 0))
        if device not in ("auto", "cpu", "cuda"):
            raise ConfigError(
                f"device {device!r} is none of auto, cpu and cuda, which Ray deals out"
            )
        if device == "cuda" and not gpus:
            raise ConfigError("device 'cuda': the Ray cluster has no GPU")
        count = min(len(todo), workers or gpus or int(resources["CPU"]))
        rows = ray.data.from_items(
            [{"unit": pickle.dumps(_found_anywhere(unit))} for unit in todo],
            override_num_blocks=len(todo),
        ).map(
            cast(Any, _Worker),  # which Ray makes an actor of
            fn_constructor_args=(job, "cuda" if gpus else "cpu"),
            compute=ray.data.ActorPoolStrategy(size=count),
            num_cpus=1,
            num_gpus=1 if gpus else None,
        )
        with tqdm(total=len(corpus.units), initial=done.earlier, unit="shard") as bar:
            for row in rows.iter_rows():
                part: Done | TokenFlowError = pickle.loads(row["done"])
                if isinstance(part, TokenFlowError):
                    raise part
                for note in part.notes:
                    bar.write(note)
                done.add(part)
                bar.update()
    finally:
        if started:
            ray.shutdown()
        # The actors' times, side by side, are the driver's.
    seconds = time.perf_counter() - start
    done.waiting *= seconds / max(done.seconds, 1e-9)
    done.seconds = seconds
    return done


def _anywhere(text: str) -> str:
    """A local path as other processes find it."""
    return os.path.abspath(text) if not is_url(text) and os.path.lexists(text) else text


def _found_anywhere(unit: Unit) -> Unit:
    pictures = (picture._replace(place=_anywhere(picture.place)) for picture in unit.pictures)
    return replace(unit, tar=_anywhere(unit.tar) if unit.tar else "", pictures=tuple(pictures))
