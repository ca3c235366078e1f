"""Weights that several processes share out between them (FSDP2), and the whole of them again.

Sharded are the blocks of a backbone one by one, the rest of the backbone, and what a conditioner trains. What is frozen
outside of the backbone, such as autoencoders and text encoders, every process has whole.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lpl_lightning.conditioning import Conditioner
from lpl_lightning.denoiser import Denoiser, outermost
from lpl_lightning.pretrained import check_fit

__all__ = [
    "as_shard",
    "gathered",
    "is_sharded",
    "load_whole",
    "local",
    "original_class",
    "reshard",
    "shard",
    "shard_like",
    "sharded_parameters",
    "trained_parameters",
    "unsharded",
    "whole",
]

Module = TypeVar("Module", bound=nn.Module)

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_pre_hooks",
)


def shard(module: nn.Module, denoiser: Denoiser, conditioner: Conditioner, mesh: DeviceMesh) -> None:
    """Shard a module over processes; nothing happens where it is sharded already.

    Args:
        module: The whole.
        denoiser: Its denoiser.
        conditioner: Its conditioner.
        mesh: Of the processes, with one axis.

    Raises:
        ValueError: It trains something else, which would not be kept equal.
    """
    backbone = denoiser.backbone
    if is_sharded(module):
        return
    named = (getattr(backbone, name, None) or () for name in ("_repeated_blocks", "_no_split_modules"))
    for block in outermost(backbone, set(chain(*named)) or {"BasicTransformerBlock"}):
        fully_shard(block, mesh=mesh)
    fully_shard(backbone, mesh=mesh)
    if any(parameter.requires_grad for parameter in conditioner.parameters()):
        frozen = {parameter for parameter in conditioner.parameters() if not parameter.requires_grad}
        fully_shard(conditioner, mesh=mesh, ignored_params=frozen)
    left = [name for name, value in module.named_parameters() if value.requires_grad and not isinstance(value, DTensor)]
    if left:
        raise ValueError(
            f"{type(module).__name__} trains {', '.join(left[:3])}, which lies neither in the denoiser's backbone nor "
            "in the conditioner: processes would not keep it equal. Shard it in `configure_model`, or train by DDP."
        )


def is_sharded(module: nn.Module) -> bool:
    """Whether a module or a part of it is sharded."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def original_class(part: object) -> type:
    """Class of an object as it was before it was sharded."""
    return type(part).__mro__[2] if isinstance(part, FSDPModule) else type(part)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are trained, by name, as shards or whole as they are."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def sharded_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by name, each once, as shards where they are sharded."""
    reshard(module)
    return dict(module.named_parameters())


def reshard(module: nn.Module) -> None:
    """Let parameters be shards: of the outermost parts they are whole between a forward pass and its backward pass."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor of which this process may have a shard; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A whole tensor, equal in all processes, on the device and in the shards of another; all processes must call it.

    Args:
        tensor: The whole.
        like: The other.
        dtype: Of the result; by default the other's.
    """
    if not isinstance(like, DTensor):
        return tensor.to(like.device, dtype or like.dtype)
    moved = tensor.to(like.device_mesh.device_type, dtype or like.dtype)
    return distribute_tensor(moved, like.device_mesh, like.placements)


def as_shard(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process has of a tensor, as its shard of one in the shards of another."""
    if not isinstance(like, DTensor):
        return tensor
    of_process = tensor.to(like.to_local().device)
    placed: Any = {"run_check": False, "shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(of_process, like.device_mesh, like.placements, **placed)


def load_whole(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole weights, equal in all processes, into a module that may be sharded; all processes must call it.

    Args:
        module: What to load them into.
        state: All of its weights, by name.

    Raises:
        ValueError: They are of another model.
    """
    reshard(module)
    own = module.state_dict()
    check_fit(own, state, "the checkpoint")
    # The others are copied, and brought to their type and device, without a copy of all of them in between.
    sharded = {name: shard_like(state[name], tensor) for name, tensor in own.items() if isinstance(tensor, DTensor)}
    module.load_state_dict({**state, **sharded})


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Let every process have the whole weights for a while, so that each can run the module by itself.

    All processes must enter and leave together. Nothing may be trained meanwhile.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def gathered(module: Module, keep: bool) -> Module | None:
    """A copy, to be written and not run, that holds whole weights on the CPU; all processes must call it.

    Args:
        module: What to copy. Of what is not sharded the copy holds the very tensors.
        keep: Whether this process wants the copy.

    Returns:
        The copy; the module itself if nothing of it is sharded, and None for a process that does not want it.
    """
    if not is_sharded(module):
        return module if keep else None
    reshard(module)
    found: dict[int, Tensor] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if isinstance(tensor, DTensor):
            full = whole(tensor.detach())
            if keep:
                found[id(tensor)] = nn.Parameter(full.cpu(), requires_grad=tensor.requires_grad)
    return _plain(module, found) if keep else None


def _plain(module: Any, tensors: dict[int, Tensor]) -> Any:
    """A module of the same parts, without what sharding added to them."""
    copy: Any = object.__new__(original_class(module))
    # FSDP2 keeps its state among a module's attributes, and lets none of it be copied.
    copy.__dict__.update(
        {key: value for key, value in module.__dict__.items() if not str(key).startswith("__composable_api")}
    )
    for name in ("_parameters", "_buffers"):
        copy.__dict__[name] = {key: tensors.get(id(value), value) for key, value in module.__dict__[name].items()}
    copy.__dict__["_modules"] = {
        key: None if part is None else _plain(part, tensors) for key, part in module._modules.items()
    }
    if isinstance(module, FSDPModule):
        for name in _HOOKS:
            copy.__dict__[name] = OrderedDict()
    return copy
