"""Fully sharded training (FSDP2): a copy of the network is sharded and trained, and its weights are brought back whole.

Sharding rewrites the modules it is given: parameters become shards, and forwards gather them. The caller's network has to come out of
`fit` as it went in, to be saved, cut and run, and a second phase has to start from plain modules; hence the copy.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from offramp.core.errors import InvalidInput

if TYPE_CHECKING:
    from accelerate import Accelerator

    from offramp.train.trainee import Trainee

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
"""What activation checkpointing and compilation put into the names of parameters."""


def check_sharding(accelerator: Accelerator) -> bool:
    """Whether ``accelerator`` shards parameters.

    Raises:
        InvalidInput: sharding was asked for that `fit` cannot do, or that accelerate passes over in silence.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("DEEPSPEED", "MEGATRON_LM"):
        raise InvalidInput(
            f"The accelerator distributes with {kind}; fit works in one process, with DDP and with FSDP2. To shard parameters, pass "
            "Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))."
        )
    if kind == "FSDP":
        version = getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1)
        if version != 2:
            raise InvalidInput(
                f"The accelerator shards with FSDP version {version}, which flattens the parameters that recipes tell apart; fit takes "
                "version 2. Pass FullyShardedDataParallelPlugin(fsdp_version=2), or launch with FSDP_VERSION=2."
            )
        return True
    if accelerator.num_processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise InvalidInput(
            f"FSDP was asked for (an fsdp_plugin, or ACCELERATE_USE_FSDP=true), but accelerate shards on GPUs and other accelerators alone "
            f"and has set up {kind} on {accelerator.device.type}, with every parameter in every process. Run on GPUs, or leave the plugin "
            "out and unset ACCELERATE_USE_FSDP to train with DDP, whose result is the same."
        )
    return False


def copied(trainee: Trainee) -> Trainee:
    """A copy to be sharded; of the cut, which training does not use, none is made.

    Raises:
        InvalidInput: the network cannot be copied.
    """
    try:
        return copy.deepcopy(trainee, {id(trainee.net._cut): None})
    except Exception as error:  # whatever a module of the user's raises
        raise InvalidInput(
            f"FSDP trains a copy of the network, and this one cannot be copied with copy.deepcopy: {error} Remove what is not a module, "
            "a parameter or plain data from it, or train with DDP."
        ) from error


def prepare(trainee: Trainee, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> tuple[nn.Module, Any]:
    """Shard a copy, in place, and the optimizer with it.

    Raises:
        InvalidInput: accelerate or torch cannot shard it that way.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    try:
        model, wrapped = accelerator.prepare(trainee, optimizer)
    except (ValueError, KeyError) as error:
        raise InvalidInput(
            f"The network cannot be sharded with this FSDP plugin: {error} Shard by class: FullyShardedDataParallelPlugin(fsdp_version=2, "
            "auto_wrap_policy='TRANSFORMER_BASED_WRAP', transformer_cls_names_to_wrap=[the class of the model's blocks])."
        ) from error
    # A network that the policy made a unit of its own has to gather its parameters for the method that training calls, too.
    register_fsdp_forward_method(trainee.net, "forward_with_states")
    return model, wrapped


def whole(value: Any) -> Tensor:
    """A sharded tensor put together, on the device of its shards' mesh; any other as it is. All processes must call it."""
    # Asking a DTensor by its class would import what one process does without. Shards may be offloaded to where no process can send from.
    together: Tensor = value.to(value.device_mesh.device_type).full_tensor() if hasattr(value, "full_tensor") else value
    return together


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        yield name, tensor


@torch.no_grad()
def gather(trained: Trainee, into: Trainee, accelerator: Accelerator) -> None:
    """Copy the weights of a sharded copy into what it was copied from, tensor by tensor. All processes must call it, and all get them."""
    from torch.distributed.fsdp import FSDPModule

    for module in trained.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves parameters gathered, and in the precision it computed in
    agree(trained, accelerator)
    live = dict(_named(trained))
    for name, own in _named(into):
        if own.requires_grad or not isinstance(own, nn.Parameter):  # frozen parameters are what they were
            own.copy_(whole(live[name]))


@torch.no_grad()
def agree(module: nn.Module, accelerator: Accelerator) -> None:
    """Give every process the buffers of the first one: nothing else keeps batch statistics alike."""
    from accelerate.utils import broadcast

    for buffer in module.buffers():
        buffer.copy_(broadcast(buffer.to(accelerator.device, copy=True)))


def _state_of_parameters(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], change: Any) -> dict[str, Any]:
    """An optimizer's ``state_dict`` with ``change(value, parameter)`` for every tensor it keeps of a parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def changed(kept: Any, parameter: Tensor) -> Any:
        return tree_map(lambda value: change(value, parameter) if isinstance(value, Tensor) else value, kept)

    return {**state, "state": {index: changed(kept, parameters[index]) for index, kept in state["state"].items()}}


def gather_optimizer(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """The optimizer's ``state_dict`` as an optimizer of plain parameters has it, on the CPU. All processes must call it.

    Args:
        optimizer: of sharded parameters.
        keep: whether this process wants it; the others keep nothing.

    Raises:
        InvalidInput: a sharded tensor has another shape than its parameter, so that it could not be shared out again.
    """
    from torch.distributed.tensor import DTensor

    def change(value: Tensor, parameter: Tensor) -> Any:
        if isinstance(value, DTensor) and value.shape != parameter.shape:
            raise InvalidInput(
                f"{type(optimizer).__name__} keeps a sharded tensor of shape {tuple(value.shape)} for a parameter of shape "
                f"{tuple(parameter.shape)}; a checkpoint takes those of the parameter's shape. Use another optimizer, or fit without "
                "output_dir."
            )
        complete = whole(value)
        return complete.cpu() if keep else None

    return _state_of_parameters(optimizer, optimizer.state_dict(), change)


def scatter_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a whole state, which every process has, into an optimizer of sharded parameters."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    def change(value: Tensor, parameter: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
            return value
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)

    optimizer.load_state_dict(_state_of_parameters(optimizer, state, change))
