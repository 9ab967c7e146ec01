"""Weights over processes: whole on each (DDP) or split over them (FSDP2), and what does not depend
on which: the norm of the gradients, the form of a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tokenflow_ext._deprecated import renamed
from tokenflow_ext.models.serialization import pretrained

from .distributed import Processes


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be split over processes, in one piece (every process calls this)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`whole`; every process has the same ``tensor``."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be split over processes."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_weights(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    group: Processes,
    dtype: torch.dtype | None = None,
    kept: Iterable[nn.Parameter] = (),
) -> None:
    """Splits the model's weights over the processes, in place.

    Args:
        blocks: modules whose weights are gathered together, one block at a time; the rest of the
            model's are gathered with the model.
        dtype: of the gathered weights and of the computation; None leaves both alone.
        kept: parameters that stay whole on every process. Their gradients are not exchanged: see
            :func:`average_gradients`.
    """
    # No loss writes into what the model returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(group.device.type, (group.world,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=set(kept))


def is_split(model: nn.Module) -> bool:
    """Whether :func:`split_weights` was called for the model."""
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Frees the gathered weights, which a forward pass without a backward pass leaves."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation, without gradients; afterwards as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        reshard(model)


def distribute(model: nn.Module, group: Processes, **options: Any) -> nn.Module:
    """What to call in the model's place so that gradients are exchanged.

    Args:
        options: of DistributedDataParallel.
    """
    if group.world == 1 or is_split(model):
        return model
    devices = [group.device] if group.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, **options)


def exchange(parallel: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """For the forward and backward pass of a micro-batch: gradients are exchanged in the last."""
    if isinstance(parallel, FSDPModule):
        parallel.set_requires_gradient_sync(last)
    elif isinstance(parallel, DistributedDataParallel) and not last:
        return parallel.no_sync()
    return nullcontext()


def average_gradients(parameters: Iterable[nn.Parameter], group: Processes) -> None:
    """Exchanges the gradients of parameters that :func:`split_weights` kept whole."""
    for parameter in parameters:
        if parameter.grad is not None:
            group.mean_(parameter.grad)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scales gradients down to a joint norm of ``limit``; returns the norm before (0-dim)."""
    given = [p for p in parameters if p.grad is not None]
    # Operations on many tensors at once take split ones or whole ones, not both.
    kinds = [[p for p in given if isinstance(p, DTensor) == split] for split in (False, True)]
    kinds = [kind for kind in kinds if kind]
    gradients = [[p.grad for p in kind if p.grad is not None] for kind in kinds]
    norms = [whole(nn.utils.get_total_norm(some)) for some in gradients]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, limit, norm)
    return norm


# -- checkpoints: the same for every way of splitting ---------------------------------------------


def model_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Copies of all weights in one piece on the CPU, where ``keep`` (every process calls this)."""
    state = {}
    for name, value in model.state_dict().items():
        value = whole(value)
        if keep:
            state[name] = value.detach().cpu().clone()
    return state


@torch.no_grad()
def load_model_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """The inverse of :func:`model_state`.

    Raises:
        ValueError: another model's.
    """
    own = model.state_dict()
    if own.keys() != state.keys():
        raise ValueError(f"other weights: {sorted(own.keys() ^ state.keys())[:3]}")
    for name, value in own.items():
        if value.shape != state[name].shape:
            raise ValueError(f"{name} is {tuple(state[name].shape)}, not {tuple(value.shape)}")
        value.copy_(split_like(state[name], value))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state dict in one piece on the CPU (every process calls this)."""
    state = optimizer.state_dict()  # its inner mappings are the optimizer's own
    pieces = {
        index: {name: whole(value).cpu() for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": pieces}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The inverse of :func:`optimizer_state`; learning rates, betas and other options stay those
    that the optimizer was made with.

    Raises:
        ValueError: another optimizer's.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not state["state"].keys() <= set(range(len(parameters))):
        raise ValueError("the optimizer's state is of other weights")
    for index, parameter in enumerate(parameters):
        values = state["state"].get(index, {})
        if values and not {"step", "exp_avg", "exp_avg_sq"} <= values.keys():
            raise ValueError("the optimizer's state is not Adam's")
        for name, value in values.items():
            if value.shape == parameter.shape:  # the moments; not the count of steps
                values[name] = split_like(value, parameter)
            elif name != "step" or value.numel() != 1:
                raise ValueError(
                    f"the optimizer's {name} of weight {index} is {tuple(value.shape)}, not "
                    f"{tuple(parameter.shape)}"
                )
    configured = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, options in zip(optimizer.param_groups, configured, strict=True):
        group.update(options)


def load_scheduler_state(
    scheduler: torch.optim.lr_scheduler.LambdaLR, state: dict[str, Any]
) -> None:
    """Goes on where the schedule was that gave ``state``, with the learning rates of this one.

    Raises:
        ValueError: another kind's.
    """
    own = scheduler.state_dict()
    epoch = state["last_epoch"]
    if type(epoch) is not int or epoch < 0:
        raise ValueError("the schedule has no step that it is at")
    kept = {k: v for k, v in state.items() if k in own and type(v) is type(own[k])}
    scheduler.load_state_dict(own | kept | {k: own[k] for k in ("base_lrs", "lr_lambdas")})
    factors = [factor(epoch) for factor in scheduler.lr_lambdas]
    groups = scheduler.optimizer.param_groups
    for group, base, factor in zip(groups, scheduler.base_lrs, factors, strict=True):
        group["lr"] = base * factor


def not_finite(model: nn.Module) -> list[str]:
    """Names of weights and buffers whose part on this process holds a NaN or an infinity."""
    return pretrained.not_finite({name: local_part(v) for name, v in model.state_dict().items()})


__getattr__ = renamed(__name__, {"Average": "tokenflow_ext.train.engine.ema:EMA"})
