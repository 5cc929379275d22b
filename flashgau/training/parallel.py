"""One model in several processes, whole in each or sharded, and its state as one set of whole tensors.

DDP: each process holds the model, and gradients are averaged. Sharded (FSDP2): each holds a part of every
parameter, of its gradient and of its moments, and a layer is whole only while it computes. Checkpoints know nothing
of either: they hold whole tensors by name, through PyTorch's distributed checkpoint.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .processes import Processes

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def distribute(model: nn.Module, processes: Processes, device: torch.device, shard: bool) -> nn.Module:
    """Put `model` on `device`, shared by the processes, and return what computes its gradients there.

    Args:
        model: the same in every process. Sharding changes it in place, its layers (the members of its ModuleLists)
            one by one; its parameters are then `DTensor`s.
        processes: those that hold it.
        device: of this process.
        shard: hold a part in each process, rather than the whole.
    """
    if processes.count == 1:
        return model.to(device)
    if not shard:
        return DistributedDataParallel(model.to(device), device_ids=[device] if device.type == "cuda" else None)
    # Imported here and below: these modules take a second to load, and a single process needs none of them.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.count,))
    # The model is still on the CPU: what moves to the device is one layer at a time, and then its shard.
    for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextlib.contextmanager
def only_last_pass(model: nn.Module, last: bool) -> Iterator[None]:
    """Around one of several backward passes: average the gradients over the processes after the last one alone.

    A sharded model averages after each, because what is not yet averaged would have to be kept whole.
    """
    wait = isinstance(model, DistributedDataParallel) and not last
    with model.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
        yield


@contextlib.contextmanager
def without_view_warning(sharded: bool) -> Iterator[None]:
    """Silence what FSDP2 says of layers that return views: it is about changing them in place, which nothing does."""
    with warnings.catch_warnings() if sharded else contextlib.nullcontext():
        if sharded:
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        yield


def whole(tensor: Tensor) -> Tensor:
    """The whole of a norm that sharded tensors gave; any other tensor as it is."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def gather(model: nn.Module, processes: Processes, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Weights "model.NAME" and, given the optimizer, its moments "optimizer.KEY.NAME", all of them whole.

    Every process must call it; all but the first get an empty dictionary.
    """
    moments: Any = {}
    if processes.count == 1:
        weights = model.state_dict()
        if optimizer is not None:
            moments = {name: optimizer.state.get(parameter, {}) for name, parameter in model.named_parameters()}
    else:
        from torch.distributed.checkpoint import state_dict as distributed

        options = distributed.StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = distributed.get_model_state_dict(model, options=options)
        # An optimizer that has taken no step has no state, and asking PyTorch for it would make it take one.
        if optimizer is not None and optimizer.state:
            moments = distributed.get_optimizer_state_dict(model, optimizer, options=options).get("state", {})
    tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
    return tensors | {f"optimizer.{key}.{name}": t for name, state in moments.items() for key, t in state.items()}


def scatter(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes
) -> None:
    """Give every process its part of what `gather` returned in the first.

    Args:
        tensors: in the first process; not looked at in the others.
        model: as `distribute` left it.
        optimizer: AdamW of its parameters.
        processes: those that hold the model. Each must call this.
    """
    weights: dict[str, Any] = {
        name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")
    }
    names = {parameter: name for name, parameter in model.named_parameters()}
    # By name, so that the order of parameters does not matter. One that no gradient ever reached has no moments.
    start = "optimizer.step."
    moved = processes.at_first(lambda: {name.removeprefix(start) for name in tensors if name.startswith(start)})
    moments = {
        name: {key: tensors[f"optimizer.{key}.{name}"] for key in MOMENTS}
        for name in (moved if processes.first else ())
    }
    groups = optimizer.param_groups
    if processes.count == 1:
        model.load_state_dict(weights)
        ordered = [names[parameter] for group in groups for parameter in group["params"]]
        state = {number: moments[name] for number, name in enumerate(ordered) if name in moments}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return

    from torch.distributed.checkpoint import state_dict as distributed

    options = distributed.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    if moved:
        named = [{**group, "params": [names[parameter] for parameter in group["params"]]} for group in groups]
        given: dict[str, Any] = {"state": moments, "param_groups": named} if processes.first else {}
        distributed.set_optimizer_state_dict(model, optimizer, given, options=replace(options, strict=False))
        for parameter, name in names.items():
            if name not in moved:
                optimizer.state.pop(parameter, None)  # PyTorch has made moments for it
    # After the optimizer, whose state PyTorch makes by a step that should change no parameter.
    distributed.set_model_state_dict(model, weights, options=options)
