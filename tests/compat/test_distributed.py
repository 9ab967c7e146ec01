"""Two processes with half a batch each keep the statistics of one process with the whole batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torchrun import finish, group_threads, launch

from tokenflow_ext.compat import (
    LFQ,
    GroupedResidualVQ,
    HierarchicalVQ,
    ResidualFSQ,
    ResidualLFQ,
    ResidualSimVQ,
    ResidualVQ,
    VectorQuantize,
    VectorQuantizer2,
)
from tokenflow_ext.train.engine.distributed import processes

DIM = 6
SEQUENCE, IMAGE = (4, 24, DIM), (4, DIM, 6, 6)


def spoil(batch: torch.Tensor) -> torch.Tensor:
    """Of two processes, one has nothing finite in the second step, and little in all others."""
    batch[:2, 1::2] = float("nan")
    if batch[3].sum() > 0:
        batch[0], batch[1] = float("inf"), float("nan")
    return batch


# What draws nothing at random: equal to one process with the joined batch.
JOINED = {
    "VectorQuantize": (lambda: VectorQuantize(DIM, 20), SEQUENCE),
    "VectorQuantize, cosine": (lambda: VectorQuantize(DIM, 20, use_cosine_sim=True), SEQUENCE),
    "ResidualVQ": (lambda: ResidualVQ(dim=DIM, codebook_size=20, num_quantizers=3), SEQUENCE),
    "ResidualVQ, shared": (
        lambda: ResidualVQ(dim=DIM, codebook_size=20, num_quantizers=3, shared_codebook=True),
        SEQUENCE,
    ),
    "GroupedResidualVQ": (
        lambda: GroupedResidualVQ(dim=DIM, groups=2, codebook_size=20, num_quantizers=3),
        SEQUENCE,
    ),
    "HierarchicalVQ": (
        lambda: HierarchicalVQ(
            dim=DIM,
            codebook_size=20,
            scales=(1, 3, 6),
            accept_image_fmap=True,
            kmeans_init=False,
            threshold_ema_dead_code=0,
        ),
        IMAGE,
    ),
    "VectorQuantizer2": (lambda: VectorQuantizer2(20, DIM, False, v_patch_nums=(1, 3, 6)), IMAGE),
    "codebooks by head": (
        lambda: VectorQuantize(DIM, 20, heads=2, separate_codebook_per_head=True),
        SEQUENCE,
    ),
    "optimizer in place": (
        lambda: VectorQuantize(
            DIM,
            20,
            learnable_codebook=True,
            ema_update=False,
            in_place_codebook_optimizer=lambda p: torch.optim.SGD(p, lr=5.0),
        ),
        SEQUENCE,
    ),
    "not finite": (lambda: VectorQuantize(DIM, 20), SEQUENCE, spoil),
    "not finite, VectorQuantizer2": (
        lambda: VectorQuantizer2(20, DIM, False, v_patch_nums=(1, 3, 6)),
        IMAGE,
        spoil,
    ),
}

# What draws at random, each process with its own seed: at least the same on every process.
DRAWN = {
    "k-means and dead codes": (
        lambda: VectorQuantize(DIM, 20, kmeans_init=True, threshold_ema_dead_code=4),
        SEQUENCE,
    ),
    "more codes than rows": (
        lambda: VectorQuantize(DIM, 200, kmeans_init=True, threshold_ema_dead_code=4),
        SEQUENCE,
    ),
    "dropout": (
        lambda: ResidualVQ(
            dim=DIM,
            codebook_size=20,
            num_quantizers=4,
            shared_codebook=True,
            quantize_dropout=True,
            threshold_ema_dead_code=2,
        ),
        SEQUENCE,
    ),
    "dropout by group": (
        lambda: GroupedResidualVQ(
            dim=DIM,
            groups=2,
            codebook_size=20,
            num_quantizers=4,
            quantize_dropout=True,
            kmeans_init=True,
            threshold_ema_dead_code=2,
        ),
        SEQUENCE,
    ),
    "dropout of transformed codes": (  # whose state does not change, but for the dropped layers
        lambda: ResidualSimVQ(dim=DIM, codebook_size=20, num_quantizers=4, quantize_dropout=True),
        SEQUENCE,
    ),
    "dropout of levels": (
        lambda: ResidualFSQ(levels=[5] * DIM, num_quantizers=4, quantize_dropout=True),
        SEQUENCE,
    ),
    "dropout of signs": (
        lambda: ResidualLFQ(
            dim=DIM, codebook_size=1 << DIM, num_quantizers=4, quantize_dropout=True
        ),
        SEQUENCE,
    ),
    "not finite, k-means and dead codes": (
        lambda: VectorQuantize(DIM, 20, kmeans_init=True, threshold_ema_dead_code=4),
        SEQUENCE,
        spoil,
    ),
    "nested dropout": (
        lambda: HierarchicalVQ(
            dim=DIM, codebook_size=20, scales=(1, 3, 6), nested_dropout=0.5, accept_image_fmap=True
        ),
        IMAGE,
    ),
}


def train(case: tuple, rank: int, world: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Four steps without an optimizer on a share of fixed batches; the state after them.

    The layers that were left out of each step are in it.
    """
    build, shape, *changes = case
    torch.manual_seed(0)
    module = build()
    torch.manual_seed(seed)
    dropped = []
    for step in range(4):
        batch = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        for change in changes:
            batch = change(batch)
        _, indices, *_ = module(batch.chunk(world)[rank])
        if getattr(module, "quantize_dropout", False) or isinstance(module, GroupedResidualVQ):
            dropped.append((indices.flatten(0, -2) == -1).all(dim=0))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    if dropped:
        state["dropped"] = torch.stack(dropped)
    if hasattr(module, "skipped_rows"):
        state["skipped_rows"] = module.skipped_rows.clone()
    return state


def entropies(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Entropies of LFQ on a share of a batch, and the gradient of its loss to that share."""
    batch = torch.randn(SEQUENCE, generator=torch.Generator().manual_seed(1))
    share = batch.chunk(world)[rank].requires_grad_()
    (*_, loss), parts = LFQ(dim=DIM)(share, inv_temperature=1.0, return_loss_breakdown=True)
    (gradient,) = torch.autograd.grad(loss, share)
    return {
        "per_sample": parts.per_sample_entropy.detach(),
        "batch": parts.batch_entropy.detach(),
        "gradient": gradient,
    }


def refusals() -> dict[str, str]:
    """What is said to codebooks that are not to agree."""
    said = {}
    for name in ("sync_codebook", "sync_kmeans"):
        try:
            VectorQuantize(DIM, 20, **{name: False})
        except NotImplementedError as error:
            said[name] = str(error)
    return said


def main(folder: str) -> None:
    torch.set_num_threads(1)
    with processes("cpu") as group:
        rank = group.rank
        state = {name: train(case, rank, 2) for name, case in JOINED.items()}
        state |= {name: train(case, rank, 2, seed=1 + rank) for name, case in DRAWN.items()}
        state["refusals"] = refusals()
        state["entropies"] = entropies(rank, 2)
        torch.save(state, Path(folder) / f"{rank}.pt")
    assert not group_threads(), group_threads()


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two-processes")
    finish(launch(__file__, [str(folder)], processes=2))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", JOINED)
def test_statistics_of_the_joint_batch(states: list[dict], name: str) -> None:
    alone = train(JOINED[name], 0, 1)
    for state in states:
        assert state[name].keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(state[name][key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", DRAWN)
def test_the_same_on_every_process(states: list[dict], name: str) -> None:
    first, second = (state[name] for state in states)
    assert all(value.isfinite().all() for value in first.values())
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    changed = train(DRAWN[name], 0, 1)
    assert any(not torch.equal(first[key], value) for key, value in changed.items())


def test_entropies_of_the_joint_batch(states: list[dict]) -> None:
    """The mean choice is that of all processes, and so is the mean of their gradients."""
    alone, shares = entropies(0, 1), [state["entropies"] for state in states]
    for share in shares:
        torch.testing.assert_close(share["batch"], alone["batch"])
    mean = torch.stack([share["per_sample"] for share in shares]).mean()
    torch.testing.assert_close(mean, alone["per_sample"])
    joined = torch.cat([share["gradient"] for share in shares]) / 2
    torch.testing.assert_close(joined, alone["gradient"], rtol=1e-4, atol=1e-7)


def test_codebooks_that_drift_apart_are_refused(states: list[dict]) -> None:
    for state in states:
        for name, message in state["refusals"].items():
            assert f"does not support {name}=False in 2 processes" in message
        assert len(state["refusals"]) == 2


if __name__ == "__main__":
    main(sys.argv[1])
