"""Units of a corpus on a Ray cluster: Ray Data deals them out to actors, and starts those that were
lost anew on other machines."""

from __future__ import annotations

import pickle
from typing import Any, cast

from tqdm import tqdm

from tokenflow_ext.errors import MissingPackageError
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import find_device

from .encoding import Encoder
from .sources import Corpus
from .tokenize import Done, Job, tokenize_units


class _Worker:
    """An actor: loads the tokenizer once, and makes a shard a call."""

    def __init__(self, job: Job, device: str) -> None:
        model, _ = checkpoint.load_tokenizer(job.checkpoint, job.resolution)
        self.job, self.encoder = job, Encoder(model, find_device(device), job.dtype)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit = pickle.loads(row["unit"])
        return {"done": pickle.dumps(tokenize_units(self.job, [unit], self.encoder, show=False))}


def run_units(job: Job, corpus: Corpus, workers: int | None) -> Done:
    """Tokenize the units of a corpus that are not finished.

    ``ray.init`` joins the cluster that RAY_ADDRESS names, or starts one on this machine.

    Args:
        workers: actors; None is one a GPU, or one a core where the cluster has no GPU.

    Raises:
        MissingPackageError: Ray is not installed.
        DataError: see :func:`.tokenize.tokenize_units`.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingPackageError(
            "--engine ray needs Ray Data: pip install 'tokenflow_ext[ray]'"
        ) from error

    done, todo = Done(), []
    for unit in corpus.units:
        if (receipt := job.shard(unit).written()) is None:
            todo.append(unit)
        else:
            done.shards[unit.number] = receipt
    done.earlier = len(done.shards)
    if not todo:
        return done
    started = not ray.is_initialized()
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    try:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        count = min(len(todo), workers or gpus or int(resources["CPU"]))
        rows = ray.data.from_items(
            [{"unit": pickle.dumps(unit)} for unit in todo], override_num_blocks=len(todo)
        ).map(
            cast(Any, _Worker),  # which Ray makes an actor of
            fn_constructor_args=(job, "cuda" if gpus else "cpu"),
            compute=ray.data.ActorPoolStrategy(size=count),
            num_cpus=1,
            num_gpus=1 if gpus else None,
        )
        with tqdm(total=len(corpus.units), initial=done.earlier, unit="shard") as bar:
            for row in rows.iter_rows():
                part: Done = pickle.loads(row["done"])
                done.add(part)
                bar.update()
    finally:
        if started:
            ray.shutdown()
    return done
