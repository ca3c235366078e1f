"""Optimizer steps whose loss or gradient is not finite: refused or left out, and written down to be run again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.callbacks import Callback
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import get_total_norm

from lpl_lightning.arguments import NotFiniteError, at_least
from lpl_lightning.callbacks.terms import leave_lpl_to_guard, loss_callbacks
from lpl_lightning.data.listing import some
from lpl_lightning.run_folder import run_folder
from lpl_lightning.sharding import local, whole
from lpl_lightning.step_record import StepRecord, plain

__all__ = ["StepGuard", "last_step_skipped", "parameters_not_finite"]

_log = logging.getLogger(__name__)


@dataclass
class _Batch:
    """A batch that was trained on, on its device."""

    number: int
    content: Any
    random_state: dict[str, Tensor]
    loss: Tensor | None = None


class StepGuard(Callback):
    """Looks at the loss and the gradient of each optimizer step before the step is taken.

    Where one is not finite on any process, all of them refuse the step, or leave it out: weights, the optimizer's state
    and averages of the weights (``EMA``) stay as they were. With gradients accumulated over several batches that is the
    whole step. A step that is left out counts nonetheless: ``global_step``, the schedule of the learning rate and the
    order of the data are those of a run without it. With float16 a gradient that overflows is the gradient scaler's,
    which leaves out such steps by itself; it is looked at here once the scale is down to 1.

    Each such step is written into the run's folder, by each process with what it was given, so that ``lpl replay
    --record FOLDER`` can run it again. The Latent Perceptual Loss with ``nonfinite: raise`` leaves its values to this
    callback, so that processes agree on them.

    Logged is ``skipped_steps``, how many were left out so far. The processes wait for one number of the accelerator in
    each optimizer step, at the end of the backward pass, and read the gradient once.

    Args:
        policy: ``raise`` ends the run before the weights are touched; ``skip`` leaves the step out.
        max_in_a_row: So many steps of an optimizer left out one after the other end the run too.
        max_records: Steps that are written down in a run's folder.
        record_weights: Whether the weights that the step began with are too, which takes the size of a checkpoint
            without its optimizer; those of steps in a row are the same, and written once.
        record_steps: Numbers of optimizer steps, from 0, that are written down although they are finite.
        dirname: Folder of the records inside the run's folder.
    """

    def __init__(
        self,
        policy: Literal["raise", "skip"] = "raise",
        max_in_a_row: int = 10,
        max_records: int = 3,
        record_weights: bool = True,
        record_steps: Sequence[int] = (),
        dirname: str = "nonfinite",
    ) -> None:
        if policy not in ("raise", "skip"):
            raise ValueError(f"`policy` must be raise or skip, got {policy!r}.")
        at_least(1, max_in_a_row=max_in_a_row)
        at_least(0, max_records=max_records)
        self.policy, self.max_in_a_row, self.max_records = policy, max_in_a_row, max_records
        self.record_weights, self.record_steps, self.dirname = record_weights, frozenset(record_steps), dirname
        self._evaluating = False
        self.skipped = 0
        """Steps left out so far."""
        self._in_a_row: dict[int, int] = {}  # by optimizer
        self._batches: list[_Batch] = []
        self._folder: Path | None = None
        self._weights: str | None = None

    @property
    def in_a_row(self) -> int:
        """Those of them that came last, without a finite one of the same optimizer after them."""
        return max(self._in_a_row.values(), default=0)

    @property
    def step_skipped(self) -> bool:
        """Whether the last step of each optimizer was left out."""
        return bool(self._in_a_row) and all(self._in_a_row.values())

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew where training does; what is loaded to be evaluated does not count."""
        self._evaluating = stage != "fit"
        if not (self._evaluating or trainer.global_step):
            self.skipped, self._in_a_row = 0, {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin."""
        run = run_folder(trainer)  # all processes must ask
        self._folder = None if run is None else run / self.dirname
        self._batches, self._weights = [], None
        leave_lpl_to_guard(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch until its step is taken."""
        states = {"cpu": torch.get_rng_state()}
        if pl_module.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(pl_module.device)
        self._batches.append(_Batch(trainer.fit_loop.epoch_loop.total_batch_idx, batch, states))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Note its loss, which nothing waits for."""
        if self._batches:
            self._batches[-1].loss = loss.detach()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at the step, and refuse it or leave it out."""
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        found = _not_finite([batch.loss for batch in self._batches], optimizer, pl_module.device)
        if scaler is not None and scaler.get_scale() > 1:
            found = [(loss, False) for loss, _ in found]
        step = trainer.global_step
        number = next((i for i, one in enumerate(trainer.optimizers) if one is optimizer), 0)
        if not any(map(any, found)):
            self._in_a_row[number], self._weights = 0, None
            if step in self.record_steps:
                self._record(trainer, pl_module, "asked", (False, False), True, [])
                self._weights = None
            return
        in_a_row = self._in_a_row[number] = self._in_a_row.get(number, 0) + 1
        names = parameters_not_finite(pl_module, optimizer) if any(gradient for _, gradient in found) else []
        said = _said(step, found, names)
        # Where no loss tells which process it was, the gradients are the same on all.
        own = found[trainer.global_rank] if any(loss for loss, _ in found) else (False, True)
        writes = own[0] or not any(loss for loss, _ in found)
        recorded = self._record(trainer, pl_module, "step", own, writes, names)
        if self.policy == "raise" or in_a_row >= self.max_in_a_row:
            remedy = (
                "The policy `skip` of StepGuard would leave it out."
                if self.policy == "raise"
                else f"It is the last of {in_a_row} in a row, `max_in_a_row` of StepGuard: go on from an older "
                "checkpoint, with other data, a smaller learning rate or more precision."
            )
            raise NotFiniteError(f"{said} The weights are as they were before it.{recorded} {remedy}")
        self.skipped += 1
        _leave_out(optimizer, scaler)
        if trainer.is_global_zero or recorded:
            _log.warning("%s It is left out, %d in a row, %d in all.%s", said, in_a_row, self.skipped, recorded)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let go of batches whose step was taken, and log ``skipped_steps`` where the logger takes what was logged."""
        if trainer.fit_loop._should_accumulate():
            return
        self._batches = []
        every: int = cast(Any, trainer).log_every_n_steps
        if every and not trainer.global_step % every:
            # A tensor on the CPU: a number would be copied to the accelerator, and the step would wait for it.
            pl_module.log("skipped_steps", torch.tensor(float(self.skipped), dtype=torch.float32), batch_size=1)

    def _record(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        kind: Literal["step", "asked"],
        own: tuple[bool, bool],
        writes: bool,
        names: Sequence[str],
    ) -> str:
        """Write the step down, where there is room for another; all processes call it together.

        Args:
            trainer: The trainer.
            pl_module: Its module.
            kind: Whether it is not finite, or was asked for; names of records begin with it.
            own: Whether this process's loss, and the gradient, are not finite.
            writes: Whether this process writes.
            names: Parameters whose gradients are not finite.

        Returns:
            A sentence that says where it is, with a space before it, or nothing.
        """
        folder, step, rank = self._folder, trainer.global_step, trainer.global_rank
        name = f"{kind}-{step:08d}"
        if folder is None:
            return ""
        # One process counts, since the others need not see its disk; all must agree, or they would wait for each other.
        known = {path.name[: len(name)] for path in folder.glob("step-*")} if rank == 0 else set()
        if not trainer.strategy.broadcast(kind == "asked" or len(known - {name}) < self.max_records):
            return ""
        if self.record_weights and self._weights is None:
            self._weights = f"{name}-weights.safetensors"
            weights = _whole(pl_module, keep=rank == 0)
            if rank == 0:
                unfinished = folder / f".{self._weights}.part"
                with _unharmed(f"the weights into {folder}"):
                    folder.mkdir(parents=True, exist_ok=True)
                    save_file(weights, unfinished)
                    unfinished.rename(folder / self._weights)
                with suppress(OSError):
                    unfinished.unlink(missing_ok=True)
        # All ask, also those that do not write: a module or callback may gather what it is asked for.
        module_state: dict[str, Any] = {}
        with suppress(Exception):  # Another project's module may ask a checkpoint for what is not there.
            pl_module.on_save_checkpoint(module_state)
        states = {callback.state_key: callback.state_dict() for callback in loss_callbacks(trainer)}
        if not writes:
            return ""
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        losses = [None if batch.loss is None else float(batch.loss) / scale for batch in self._batches]
        checkpoint: Any = trainer.checkpoint_callback
        about = {
            "step": step,
            "epoch": trainer.current_epoch,
            "rank": rank,
            "world_size": trainer.world_size,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "precision": str(trainer.precision),
            "device": str(pl_module.device),
            "batches": [  # losses as strings, which hold them to the last bit, infinite or not
                {"number": batch.number, "loss": None if loss is None else repr(loss)}
                for batch, loss in zip(self._batches, losses, strict=True)
            ],
            "loss_not_finite": own[0],
            "gradients_not_finite": list(names),
            "weights": self._weights if self.record_weights else None,
            "checkpoint": str(getattr(checkpoint, "last_model_path", "") or trainer.ckpt_path or "") or None,
            "module": plain(module_state),
            "callbacks": plain(states),
            "versions": {name: version(name) for name in ("lpl-lightning", "torch", "lightning", "diffusers")},
        }
        record = StepRecord(
            about, [batch.content for batch in self._batches], [batch.random_state for batch in self._batches]
        )
        with _unharmed(f"the step into {folder}"):
            path = record.write(folder / f"{name}-rank-{rank}")
            return f" Recorded: `lpl replay --record {path} -c CONFIG` runs it again."
        return ""

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of what is left."""
        self._batches = []

    def state_dict(self) -> dict[str, Any]:
        """What was left out so far."""
        return {"skipped": self.skipped, "in_a_row": dict(self._in_a_row)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting, if it is training that does."""
        if not self._evaluating:
            self.skipped, found = state_dict["skipped"], state_dict["in_a_row"]  # once one number
            self._in_a_row = dict(found) if isinstance(found, dict) else {0: found}


def last_step_skipped(trainer: pl.Trainer) -> bool:
    """Whether a ``StepGuard`` of the trainer left out the last optimizer step, so that the weights are as before it."""
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    return any(isinstance(callback, StepGuard) and callback.step_skipped for callback in callbacks)


def _not_finite(
    losses: Sequence[Tensor | None], optimizer: torch.optim.Optimizer, device: torch.device
) -> list[tuple[bool, bool]]:
    """Whether a loss and whether a gradient is not finite, of each process; the one thing that is waited for."""
    gradients = [gradient for gradient in _gradients(optimizer) if gradient.numel()]
    # The Euclidean norm is the fastest to come by; float16 has no room for it.
    norm = get_total_norm(gradients, inf if any(g.dtype == torch.float16 for g in gradients) else 2.0)
    finite = [loss.isfinite().all().to(device) for loss in losses if loss is not None]
    all_finite = torch.stack(finite).all() if finite else torch.ones((), dtype=torch.bool, device=device)
    flags = torch.stack([all_finite, norm.isfinite().to(device)]).logical_not().float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        of_all = [torch.empty_like(flags) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(of_all, flags)
        flags = torch.stack(of_all)
    return [(bool(loss), bool(gradient)) for loss, gradient in flags.reshape(-1, 2).tolist()]


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Gradients, of sharded parameters those of this process."""
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    return [local(gradient) for gradient in gradients if gradient is not None]


def parameters_not_finite(pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of parameters whose gradients are not finite, of sharded ones those whose part here is not."""
    names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and not bool(local(parameter.grad).isfinite().all()):
                found.append(names.get(id(parameter), "a parameter without a name"))
    return found


def _said(step: int, found: Sequence[tuple[bool, bool]], names: Sequence[str]) -> str:
    losses = [str(rank) for rank, (loss, _) in enumerate(found) if loss]
    of = f" of process {some(losses)}" if losses and len(found) > 1 else ""
    what = [f"the loss{of}"] if losses else []
    if any(gradient for _, gradient in found):
        what.append(f"the gradient of {some(names)}" if names else "the gradient's norm, or its part elsewhere")
    return f"Optimizer step {step} is not finite: {' and '.join(what)}."


def _leave_out(optimizer: torch.optim.Optimizer, scaler: Any) -> None:
    """Let the coming step change nothing: optimizers pass over parameters without a gradient."""
    # A scaler that leaves the looking to the optimizer must find something to look at.
    fused = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and fused:
                parameter.grad.fill_(float("nan"))
            elif not fused:
                parameter.grad = None


def _whole(pl_module: pl.LightningModule, keep: bool) -> dict[str, Tensor]:
    """The module's weights on the CPU, put together where processes share them; all of these must ask."""
    found = {}
    for name, value in pl_module.state_dict().items():
        tensor = whole(value)
        if keep:
            found[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return found


@contextmanager
def _unharmed(what: str) -> Iterator[None]:
    """What fails while something is written is logged: it must not hide why it is written."""
    try:
        yield
    except Exception as error:
        _log.warning("StepGuard could not write %s: %s: %s", what, type(error).__name__, error)
