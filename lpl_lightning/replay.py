"""``lpl replay``: an optimizer step that ``StepGuard`` has written down, run again to find what is not finite."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lpl_lightning.callbacks import LPLCallback
from lpl_lightning.callbacks.step_guard import parameters_not_finite
from lpl_lightning.callbacks.terms import leave_lpl_to_guard, loss_callbacks, lpl_losses
from lpl_lightning.data.listing import some
from lpl_lightning.pretrained import read_state
from lpl_lightning.profiling import ProfilingTrainer
from lpl_lightning.step_record import StepRecord

__all__ = ["Replay", "ReplayingTrainer"]

_NEEDED = {"step", "rank", "world_size", "batches", "precision", "callbacks", "module", "accumulate_grad_batches"}


@dataclass
class Replay:
    """What was found.

    Attributes:
        about: The record's ``about``.
        weights: Where the weights come from.
        notes: What is not as it was.
        inputs: Tensors of the batches that are not finite as they came.
        losses: Of each batch that was run its loss, over the number of batches that are accumulated.
        first_output: The module whose output was the first that is not finite, and whether its input was.
        first_gradient: The module whose output's gradient was the first that is not finite, and the one after it.
        parameters: Those whose gradients are not finite, where the backward pass came to its end.
        operation: What PyTorch's anomaly detection says of the first operation whose gradient is not a number.
    """

    about: dict[str, Any]
    weights: str
    notes: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    first_output: str | None = None
    first_gradient: str | None = None
    parameters: list[str] = field(default_factory=list)
    operation: str | None = None

    @property
    def recorded_losses(self) -> list[float | None]:
        """The losses when the step was written down."""
        return [None if batch["loss"] is None else float(batch["loss"]) for batch in self.about["batches"]]

    @property
    def is_equal(self) -> bool:
        """Whether all losses are those that were written down, to the last bit."""
        return len(self.losses) == len(self.recorded_losses) and all(
            found == known or (found != found and known != known)
            for found, known in zip(self.losses, self.recorded_losses, strict=True)
        )

    def text(self) -> str:
        """All of it, for people."""
        about = self.about
        lines = [
            f"Optimizer step {about['step']} of process {about['rank']} of {about['world_size']}, "
            f"{len(about['batches'])} batches from number {about['batches'][0]['number']}, weights of {self.weights}."
        ]
        lines += [f"Note: {note}" for note in self.notes]
        for batch, found, known in zip(about["batches"], self.losses, self.recorded_losses, strict=False):
            equal = ", equal" if repr(found) == repr(known) else ""
            lines.append(f"Loss of batch {batch['number']}: {found!r}, recorded {known!r}{equal}.")
        if len(self.losses) < len(about["batches"]):
            lines.append(f"The other {len(about['batches']) - len(self.losses)} were not run to their loss.")
        if self.inputs:
            lines.append(f"Not finite as they came: {some(self.inputs)}.")
        if self.first_output is not None:
            lines.append(f"First output that is not finite: {self.first_output}.")
        if self.first_gradient is not None:
            lines.append(f"First gradient that is not finite: that of the output of {self.first_gradient}.")
        if self.operation is not None:
            lines.append(f"First operation whose gradient is not a number: {self.operation}")
        if self.parameters:
            lines.append(f"Gradients of {len(self.parameters)} parameters are not finite: {some(self.parameters)}.")
        if not (self.inputs or self.first_output or self.first_gradient or self.operation or self.parameters):
            lines.append("Every output and every gradient is finite.")
        return "\n".join(lines)


class ReplayingTrainer(ProfilingTrainer):
    """Lightning's trainer, with ``replay`` and ``profile`` beside its own commands."""

    _place: tuple[int, int] | None = None
    """Rank and number of the processes that are stood in for."""

    @property
    def global_rank(self) -> int:
        """Number of the process, in a replay that of the recorded one."""
        return super().global_rank if self._place is None else self._place[0]

    @property
    def world_size(self) -> int:
        """Number of processes, in a replay those of the recorded run."""
        return super().world_size if self._place is None else self._place[1]

    def replay(
        self,
        model: pl.LightningModule,
        record: str,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        anomaly: bool = True,
    ) -> Replay:
        """Run a step again as one process was given it, and name the first module that gives what is not finite.

        It has the step's batches, weights, random numbers and states of callbacks; gradients of other processes are not
        among them. Data, loggers, validation and callbacks that change no loss are left alone. On the kind of machine
        that the step was recorded on, losses are equal to the last bit, but for those of FSDP2.

        Args:
            model: The model, of the run's config.
            record: A folder that ``StepGuard`` has written, or its ``record.json``.
            datamodule: Not looked at.
            ckpt_path: A checkpoint or safetensors file to take the weights from where the record has none.
            anomaly: Whether PyTorch looks for the first operation whose gradient is not a number, and ends with it;
                without it the backward pass goes on to its end.

        Returns:
            What was found.

        Raises:
            FileNotFoundError: There is no such record.
            ValueError: Weights are missing or are another model's, or the trainer has several processes.
        """
        if self.world_size > 1:
            raise ValueError(
                f"`lpl replay` runs in one process, and the trainer has {self.world_size}: add `--trainer.devices 1 "
                "--trainer.num_nodes 1 --trainer.strategy auto`."
            )
        step = StepRecord.read(record)
        if lacking := sorted(_NEEDED - step.about.keys()):
            raise ValueError(f"`record`: {record} is no step as this version writes it: it lacks {some(lacking)}.")
        source = step.weights or ckpt_path
        if source is None:
            raise ValueError(
                f"`record`: {step.about['folder']} is without the step's weights. Give `ckpt_path`, a checkpoint of "
                f"about step {step.about['step']}; the newest one then was {step.about['checkpoint'] or 'none'}."
            )
        found = Replay(step.about, "the record" if step.weights else str(source), inputs=_not_finite(step.batches))
        trainer = cast(Any, self)
        callbacks = loss_callbacks(self)
        _note(found, "the precision", step.about["precision"], str(self.precision))
        for name in sorted({key for key in step.about["callbacks"] if "LPLCallback" in key} ^ _lpl_keys(callbacks)):
            where = "in the run alone" if name in step.about["callbacks"] else "here, and not in the run"
            found.notes.append(f"{name} is {where}.")
        eye = _Eye(step, read_state(str(source), None), found)
        loader = DataLoader(cast(Any, step.batches), batch_size=None, collate_fn=_same)
        changed = ("accumulate_grad_batches", "limit_train_batches", "_detect_anomaly")
        kept = {name: getattr(trainer, name) for name in changed}
        with self._bare():
            trainer.callbacks = [eye, *callbacks]
            trainer.accumulate_grad_batches = step.about["accumulate_grad_batches"]
            trainer.limit_train_batches = 1.0
            trainer._detect_anomaly = anomaly
            self.fit_loop = _at(self, step.about["step"], step.about["batches"][0]["number"])
            self._place = (step.about["rank"], step.about["world_size"])
            try:
                with _anomalies(found):
                    self.fit(model, loader, loader)
            finally:
                self._place = None
                eye.close()
                for name, value in kept.items():
                    setattr(trainer, name, value)
        print(found.text())
        return found


class _Eye(Callback):
    """Puts the step in place, and watches it."""

    def __init__(self, step: StepRecord, weights: Mapping[str, Tensor], found: Replay) -> None:
        self.step, self.weights, self.found = step, weights, found
        self._hooks: list[Any] = []
        self._batch = 0
        self._after: str | None = None  # the module whose output's gradient came last
        self._gradient: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put weights and states in place: what came before has set up all of it anew."""
        about = self.step.about
        pl_module.on_load_checkpoint({"state_dict": dict(self.weights), **about["module"]})
        pl_module.load_state_dict(self.weights)
        watched = {"": pl_module}
        for callback in cast(Any, trainer).callbacks:
            if callback.state_key in about["callbacks"]:
                callback.load_state_dict(about["callbacks"][callback.state_key])
        leave_lpl_to_guard(trainer)
        for number, loss in enumerate(lpl_losses(trainer)):
            watched[f"lpl_{number}"] = cast(Any, loss)
        for prefix, root in watched.items():
            for name, module in root.named_modules():
                path = ".".join(filter(None, (prefix, name)))
                if path and not (prefix and module in set(pl_module.modules())):
                    self._hooks.append(module.register_forward_hook(partial(self._look, path)))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the random state in place."""
        self._batch = batch_idx
        states = self.step.random_states[batch_idx]
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and pl_module.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], pl_module.device)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Note the loss."""
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        self.found.losses.append(float(loss.detach()) / (1.0 if scaler is None else scaler.get_scale()))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note the gradients."""
        self.found.parameters = parameters_not_finite(pl_module, optimizer)

    def _look(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        number = self.step.about["batches"][self._batch]["number"]
        if self.found.first_output is None and (_not_finite(output)):
            given = "is not either" if _not_finite(inputs) else "is finite"
            self.found.first_output = f"{name} ({type(module).__name__}) of batch {number}, whose input {given}"
        for tensor in _tensors(output).values():
            if tensor.requires_grad:
                tensor.register_hook(partial(self._look_back, f"{name} ({type(module).__name__}) of batch {number}"))

    def _look_back(self, name: str, gradient: Tensor) -> None:
        if self.found.first_gradient is None and not bool(gradient.isfinite().all()):
            after = "" if self._after is None else f"; that of {self._after}, which came before it, is finite"
            self.found.first_gradient = f"{name}{after}"
        # Of modules that give the same tensor on, the innermost comes first.
        if gradient is not self._gradient:
            self._after, self._gradient = name, gradient

    def close(self) -> None:
        """Watch no more."""
        self._gradient = None
        for hook in self._hooks:
            hook.remove()


@contextmanager
def _anomalies(found: Replay) -> Iterator[None]:
    """Note what PyTorch's anomaly detection ends the backward pass with."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except RuntimeError as error:
            if "returned nan values" not in str(error):
                raise
            traces = [str(warning.message) for warning in caught if "Traceback of forward call" in str(warning.message)]
            # Its last frame is two lines: where it is, and what stands there.
            lines = traces[-1].split(" (Triggered internally")[0].strip().splitlines() if traces else []
            where = [line.strip() for line in lines[-2:]]
            found.operation = f"{str(error).split(' returned')[0]}{''.join(f' | {line}' for line in where)}"


def _at(trainer: pl.Trainer, step: int, batch: int) -> _FitLoop:
    """A loop that is about to take a step, with the batch of a number."""
    loop = _FitLoop(trainer, min_epochs=0, max_epochs=-1)
    loop.epoch_loop = _TrainingEpochLoop(trainer, max_steps=step + 1)
    loop.epoch_loop.batch_progress.total.ready = batch
    loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
    loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = step
    return loop


def _note(found: Replay, what: str, there: str, here: str) -> None:
    if there != here:
        found.notes.append(f"{what} was {there}, and is {here} here.")


def _lpl_keys(callbacks: list[Any]) -> set[str]:
    return {callback.state_key for callback in callbacks if isinstance(callback, LPLCallback)}


def _tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """All floating tensors in what a module takes or gives, by where they are."""
    if isinstance(value, Tensor):
        return {name: value} if value.is_floating_point() else {}
    if isinstance(value, Mapping):
        parts = [(str(key), part) for key, part in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(str(number), part) for number, part in enumerate(value)]
    else:
        parts = list(vars(value).items()) if hasattr(value, "__dataclass_fields__") else []
    return {key: found for own, part in parts for key, found in _tensors(part, f"{name}.{own}".lstrip(".")).items()}


def _not_finite(value: Any) -> list[str]:
    return [name for name, tensor in _tensors(value).items() if not bool(tensor.detach().isfinite().all())]


def _same(batch: Any) -> Any:
    return batch
