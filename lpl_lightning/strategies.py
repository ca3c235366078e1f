"""FSDP2 as a strategy of the trainer, with checkpoints that any number of processes can go on with."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lpl_lightning.checkpoint_files import draft_of, has_optimizer, put_folder
from lpl_lightning.checkpoints import WEIGHTS_ALONE, SafeCheckpointIO, check_checkpoint, with_plain_settings
from lpl_lightning.pretrained import plain_values_alone, read_checkpoint
from lpl_lightning.sharding import load_whole, reshard, shard_like, whole

__all__ = ["FSDP2Strategy"]


class FSDP2Strategy(ModelParallelStrategy):
    """Shards weights, gradients and the optimizer's state over all processes (FSDP2).

    Lightning's ``ModelParallelStrategy`` with all processes along its data axis, of which the module shards itself in
    ``configure_model``. A checkpoint is one file like that of a single process: it goes on under another number of
    processes and another strategy, and the other way round.

    Args:
        save_distributed_checkpoint: Write a folder in place of the file, to which each process writes its shards, for
            models too large for the memory of one; it goes on under FSDP2 alone.
        accumulate_locally: Do without communication until the last of the batches that are accumulated; each process
            then holds the whole gradients meanwhile.
        process_group_backend: By default the device's: NCCL for GPUs, Gloo for CPUs.
        timeout: How long processes wait for each other.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        accumulate_locally: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.accumulate_locally = accumulate_locally

    def setup_environment(self) -> None:
        """Put all processes along the data axis.

        Raises:
            ValueError: What launched them, such as ``srun``, started another number than the trainer has.
        """
        # As Lightning has it for DDP; what it would say otherwise tells of a mesh, or of a list that is too short.
        assert self.cluster_environment is not None
        self.cluster_environment.validate_settings(self.num_processes, self.num_nodes)
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Leave gradients where they are, while batches are accumulated."""
        if not self.accumulate_locally:
            yield
            return
        assert self.model is not None
        parts = [part for part in self.model.modules() if isinstance(part, FSDPModule)]
        for part in parts:
            part.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for part in parts:
                part.set_requires_gradient_sync(True, recurse=False)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights on the CPU in the first process and nothing in the others; or shards for a folder."""
        if self._save_distributed_checkpoint:
            return super().lightning_module_state_dict()
        assert self.lightning_module is not None
        reshard(self.lightning_module)
        return _on_first(self.lightning_module.state_dict(), self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As of the weights."""
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        found: dict[str, Any] = optimizer.state_dict()
        states = {key: _on_first(state, self.is_global_zero) for key, state in found["state"].items()}
        return {**found, "state": states} if self.is_global_zero else {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, which appears whole or not at all, as a folder too."""
        if not self._save_distributed_checkpoint:
            if not isinstance(self.checkpoint_io, SafeCheckpointIO):
                super().save_checkpoint(checkpoint, filepath, storage_options)
            elif self.is_global_zero:  # Lightning would remove a folder that lies there before it writes
                self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)
            return
        place = Path(self.broadcast(filepath))
        part = Path(self.broadcast(draft_of(place)))
        super().save_checkpoint(with_plain_settings(checkpoint), part, storage_options)
        self.barrier()  # until all have written their shards
        if self.is_global_zero:
            put_folder(part, place)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and, in training, the optimizer's state.

        Raises:
            ValueError: It is cut off, changed, something else, or holds more than tensors and plain values; or training
                is to go on from weights alone.
        """
        path = Path(self.broadcast(checkpoint_path))
        check_checkpoint(path)
        module = self.lightning_module
        assert module is not None
        is_trained = module.trainer.state.fn == TrainerFn.FITTING
        if path.is_dir():
            if is_trained and not has_optimizer(path):
                raise ValueError(WEIGHTS_ALONE)
            try:
                with plain_values_alone():
                    return super().load_checkpoint(path, weights_only=True)
            except CheckpointException as error:
                (why, *_), *_ = error.failures.values()
                if not isinstance(why, pickle.UnpicklingError):
                    raise
                raise ValueError(f"`ckpt_path`: {path} cannot be used: it holds what could run code.") from None
        checkpoint = read_checkpoint(str(path), "ckpt_path")
        load_whole(module, checkpoint["state_dict"])
        if is_trained:
            for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
                _load_optimizer(optimizer, state)
        return checkpoint


def _on_first(tensors: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    """Whole tensors on the CPU, where they are wanted; all processes must call it."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach()) if isinstance(tensor, Tensor) else tensor
        if keep:
            found[name] = full.cpu() if isinstance(full, Tensor) else full
    return found


def _load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load the state of an optimizer over whole parameters into one over shards."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    shards: dict[Any, Any] = {}
    for number, parameter in zip(numbers, parameters, strict=True):
        of_parameter = state["state"].get(number, {})
        shards[number] = {
            name: shard_like(value, parameter)
            if isinstance(value, Tensor) and value.shape == parameter.shape
            else value
            for name, value in of_parameter.items()
        }
    optimizer.load_state_dict({**state, "state": shards})
