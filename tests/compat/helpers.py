"""What the tests of the stand-ins share."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal within float32 rounding, dtype and shape included."""
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5, equal_nan=True)


def same_state(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        torch.testing.assert_close(
            value, other[name], rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def copies(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Compiled, copied and pickled before its first use, so that nothing is made before."""
    yield torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))


def run(module: torch.nn.Module, x: Tensor, **arguments) -> tuple:
    """(quantized, indices, loss, gradients, further results) of module(x).

    The gradients are those of a fixed mixture of the results, to x and to every parameter.
    """
    module.zero_grad()
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    quantized, indices, loss, *more = module(x, **arguments)
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(quantized.shape, generator=generator).to(quantized)
    total = (quantized * weight).sum() + 3 * loss.sum()
    if total.requires_grad:
        total.backward()
    gradients = {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}
    return quantized, indices, loss, gradients, more


def compare(theirs: torch.nn.Module, ours: torch.nn.Module, x: Tensor, **arguments) -> tuple:
    """Asserts that both give the same for x: results, gradients and state; returns ours."""
    other, mine = run(theirs, x, **arguments), run(ours, x, **arguments)
    close(mine[0], other[0])
    for ours_at, theirs_at in zip(tree_leaves(mine[1]), tree_leaves(other[1]), strict=True):
        assert torch.equal(ours_at, theirs_at)
    close(mine[2], other[2])
    assert mine[3].keys() == other[3].keys()
    for name, gradient in mine[3].items():
        # Where nothing flows, one of the two may say None and the other 0.
        pair = [torch.zeros(()) if g is None else g for g in (gradient, other[3][name])]
        # Sums over all rows: their rounding is that of the largest.
        torch.testing.assert_close(
            *torch.broadcast_tensors(*pair),
            rtol=2e-4,
            atol=2e-5 + 1e-4 * max([0.0, *pair[1].abs().flatten().tolist()]),
            equal_nan=True,
            msg=lambda message, name=name: f"gradient of {name}: {message}",
        )
    same_state(ours, theirs)
    return mine


def entropy(distances: Tensor) -> Tensor:
    """LlamaGen's entropy loss of squared distances [N, K]."""
    logits = -distances / 0.01
    share = logits.softmax(dim=1).mean(dim=0)
    mean = -(logits.softmax(dim=1) * (logits + 1e-5).log_softmax(dim=1)).sum(dim=1).mean()
    return mean + (share * (share + 1e-5).log()).sum()


def second_derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Gradient of the squared norm of the gradient of a scalar function; not zero."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.abs().sum() > 0
    return second


def cubes(results: tuple) -> Tensor:
    """A scalar of (quantized, indices, loss) that is not quadratic in quantized."""
    quantized, _, loss, *_ = results
    return quantized.pow(3).sum() + loss.sum()


def nearest_within(indices: Tensor, rows: Tensor, codes: Tensor, tolerance: float = 1e-5) -> None:
    """Each index [N] names a code [K, D] as near to its row [N, D] as any, in float64."""
    distances = torch.cdist(
        rows.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    chosen = distances.gather(1, indices.unsqueeze(1)).squeeze(1)
    assert (chosen <= distances.amin(dim=1) + tolerance * (1 + distances.amin(dim=1))).all()


class _Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.numel = max(self.numel, leaf.numel())
        return out


@contextmanager
def largest_tensor() -> Iterator[_Largest]:
    """Counts the elements of the largest tensor that any operator returns."""
    with _Largest() as mode:
        yield mode
