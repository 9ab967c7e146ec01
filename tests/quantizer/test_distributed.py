"""Two processes with half a batch each are one process with the whole batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torchrun import finish, group_threads, launch

from tokenflow_ext import MultiScaleQuantizer
from tokenflow_ext.train.engine.distributed import processes

KINDS = {
    "gradient": {"dims": (4, 2)},
    "ema": {"dims": (4, 2), "codebook_update": "ema"},
    "own": {"dims": (3, 3), "codebook_update": "ema", "index": "own"},
}


def make(kind: str) -> MultiScaleQuantizer:
    return MultiScaleQuantizer(40, scales=(1, 2, 4), scale_drop=0.0, usage_decay=0.9, **KINDS[kind])


class Model(torch.nn.Module):
    """A quantizer behind a layer that needs its gradient."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = torch.nn.Conv2d(3, 6, 1)
        self.quantizer = make(kind)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.quantizer(self.project(images))
        return out.quantized.square().mean() + out.vq_loss + out.commitment_loss, out.usage.hits


def train(rank: int, world: int, kind: str) -> dict[str, torch.Tensor]:
    """Three steps of the model on its share of a fixed batch; everything that must agree."""
    model = Model(kind)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    images = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    mine = images.chunk(world)[rank]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss, hits = wrapped(mine)
        loss.backward()
        gradients = {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    result = {**gradients, **model.state_dict(), "hits": hits}
    return {name: value.clone() for name, value in result.items()}


def care(rank: int, kind: str) -> dict[str, torch.Tensor]:
    """k-means and restart with other features, and other numbers of them, on every rank."""
    torch.manual_seed(100 + rank)
    quantizer = make(kind)
    quantizer.init_kmeans(torch.randn(30 + 25 * rank, 6), iterations=3)
    after_kmeans = quantizer.joint_codebook().clone()
    quantizer(torch.randn(1, 6, 4, 4))
    quantizer.restart_dead_codes(torch.randn(20 + rank, 6))
    return {
        "kmeans": after_kmeans.detach(),
        "restarted": quantizer.joint_codebook().detach(),
        "usage": quantizer.usage_ema,
    }


def main(folder: str) -> None:
    with processes("cpu") as group:
        for kind in KINDS:
            torch.save(train(group.rank, 2, kind), Path(folder) / f"{kind}-{group.rank}.pt")
            torch.save(care(group.rank, kind), Path(folder) / f"care-{kind}-{group.rank}.pt")
    assert not group_threads(), group_threads()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-processes")
    finish(launch(__file__, [str(folder)], processes=2))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_and_gradients_of_the_joint_batch(two_processes: Path, kind: str) -> None:
    alone = train(0, 1, kind)
    for rank in range(2):
        joint = torch.load(two_processes / f"{kind}-{rank}.pt")
        assert joint.keys() == alone.keys()
        assert torch.equal(joint["hits"], alone["hits"])
        for name in alone:
            torch.testing.assert_close(joint[name], alone[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_codebooks_are_the_same_on_every_process(two_processes: Path, kind: str) -> None:
    first, second = (torch.load(two_processes / f"care-{kind}-{rank}.pt") for rank in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert not torch.equal(first["kmeans"], first["restarted"])


if __name__ == "__main__":
    main(sys.argv[1])
